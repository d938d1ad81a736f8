"""Scores of answers and what can be concluded from them. Knows text and numbers only.

`all`, `part`: RULER's two measures (NVIDIA/RULER, scripts/eval/synthetic/constants.py): the share of the references
that occur in the answer, and whether any of them does; case does not matter. `contains`: any of them, for datasets
whose own judge is a language model. `value`: of the task `facts`, stricter (see `_only_value`).

The SWAA paper counts an answer as right or wrong: right is what has all that its measure asks for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Metric = Literal["all", "part", "contains", "value"]

_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Score:
    """share: of the references found, 0 to 1. correct: nothing is missing."""

    share: float
    correct: bool


MISS = Score(0.0, False)


def score(answer: str, references: Sequence[str], metric: Metric, distractors: Sequence[str] = ()) -> Score:
    """Score the text that follows the thinking. distractors: what the answer must not name, for `value`."""
    if metric == "value":
        right = _only_value(answer, references[0], distractors)
        return Score(float(right), right)
    text = _CONTROL.sub("\n", answer).strip().lower()
    found = [_CONTROL.sub("\n", reference).lower() in text for reference in references]
    share = float(any(found)) if metric in ("part", "contains") else sum(found) / len(found)
    return Score(share, share == 1.0)


def _only_value(answer: str, reference: str, distractors: Sequence[str]) -> bool:
    """The value stands there in whole words, and no other value of the document nor any other number of its length."""
    words = re.findall(r"\w+", answer.lower())
    wanted = re.findall(r"\w+", reference.lower())

    def has(value: list[str]) -> bool:
        return any(words[i : i + len(value)] == value for i in range(len(words) - len(value) + 1))

    others = [re.findall(r"\w+", distractor.lower()) for distractor in distractors]
    if not has(wanted) or any(has(other) for other in others if other != wanted):
        return False
    return not any(word.isdigit() and len(word) >= len(reference) and word != reference for word in words)
