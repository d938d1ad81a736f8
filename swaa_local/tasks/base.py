"""What a task is: something that makes questions of a given length, the same ones for the same seed.

Lengths are in tokens of the model that is asked, and count the whole prompt with its chat template and the room for the
answer, as RULER counts them. Only the caller knows the tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from swaa_local.errors import SWAAError
from swaa_local.tasks.scoring import Metric


class TaskError(SWAAError, ValueError):
    """A task that does not exist, or cannot make what is asked of it."""


@dataclass(frozen=True)
class Question:
    """One question to a model, and what its answer is measured by.

    prompt: the user's message. answer_prefix: what the answer begins with, put into the assistant's mouth where it does
    not think first. max_tokens: of the answer, thoughts aside. needle_at: offset in the prompt, in characters, of the
    one thing to be found; None if there are several. depth: where that is in the text, 0 the start and 1 the end.
    distractors: what the answer must not name.
    """

    prompt: str
    references: tuple[str, ...]
    metric: Metric
    max_tokens: int
    answer_prefix: str = ""
    needle_at: int | None = None
    depth: float | None = None
    distractors: tuple[str, ...] = ()


CountTokens = Callable[[str, str], int]
"""(user's message, answer prefix) -> tokens of the prompt made of them."""


class Task(Protocol):
    """A generator of questions."""

    @property
    def name(self) -> str: ...

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        """The question number `index`; it and the room for its answer take `length` tokens at most.

        Raises `TaskError` if that is too short for this task.
        """
        ...


def sized(
    name: str, build: Callable[[int], Question], length: int, count: CountTokens, *, least: int, most: int | None = None
) -> Question:
    """The longest question `build(n)` that fits, where n, the number of parts of its text, is `least` or more.

    `build` must give the same question for the same n. most: parts at most, for a task that has no more.
    """
    made: dict[int, Question] = {}
    tokens: dict[int, int] = {}

    def fits(n: int) -> bool:
        if n not in tokens:
            question = made[n] = build(n)
            tokens[n] = count(question.prompt, question.answer_prefix) + question.max_tokens
        return tokens[n] <= length

    def may_fit(n: int) -> bool:
        """Without building it, where that is clear from those that were built."""
        tokens_of = _estimate(tokens, n)
        return fits(n) if tokens_of is None or abs(tokens_of[0] - length) <= tokens_of[1] else tokens_of[0] < length

    if not fits(least):
        raise TaskError(f"{name} needs more than {length} tokens; ask for a longer --length")
    low = _longest(may_fit, least, most)
    if not fits(low) or (low != most and fits(low + 1)):
        low = _longest(fits, least, most)
    return made[low]


def _longest(fits: Callable[[int], bool], least: int, most: int | None) -> int:
    """The largest n that fits, where `least` does; at most `most`."""
    low, high = least, 2 * least
    while (most is None or high < most) and fits(high):
        low, high = high, 2 * high
    if most is not None and high >= most:
        if fits(most):
            return most
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _estimate(tokens: Mapping[int, int], n: int) -> tuple[float, float] | None:
    """Tokens of a question of n parts, on a line through the two nearest that are known, and how far off that may be:
    a tenth of the way from there. None where no line that rises is known, or n is."""
    if len(tokens) < 2 or n in tokens:
        return None
    one, other = sorted(tokens, key=lambda known: abs(known - n))[:2]
    per_part = (tokens[other] - tokens[one]) / (other - one)
    if per_part <= 0:
        return None
    way = per_part * (n - one)
    return tokens[one] + way, abs(way) / 10 + tokens[one] / 100
