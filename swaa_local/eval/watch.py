"""How an evaluation is watched while it runs, without knowing where that is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from swaa_local.eval.log import EvalLog
from swaa_local.eval.results import AnswerRecord, Cell, QuestionRecord


class Watch:
    """Takes what happens, in this order. This one is silent; the command line's draws on stderr (`terminal`)."""

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
