"""The middle and the ends of some measurements. Knows nothing of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the repetitions. A single one has no spread: low and high are None."""

    median: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(values[0]) if len(values) == 1 else cls(median(values), min(values), max(values))

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest; of a single one both are itself."""
        return (
            self.median if self.low is None else self.low,
            self.median if self.high is None else self.high,
        )

    @classmethod
    def of_ratios(cls, over: Sequence[float], under: Sequence[float]) -> Spread:
        """Of the quotients in pairs; equal lengths."""
        return cls.of([a / b for a, b in zip(over, under, strict=True)])
