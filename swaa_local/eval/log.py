"""The file of an evaluation: every prompt, answer and score, one JSON object a line, so that a stopped run continues.

Lines have a `kind`: `config` (the first line: what all answers depend on), `variant` (a name and its schedule),
`question` and `answer`. Knows files only; answers were scored before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.eval.results import AnswerRecord, QuestionRecord
from swaa_local.files.json_log import JsonLog
from swaa_local.schedule.variants import Variant

FORMAT = 1
_REMEDY = "name another file with --results, or remove this one"


class EvalLogError(SWAAError):
    """A results file that cannot be used; the message says what to do."""


class EvalLog(JsonLog):
    """Opens or begins a results file, and holds what is in it. Use as a context manager.

    config: must be what the file was begun with. variants: must have the schedules that they have in the file, if they
    are in it. Raises `EvalLogError`.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.questions: dict[str, QuestionRecord] = {}
        self.answers: dict[tuple[str, str], AnswerRecord] = {}
        self._variants: dict[str, Any] = {}
        super().__init__(
            path,
            config,
            format=FORMAT,
            on_row=self._take,
            what="a results file of swaa-local eval",
            remedy=_REMEDY,
            error=EvalLogError,
        )

    def __enter__(self) -> EvalLog:
        return self

    def _take(self, kind: str, row: dict[str, Any]) -> None:
        if kind == "variant":
            self._variants[row.pop("name")] = row
        elif kind == "question":
            question = QuestionRecord(**row | {"references": tuple(row["references"])})
            self.questions[question.id] = question
        elif kind == "answer":
            answer = AnswerRecord(**row)
            self.answers[answer.question, answer.variant] = answer
        else:
            raise KeyError(kind)

    def add_variant(self, variant: Variant) -> None:
        """Note a variant's schedule. Raises `EvalLogError` if the file has another under this name."""
        spelled = _as_row(variant)
        known = self._variants.get(variant.name)
        if known is None:
            self._variants[variant.name] = spelled
            self.write("variant", {"name": variant.name} | spelled)
        elif known != spelled:
            raise EvalLogError(
                f"{self.path} has answers of another schedule under the name {variant.name!r}; {_REMEDY}"
            )

    def add_question(self, question: QuestionRecord) -> None:
        """Note a question. Raises `EvalLogError` if the file has another one in its place."""
        known = self.questions.get(question.id)
        if known is None:
            self.questions[question.id] = question
            self.write("question", asdict(question))
        elif known != question:
            changed = next(f.name for f in fields(known) if getattr(known, f.name) != getattr(question, f.name))
            raise EvalLogError(
                f"{self.path} has another question {question.id} (its {changed} differs): of another version of the "
                f"tasks, another haystack or another dataset; {_REMEDY}"
            )

    def add_answer(self, answer: AnswerRecord) -> None:
        self.answers[answer.question, answer.variant] = answer
        self.write("answer", asdict(answer))


def _as_row(variant: Variant) -> dict[str, Any]:
    """Without window and sinks where no layer slides."""
    schedule = variant.schedule
    meaning = {} if schedule.is_full else {"window": schedule.window, "sinks": schedule.sinks}
    if schedule.active_tail:  # files from before there were tails go on
        meaning["tail"] = schedule.active_tail
    return {"think": variant.think, "layer_modes": [int(mode) for mode in schedule.layer_modes]} | meaning
