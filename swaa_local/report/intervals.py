"""What can be concluded from a few measurements: 95 % intervals. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

_Z95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def paired(differences: Sequence[float], *, prior: float = 0.25) -> Interval:
    """The mean of paired differences with its interval; at least one.

    prior: a variance that one more pair is taken to add, so that three equal differences are no certainty. Differences
    of things between 0 and 1.
    """
    n, mean = len(differences), fmean(differences)
    variance = (sum((difference - mean) ** 2 for difference in differences) + prior) / n
    half = _Z95 * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def wilson(right: float, n: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default, as (low, high) between 0 and 1; n is at least 1.

    Unlike the normal approximation it is sensible at 0 and at 100 %.
    """
    share = right / n
    denominator = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
