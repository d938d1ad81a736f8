"""Notices that an answer repeats itself word for word, as small models do until somebody stops them.

Knows tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

_LEAST_TIMES = 4
_LEAST_TOKENS = 240  # that are repetition: a ruler of dashes, a column of zeros or a refrain is shorter
_MOST_PERIOD = 512
_EVERY = 16  # tokens between two looks


class LoopGuard:
    """Give it each token; `period` is how many of them repeat, once it is sure."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self.period: int | None = None

    def saw(self, token: int) -> bool:
        """True if the answer is in a loop."""
        self._tokens.append(token)
        if self.period is None and len(self._tokens) >= _LEAST_TOKENS and len(self._tokens) % _EVERY == 0:
            self.period = repeated(self._tokens)
        return self.period is not None


def repeated(tokens: Sequence[int]) -> int | None:
    """The shortest run of tokens that the end of these is nothing but repetitions of; None if there is none."""
    tail = list(tokens[-(_LEAST_TIMES + 1) * _MOST_PERIOD :])
    for period in range(1, _MOST_PERIOD + 1):
        length = max(_LEAST_TOKENS, _LEAST_TIMES * period)
        if length > len(tail):
            return None
        if tail[-length:-period] == tail[-length + period :]:
            return period
    return None
