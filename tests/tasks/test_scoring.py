"""Scores at their edges."""

from __future__ import annotations

import pytest

from swaa_local.tasks.scoring import MISS, Score, score


@pytest.mark.parametrize(
    ("answer", "references", "share"),
    [
        ("", ["a"], 0),
        ("They are Alpha, beta.", ["alpha", "BETA"], 1),
        ("alpha", ["alpha", "beta", "gamma", "delta"], 0.25),
        ("12345678", ["2345"], 1),  # a part of a word counts, as in RULER
        ("one\ttwo", ["one\ntwo"], 1),  # control characters become line breaks
        ("one\ttwo", ["one\ttwo"], 1),
    ],
)
def test_all_is_the_share_of_references_and_right_if_complete(answer, references, share):
    assert score(answer, references, "all") == Score(share, share == 1)


@pytest.mark.parametrize("metric", ["part", "contains"])
def test_part_asks_for_one_of_them(metric):
    assert score("the Nile", ["nile", "river nile"], metric) == Score(1.0, True)
    assert score("the Rhine", ["nile", "river nile"], metric) == MISS


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("68288", "68288", True),
        ("The parking permit of Ahmed is 68288.", "68288", True),
        ("**68288**", "68288", True),
        ("Iron Kettle", "iron kettle", True),
        ("In section 2 it is 68288", "68288", True),  # a short number is no other value
        ("", "68288", False),
        ("6828", "68288", False),
        ("682880", "68288", False),
        ("68288 or 11111", "68288", False),
        ("68288, not 99999", "68288", False),
        ("iron kettles", "iron kettle", False),
        ("kettle iron", "iron kettle", False),
        ("iron kettle, or blue lamp", "iron kettle", False),
        ("00000", "00000", True),
    ],
)
def test_a_value_must_stand_alone(answer, reference, right):
    distractors = ["11111", "blue lamp", "iron"] if reference != "iron kettle" else ["11111", "blue lamp"]
    assert score(answer, [reference], "value", distractors) == Score(float(right), right)
