"""How long work reports itself, without knowing where the reports go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Reporter:
    """Takes notes and progress. This one is silent; the command line's draws on stderr (terminal.py)."""

    def note(self, text: str) -> None:
        """Something that the user should know, in a sentence."""

    @contextmanager
    def step(self, label: str, total: int | None = None, *, is_bytes: bool = False) -> Iterator[Callable[..., None]]:
        """A stretch of work. Yields `update(done, total=None)`; no total means that nobody knows."""
        yield lambda done, total=None: None


SILENT = Reporter()
