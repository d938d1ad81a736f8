"""What a calibration measured and found. Pure: knows schedules and numbers; nothing of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from swaa_local.errors import SWAAError
from swaa_local.report.intervals import Interval, wilson
from swaa_local.report.machine import Machine
from swaa_local.schedule.config import Schedule

Scale = Literal["short", "long"]
"""Prompts of a quarter of the length, with windows of a quarter; and those of the full length."""

Evidence = Literal["check", "search", "short prompts"]
"""Answers to questions that the search has not seen; what the search saw at full length; short prompts alone."""


class CalibrateError(SWAAError, ValueError):
    """A calibration that cannot be made as asked, or whose result would mean nothing."""


@dataclass(frozen=True)
class Trial:
    """What one schedule did with the questions of one text.

    nll: mean negative log-likelihood of each answer's tokens. chance: that each answer is given word for word, sampled
    at temperature 0.3. right: whether it is given greedily. took_s: all of it. prefill_s, decode_token_s: None where
    they were not measured. The schedule's window is that of full length; on short prompts a quarter of it was run.
    """

    schedule: Schedule
    scale: Scale
    text: int
    nll: tuple[float, ...]
    chance: tuple[float, ...]
    right: tuple[bool, ...]
    prefill_s: float | None
    decode_token_s: float | None
    kv_bytes: int
    took_s: float

    def only(self, questions: Sequence[int]) -> Trial:
        """The same, with these of its questions."""
        return replace(
            self,
            nll=tuple(self.nll[i] for i in questions),
            chance=tuple(self.chance[i] for i in questions),
            right=tuple(self.right[i] for i in questions),
        )


@dataclass(frozen=True)
class Generated:
    """Answers of one schedule to the questions of one text. right: whether each has what was asked for."""

    schedule: Schedule
    text: int
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    prefill_s: float
    decode_token_s: float
    kv_bytes: int
    took_s: float


@dataclass(frozen=True)
class Candidate:
    """A schedule that was tried, and what is known of it.

    scale: of the prompts; short ones count only where there was no time for any of full length. quality: share of full
    attention's quality, with its interval. prefill, decode: times as shares of full attention's on the same texts; None
    where they were not measured. nll: mean over questions.
    """

    schedule: Schedule
    name: str
    quality: Interval
    nll: float
    right: int
    n: int
    prefill: float | None
    decode: float | None
    prefill_s: float | None
    decode_token_s: float | None
    kv_bytes: int
    n_texts: int
    scale: Scale = "long"


@dataclass(frozen=True)
class LayerGain:
    """What full attention in one layer brings: the answers' mean NLL falls by `gain`. alone: it was measured by itself,
    and not only in a group of layers."""

    layer: int
    gain: float
    alone: bool


@dataclass(frozen=True)
class Check:
    """Generated answers to questions that the search has not seen. difference: to full attention's share of right
    answers, paired; None for full attention itself. decode_token_s: seconds for a generated token."""

    schedule: Schedule
    name: str
    right: int
    n: int
    difference: Interval | None
    prefill_s: float
    prefill: float
    decode_token_s: float
    decode: float
    kv_bytes: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share of right answers."""
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class Calibration:
    """All of a calibration.

    chosen: as it is stored; None where nothing was tried. searched: the same with the tail that it had in the search.
    full, candidates: by short prompts where no schedule was tried on a long one. long_s: seconds that a schedule takes
    on a prompt of full length, as far as that is known. checks: full attention first, then in the order in which they
    were made. command: as the user gave it.
    """

    model: str
    length: int
    keep: float
    seed: int
    budget_s: float
    spent_s: float
    kinds: tuple[str, ...]
    digest: str
    full: Candidate
    candidates: tuple[Candidate, ...]
    gains: tuple[LayerGain, ...]
    gains_at: str
    chosen: Schedule | None
    searched: Schedule | None
    keeps: bool
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    long_s: float | None = None
    interrupted: bool = False
    machine: Machine | None = None
    on_gpu: bool = False
    command: str = ""

    @property
    def checked(self) -> Check | None:
        """The check of the chosen schedule."""
        return next((check for check in self.checks[1:] if check.schedule == self.chosen), None)

    @property
    def evidence(self) -> Evidence:
        """What the chosen schedule rests on."""
        if self.checked is not None:
            return "check"
        return "search" if self.full.scale == "long" else "short prompts"
