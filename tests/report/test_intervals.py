"""Wilson's interval against published values, and the paired one against its own promise."""

from __future__ import annotations

import random

import pytest

from swaa_local.report.intervals import paired, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, table I, method 3; and the closed forms at 0 and n.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilsons_interval(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_paired_intervals_hold_the_truth_as_often_as_they_say():
    """Differences of right answers, as two schedules give them: mostly 0, here and there -1 or 1."""
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        differences = [rng.choices((-1.0, 0.0, 1.0), weights=(0.12, 0.84, 0.04))[0] for _ in range(48)]
        interval = paired(differences)
        held += interval.low <= -0.08 <= interval.high
    assert 930 <= held <= 985


def test_a_few_equal_differences_are_no_certainty():
    few, many = paired([0.0] * 3), paired([0.0] * 48)
    assert few.value == many.value == 0
    assert few.low < -0.2
    assert -0.05 < many.low < 0
