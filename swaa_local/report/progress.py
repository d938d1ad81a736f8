"""How long work reports itself, without knowing where the reports go."""

from __future__ import annotations

from collections import defaultdict
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


class TimeLeft:
    """Estimates what is left from what each variant took for a token, or another unit of work, so far."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)

    def took(self, variant: str, tokens: int, seconds: float) -> None:
        self._seconds[variant] += seconds
        self._tokens[variant] += tokens

    def estimate(self, left: dict[str, int]) -> float | None:
        """Seconds for so many tokens of each variant; None before anything is known."""
        tokens = sum(self._tokens.values())
        if not tokens:
            return None
        average = sum(self._seconds.values()) / tokens
        return sum(
            n * (self._seconds[variant] / self._tokens[variant] if self._tokens[variant] else average)
            for variant, n in left.items()
        )
