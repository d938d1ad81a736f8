"""How a benchmark is watched while it runs, without knowing where that is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from swaa_local.bench.results import Sample, Setting, Size


@dataclass(frozen=True)
class Measurement:
    """A setting's turn. repetition: from 0."""

    setting: Setting
    size: Size
    repetition: int


class Watch:
    """Takes what happens, in this order. This one is silent; the command line's draws on stderr (bench_terminal.py)."""

    def note(self, text: str) -> None:
        """Something that the user should know, in a sentence."""

    @contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """The weights are loaded."""
        yield

    @contextmanager
    def probing(self, n_prompt: int, n: int) -> Iterator[Callable[[int], None]]:
        """Full attention's better setting is looked for. Yields `done(how many of n)`."""
        yield lambda done: None

    def begin(self, visits: Sequence[Measurement], work: Sequence[int]) -> None:
        """The plan is known; work: of each visit, in some unit."""

    def visiting(self, visit: Measurement) -> None:
        """A visit begins."""

    def on_tokens(self, done: int, total: int) -> None:
        """Tokens of its prompt that were given to the engine."""

    def visited(self, visit: Measurement, sample: Sample) -> None:
        """A visit is complete."""

    def end(self) -> None:
        """All are."""


SILENT = Watch()
