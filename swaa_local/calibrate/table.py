"""What a calibration found, as text: the tables of the terminal and of the report, and the line for the GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from swaa_local.calibrate.results import Calibration, Candidate, Check
from swaa_local.report.tables import markdown_table
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.text import about_others, in_one_line, in_words
from swaa_local.text.units import format_bytes, format_duration

_MOST_ROWS = 16
_SAME_QUALITY = 0.001


def markdown(result: Calibration) -> str:
    """All of it, for people."""
    parts = [f"# {result.model}, prompts of {result.length} tokens", "", verdict(result), ""]
    if result.checks:
        parts += ["## Answers to questions that the search has not seen", "", check_table(result.checks), ""]
    if result.candidates:
        parts += ["## What was tried", "", candidate_table(result), "", quality_note(result), ""]
        parts += ["Fronts, the schedules that no other is both cheaper and better than:", "", fronts(result), ""]
    if result.gains:
        parts += ["## What each layer brings", "", gains_line(result), ""]
    if others := about_others(result.full.schedule.model):
        parts += [others, ""]
    if result.notes:
        parts += ["## Notes", "", *(f"- {note}" for note in result.notes), ""]
    return "\n".join(parts).rstrip() + "\n"


def verdict(result: Calibration) -> str:
    """The result in a sentence or two."""
    took = f"{format_duration(result.spent_s)} of {format_duration(result.budget_s)}"
    if result.chosen is None:
        needs = "" if result.long_s is None else f" One prompt takes about {format_duration(result.long_s)} here."
        return f"No schedule was tried in {took}; give a larger --budget.{needs}"
    chosen = next(each for each in result.candidates if each.schedule == result.searched)
    kept = f"keeps {chosen.quality.value:.1%} of full attention's quality"
    asked = f"(asked for: {result.keep:.0%})"
    what = f"`{in_words(result.chosen)}` ({in_one_line(result.chosen)}) {kept} {asked}"
    checked = result.checked
    if not result.keeps:
        why = shortfall(result)
        what = f"{why[0].upper()}{why[1:]}. The best: {what}"
    if checked is not None:
        what = what.replace(kept, f"{kept} in the search")
    searched = None if chosen.prefill is None else f"{1 / chosen.prefill:.2f}"
    speed = f" and in the search reads {searched} times as fast" if searched and checked is None else ""
    seen = ""
    if checked is not None and checked.difference is not None:
        full = result.checks[0]
        seen = (
            f" On {checked.n} questions that the search has not seen it answers {checked.right}, full attention "
            f"{full.right}: {_points(checked)}. It reads {1 / checked.prefill:.2f} times as fast, as measured on these"
            f"{f' ({searched} in the search)' if searched else ''}."
        )
    elif result.interrupted:
        seen = " It was stopped before the check."
    elif result.evidence == "short prompts":
        seen = f" This is by short prompts alone: there was no time to try one of {result.length} tokens."
    else:
        seen = " It was not checked on questions that the search has not seen, for lack of time."
    return f"{what}{speed}.{seen} It took {took}."


def shortfall(result: Calibration) -> str:
    """Why what was chosen does not count as keeping enough."""
    chosen, checked = next(each for each in result.candidates if each.schedule == result.searched), result.checked
    if checked is None and chosen.quality.value >= result.keep:
        return f"too few questions were asked to tell what keeps {result.keep:.0%} of full attention's answers"
    where = "was checked" if checked is not None else "was tried"
    return f"no schedule that {where} keeps {result.keep:.0%} of full attention's answers"


def _points(check: Check) -> str:
    assert check.difference is not None
    value, low, high = (100 * each for each in (check.difference.value, check.difference.low, check.difference.high))
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def check_table(checks: Sequence[Check]) -> str:
    """Generated answers."""
    rows = []
    for check in checks:
        low, high = check.interval
        rows.append(
            [
                check.name,
                f"{check.right}/{check.n}",
                f"{check.right / check.n:.0%} ({low:.0%}-{high:.0%})",
                "" if check.difference is None else _points(check),
                f"{check.prefill_s:.2f}",
                f"{1 / check.prefill:.2f}x",
                f"{1000 * check.decode_token_s:.1f}",
                format_bytes(check.kv_bytes),
            ]
        )
    head = ["schedule", "right", "share (95 %)", "to full attention", "prefill, s", "speed", "ms a token", "KV cache"]
    return markdown_table(head, rows)


def candidate_table(result: Calibration) -> str:
    """The front first, then the rest from fast to slow."""
    front = {each.schedule for each in front_of(result.candidates)} | {result.searched}
    listed = [each for each in result.candidates if each.schedule in front]
    rest = [each for each in result.candidates if each.schedule not in front]
    rest.sort(key=lambda each: -each.quality.value)
    shown = [*listed, *rest[: max(0, _MOST_ROWS - len(listed))]]
    rows = [_row(each, chosen=each.schedule == result.searched) for each in [result.full, *shown]]
    head = ["schedule", "quality (95 %)", "right", "NLL", "prefill, s", "speed", "ms a token", "KV cache", "texts"]
    more = len(result.candidates) - len(shown)
    table = markdown_table(head, rows)
    return table + (f"\n\nAnd {more} more; the log has all of them." if more > 0 else "")


def _row(each: Candidate, *, chosen: bool) -> list[str]:
    quality = each.quality
    return [
        each.name + (" (chosen)" if chosen else ""),
        "1" if each.schedule.is_full else f"{quality.value:.3f} ({quality.low:.3f}-{quality.high:.3f})",
        f"{each.right}/{each.n}",
        f"{each.nll:.3f}",
        "" if each.prefill_s is None else f"{each.prefill_s:.2f}",
        "" if each.prefill is None else f"{1 / each.prefill:.2f}x",
        "" if each.decode_token_s is None else f"{1000 * each.decode_token_s:.1f}",
        format_bytes(each.kv_bytes),
        str(each.n_texts),
    ]


def quality_note(result: Calibration) -> str:
    return (
        "Quality: the chance that the right answer is given word for word, sampled at temperature 0.3, over full "
        "attention's on the same questions. Right: given greedily. NLL: the answers' mean negative log-likelihood per "
        "token."
    )


def gains_line(result: Calibration) -> str:
    """Layers by what they bring, best first."""
    ranked = sorted(result.gains, key=lambda gain: -gain.gain)
    shown = ", ".join(f"{gain.layer} ({gain.gain:+.3f}{'' if gain.alone else '*'})" for gain in ranked[:12])
    star = " *: measured in a group." if any(not gain.alone for gain in ranked[:12]) else ""
    return f"By how much the answers' NLL falls if this layer alone is full ({result.gains_at}): {shown}.{star}"


COSTS: dict[str, Callable[[Candidate], float | None]] = {
    "reading time": lambda each: each.prefill,
    "KV cache": lambda each: float(each.kv_bytes),
    "writing time": lambda each: each.decode,
}
"""What a schedule costs; None where it was not measured."""


def front_of(candidates: Sequence[Candidate], cost: str = "reading time") -> list[Candidate]:
    """Those that no other is both cheaper and better than, the cheapest first."""
    front: list[Candidate] = []
    priced = [(price, each) for each in candidates if (price := COSTS[cost](each)) is not None]
    for _, each in sorted(priced, key=lambda item: (item[0], -item[1].quality.value)):
        if all(each.quality.value > other.quality.value + _SAME_QUALITY for other in front):
            front.append(each)
    return front


def fronts(result: Calibration) -> str:
    """For each kind of cost, the schedules that no other is both cheaper and better than."""
    lines = []
    for cost, price in COSTS.items():
        full = price(result.full) or 1.0
        front = [(each, price(each)) for each in front_of(result.candidates, cost)]
        shown = "; ".join(
            f"{each.name} ({value / full:.2f}, quality {each.quality.value:.3f})"
            for each, value in front
            if value is not None
        )
        if shown:
            lines.append(f"- {cost}, as a share of full attention's: {shown}")
    return "\n".join(lines)


def as_dict(result: Calibration) -> dict[str, Any]:
    """All of it as plain data."""

    def candidate(each: Candidate) -> dict[str, Any]:
        return {
            "schedule": each.schedule.as_dict(),
            "name": each.name,
            "quality": each.quality.value,
            "quality_low": each.quality.low,
            "quality_high": each.quality.high,
            "nll": each.nll,
            "right": each.right,
            "n": each.n,
            "prefill_share": each.prefill,
            "prefill_s": each.prefill_s,
            "decode_token_s": each.decode_token_s,
            "kv_bytes": each.kv_bytes,
            "texts": each.n_texts,
        }

    def check(each: Check) -> dict[str, Any]:
        difference = each.difference
        return {
            "schedule": each.schedule.as_dict(),
            "name": each.name,
            "right": each.right,
            "n": each.n,
            "low": each.interval[0],
            "high": each.interval[1],
            "difference": None if difference is None else [difference.value, difference.low, difference.high],
            "prefill_s": each.prefill_s,
            "prefill_share": each.prefill,
            "decode_token_s": each.decode_token_s,
            "kv_bytes": each.kv_bytes,
        }

    return {
        "model": result.model,
        "length": result.length,
        "keep": result.keep,
        "seed": result.seed,
        "budget_s": result.budget_s,
        "spent_s": result.spent_s,
        "kinds": list(result.kinds),
        "prompts": result.digest,
        "chosen": None if result.chosen is None else result.chosen.as_dict(),
        "keeps": result.keeps,
        "evidence": result.evidence,
        "interrupted": result.interrupted,
        "full": candidate(result.full),
        "checks": [check(each) for each in result.checks],
        "candidates": [candidate(each) for each in result.candidates],
        "gains": [{"layer": gain.layer, "gain": gain.gain, "alone": gain.alone} for gain in result.gains],
        "gains_at": result.gains_at,
        "notes": list(result.notes),
    }


def as_json(result: Calibration) -> str:
    return json.dumps(as_dict(result), indent=2)


def stored_line(result: Calibration, version: str) -> str:
    """What `swaa.calibration` of the GGUF says, in one line of JSON."""
    checked = result.checked
    chosen = next(each for each in result.candidates if each.schedule == result.searched)
    said: dict[str, Any] = {
        "by": f"swaa-local {version}",
        "length": result.length,
        "keep": result.keep,
        "quality": round(chosen.quality.value, 4),
        "keeps": result.keeps,
        "evidence": result.evidence,
        "questions": list(result.kinds),
        "prompts": result.digest,
        "seed": result.seed,
    }
    if (measured := checked or chosen).prefill is not None:
        said |= {"speed": round(1 / measured.prefill, 3), "speed_in": "check" if checked else "search"}
    if checked is not None:
        said |= {"right": checked.right, "full_right": result.checks[0].right, "n": checked.n}
    return json.dumps(said, separators=(",", ":"))


def layers_kept(schedule: Schedule) -> int:
    """Layers with full attention."""
    return len(schedule.layers(LayerMode.FULL))
