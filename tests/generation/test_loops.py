"""An answer that repeats itself is noticed, and one that only looks like it is not."""

from __future__ import annotations

import random

import pytest

from swaa_local.generation.loops import LoopGuard, repeated


@pytest.mark.parametrize("period", [1, 2, 7, 59, 240, 512])
def test_repetition_of_any_length_is_noticed_with_its_length(period):
    dice = random.Random(period)
    start = [dice.randrange(1000) for _ in range(333)]
    phrase = [1000 + i for i in range(period)]
    guard = LoopGuard()
    seen = next(i for i, token in enumerate(start + phrase * 300) if guard.saw(token))
    assert guard.period == period
    assert seen - len(start) <= max(240, 4 * period) + 16


def test_what_is_no_loop():
    dice = random.Random(0)
    words = [dice.randrange(30) for _ in range(5000)]  # few words, in any order
    counting = [token for i in range(500) for token in (1, 2, 1000 + i, 3)]  # a list with its numbers
    ruler = words[:500] + [7] * 200 + words[500:900]
    refrain = (words[:90] + [5] * 40) * 3
    for tokens in (words, counting, ruler, refrain):
        guard = LoopGuard()
        assert not any(guard.saw(token) for token in tokens)


def test_the_shortest_run_counts():
    assert repeated([1, 2] * 300) == 2
    assert repeated([1] * 300) == 1
    assert repeated([1, 2] * 100) is None
