"""The length of a question: the longest that fits, found with few questions made."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from swaa_local.tasks.base import Question, TaskError, sized

_rng = random.Random(0)
UNEVEN = list(itertools.accumulate((_rng.randint(3, 31) for _ in range(10_000)), initial=40))
SHAPES: dict[str, Callable[[int], int]] = {
    "even": lambda n: 40 + 17 * n,
    "uneven": lambda n: UNEVEN[n],
    "quadratic": lambda n: 40 + n * n // 10,
    "in steps": lambda n: 40 + 300 * (n // 25),
    "late": lambda n: 40 + n + (20 * (n - 150) if n > 150 else 0),
}


def question(n: int) -> Question:
    return Question(prompt="x" * n, references=(), metric="all", max_tokens=10, answer_prefix="")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [100, 150, 1000, 4999, 5000, 5001])
@pytest.mark.parametrize("most", [None, 8, 120, 128])
def test_it_is_the_longest_that_fits(shape, length, most):
    found = sized("task", question, length, lambda prompt, _prefix: shape(len(prompt)), least=1, most=most)
    fitting = [n for n in range(1, 1 + (most or 5000)) if shape(n) + 10 <= length]
    assert len(found.prompt) == max(fitting)


def test_questions_that_are_clearly_too_short_or_too_long_are_not_made():
    made = []
    sized("task", lambda n: made.append(n) or question(n), 16000, lambda prompt, _: 40 + 17 * len(prompt), least=1)
    assert len(made) == len(set(made)) <= 9
    assert max(made) < 1.1 * (16000 - 50) / 17


def test_too_short_a_length_is_an_error():
    with pytest.raises(TaskError, match="task needs more than 56 tokens"):
        sized("task", question, 56, lambda prompt, _: 40 + 17 * len(prompt), least=1)
