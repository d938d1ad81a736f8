"""How an evaluation is watched while it runs, without knowing where that is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from swaa_local.eval.log import AnswerRecord, EvalLog, QuestionRecord


@dataclass(frozen=True)
class Cell:
    """The questions of one task and length under one variant: what a row of the tables is made of."""

    task: str
    length: int | None
    variant: str
    questions: tuple[str, ...]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Of its answers in the results file."""
        return [(question, self.variant) for question in self.questions]


class Watch:
    """Takes what happens, in this order. This one is silent; the command line's draws on stderr (eval_terminal.py)."""

    def note(self, text: str) -> None:
        """Something that the user should know, in a sentence."""

    @contextmanager
    def making(self, task: str, length: int | None, n: int) -> Iterator[Callable[[int], None]]:
        """Questions are made. Yields `made(how many)`."""
        yield lambda done: None

    def begin(self, cells: Sequence[Cell], log: EvalLog) -> None:
        """The plan is known, and what of it is in the file already."""

    def asking(self, variant: str, question: QuestionRecord) -> None:
        """A question is about to be asked."""

    def on_prefill(self, done: int, total: int) -> None:
        """Tokens of its prompt that are read, as `Llama.on_prefill` tells."""

    def answered(self, answer: AnswerRecord) -> None:
        """The answer is in the file."""

    def end(self) -> None:
        """Everything is answered."""


SILENT = Watch()
