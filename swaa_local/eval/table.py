"""The figures of an evaluation and their tables: Markdown, CSV and JSON. Knows records, not models.

Accuracy is all or nothing, as the SWAA paper counts: right are answers with all that was asked for. The share of the
references found, RULER's measure, stands beside it where a question has several. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from swaa_local.eval.results import AnswerRecord, Cell, Evaluation, QuestionRecord
from swaa_local.report.intervals import wilson
from swaa_local.report.tables import markdown_table
from swaa_local.schedule.text import about_others
from swaa_local.text.printable import printable, printable_json
from swaa_local.text.units import format_bytes

N_DEPTHS = 5
"""Bins of the needle's depth, of equal width."""
_NOTES = {
    "all": "found: share of the references found in the answers, RULER's measure; right: all of them found.",
    "part": "right: one of the references found in the answer, RULER's measure for questions and answers.",
    "contains": "right: the answer contains the reference. No judge reads it: not comparable with the paper's figures.",
    "value": "right: the answer has the value asked for, and no other.",
}


@dataclass(frozen=True)
class Accuracy:
    """right of n; low and high bound the 95 % interval of their share."""

    n: int
    right: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class CellFigures:
    """One variant on one task at one length; over the questions, times are medians and counts of tokens means.

    found: mean share of references. beyond: only questions whose needle is further from the end of the prompt than the
    variant's window; None if it has none. depths: by needle depth from 0 to 1 in equal bins, None where a bin is empty.
    prefill_s, decode_s: seconds. cut: answers that did not end.
    """

    variant: str
    task: str
    length: int | None
    metric: str
    accuracy: Accuracy
    found: float
    beyond: Accuracy | None
    depths: tuple[Accuracy | None, ...]
    n_references: float
    prompt_tokens: float
    prefill_s: float
    prefill_tokens_per_s: float
    generated_tokens: float
    decode_s: float
    cut: int
    kv_bytes: int


def figures(evaluation: Evaluation) -> list[CellFigures]:
    """Of each cell of the plan, in its order."""
    windows = {variant.name: variant.window for variant in evaluation.variants}
    return [_cell_figures(evaluation, cell, windows[cell.variant]) for cell in evaluation.cells]


def _cell_figures(evaluation: Evaluation, cell: Cell, window: int | None) -> CellFigures:
    pairs = [(evaluation.questions[key[0]], evaluation.answers[key]) for key in cell.keys]
    answers = [answer for _, answer in pairs]
    prompt_tokens = fmean(question.prompt_tokens for question, _ in pairs)
    prefill_s = median(answer.prefill_s for answer in answers)
    bins: list[list[AnswerRecord]] = [[] for _ in range(N_DEPTHS)]
    for question, answer in pairs:
        if question.depth is not None:
            bins[min(N_DEPTHS - 1, int(question.depth * N_DEPTHS))].append(answer)
    beyond = [answer for question, answer in pairs if _is_beyond(question, window)]
    return CellFigures(
        variant=cell.variant,
        task=cell.task,
        length=cell.length,
        metric=pairs[0][0].metric,
        accuracy=_accuracy(answers) or Accuracy(0, 0),
        found=fmean(answer.share for answer in answers),
        beyond=_accuracy(beyond),
        depths=tuple(_accuracy(each) for each in bins),
        n_references=fmean(len(question.references) for question, _ in pairs),
        prompt_tokens=prompt_tokens,
        prefill_s=prefill_s,
        prefill_tokens_per_s=prompt_tokens / prefill_s if prefill_s else 0.0,
        generated_tokens=fmean(answer.generated_tokens for answer in answers),
        decode_s=median(answer.decode_s for answer in answers),
        cut=sum(answer.finish != "stop" for answer in answers),
        kv_bytes=answers[0].kv_bytes,
    )


def _is_beyond(question: QuestionRecord, window: int | None) -> bool:
    return window is not None and question.tokens_after is not None and question.tokens_after >= window


def _accuracy(answers: Sequence[AnswerRecord]) -> Accuracy | None:
    return Accuracy(len(answers), sum(answer.correct for answer in answers)) if answers else None


# Markdown


def markdown(evaluation: Evaluation) -> str:
    """A table of variants for each task and length, and one by needle depth where needles are single."""
    cells = figures(evaluation)
    parts = []
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        group = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
        size = f"{length} tokens" if length is not None else f"{group[0].prompt_tokens:.0f} tokens on average"
        n = group[0].accuracy.n
        parts.append(f"### {task}, {size}, {n} question{'s' * (n != 1)}")
        parts.append(_main_table(group, evaluation.full))
        if any(depth for cell in group for depth in cell.depths):
            parts.append(_depth_table(group))
    metrics = dict.fromkeys(cell.metric for cell in cells)
    notes = [f"Model {printable(evaluation.model)}. Intervals are 95 %. Times are of one question, the median."]
    if others := about_others(evaluation.variants[0].schedule.model):
        notes.append(others)
    notes += [_NOTES[metric] for metric in metrics]
    if any(cell.beyond for cell in cells):
        notes.append("beyond: right where the needle is further from the end than the variant's window.")
    parts.append(" ".join(notes))
    return "\n\n".join(parts)


def _main_table(group: Sequence[CellFigures], name_of_full: str | None) -> str:
    several = any(cell.n_references > 1 and cell.metric == "all" for cell in group)
    beyond = any(cell.beyond for cell in group)
    cut = any(cell.cut for cell in group)
    full = next((cell for cell in group if cell.variant == name_of_full), None)
    head = ["variant", "right", "95 %"] + ["found"] * several + ["beyond"] * beyond
    head += ["prefill", "tok/s"] + ["speed-up"] * bool(full) + ["answer", "KV cache"] + ["cut"] * cut
    rows = []
    for cell in group:
        low, high = cell.accuracy.interval
        row = [cell.variant, _percent(cell.accuracy.share), f"{100 * low:.0f}-{100 * high:.0f}"]
        row += [_percent(cell.found)] * several
        row += [f"{cell.beyond.right}/{cell.beyond.n}" if cell.beyond else ""] * beyond
        row += [_seconds(cell.prefill_s), f"{cell.prefill_tokens_per_s:.0f}"]
        row += [f"{full.prefill_s / cell.prefill_s:.2f}"] if full else []
        row += [_seconds(cell.prefill_s + cell.decode_s), format_bytes(cell.kv_bytes)]
        rows.append(row + [str(cell.cut)] * cut)
    return markdown_table(head, rows)


def _depth_table(group: Sequence[CellFigures]) -> str:
    head = ["needle depth", *(f"{100 * i // N_DEPTHS}-{100 * (i + 1) // N_DEPTHS} %" for i in range(N_DEPTHS))]
    rows = [[cell.variant, *(f"{d.right}/{d.n}" if d else "" for d in cell.depths)] for cell in group]
    return markdown_table(head, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


# CSV and JSON


def as_csv(evaluation: Evaluation) -> str:
    """A line for each cell and, if needles are single, for each of its depth bins; shares are between 0 and 1."""
    out = io.StringIO()
    columns = ["variant", "task", "length", "depth_from", "depth_to", "n", "right", "accuracy", "low", "high", "found"]
    columns += ["beyond_n", "beyond_right", "prompt_tokens", "prefill_s", "prefill_tokens_per_s", "generated_tokens"]
    columns += ["decode_s", "cut", "kv_bytes"]
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for cell in figures(evaluation):
        name = {"variant": printable(cell.variant), "task": printable(cell.task), "length": cell.length or ""}
        row: dict[str, Any] = asdict(cell) | name
        if cell.beyond:
            row |= {"beyond_n": cell.beyond.n, "beyond_right": cell.beyond.right}
        writer.writerow(row | _as_row(cell.accuracy))
        for i, depth in enumerate(cell.depths):
            if depth:
                place = {"depth_from": i / N_DEPTHS, "depth_to": (i + 1) / N_DEPTHS}
                writer.writerow(name | place | _as_row(depth))
    return out.getvalue()


def as_json(evaluation: Evaluation) -> str:
    """All figures, and the schedules of the variants."""
    cells = []
    for cell in figures(evaluation):
        row = asdict(cell) | {"accuracy": _as_row(cell.accuracy), "beyond": cell.beyond and _as_row(cell.beyond)}
        row["depths"] = [
            {"from": i / N_DEPTHS, "to": (i + 1) / N_DEPTHS} | _as_row(depth)
            for i, depth in enumerate(cell.depths)
            if depth
        ]
        cells.append(row)
    variants = [
        {
            "name": v.name,
            "think": v.think,
            "window": v.window,
            "sinks": v.schedule.sinks,
            "tail": v.schedule.active_tail,
            "layer_modes": list(map(int, v.schedule.layer_modes)),
        }
        for v in evaluation.variants
    ]
    return printable_json({"model": evaluation.model, "variants": variants, "results": cells}, indent=2)


def _as_row(accuracy: Accuracy) -> dict[str, Any]:
    low, high = accuracy.interval
    return {"n": accuracy.n, "right": accuracy.right, "accuracy": accuracy.share, "low": low, "high": high}
