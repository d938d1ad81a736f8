"""How many tokens to draft before the next pass of full attention: from what was accepted, and what passes cost.

Knows numbers and token ids; nothing of the engine.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any, Literal

import numpy as np

from swaa_local.errors import OutOfRange
from swaa_local.schedule.config import MAX_DRAFT

Speculate = bool | Literal["auto"]
"""Whether drafts are made: wherever there can be some, never, or only where they are measured to pay."""

MIN_TOKENS = 1024
"""Tokens in the cache before `auto` tries drafts: below, a pass costs what a draft does."""

_LONGEST_MATCH = 24  # longer ones are compared no further
_LOOKED_AT = 64  # of the places where it does, the last ones
_MARGIN = 1.05  # drafts that promise less than this are not made
_KNOWN = 4  # passes of one token that are measured before any draft: the first are often slow
_REFRESHED = 16  # passes with drafts, after which one of one token is measured again
_CREDIT = 2.0  # decoded tokens whose time drafts may lose at a depth that is new
_INTEREST = 0.01  # so much more for each token that is decoded without
_MOST_CREDIT = 5.0  # that drafts earn by what they save
_PROBE_CREDIT = 1.0  # that a draft needs which is not known to pay
_PROBE = 3  # tokens of the first draft
_MEMORY = 30.0  # drafted tokens that the acceptance is averaged over
_SAME_DEPTH = 1.3  # costs are measured anew where the cache has grown or shrunk by more


class Source(Enum):
    """Where the tokens of a draft are from."""

    WINDOW = "the model, reading through its window"
    REPEATS_2 = "the text, where it repeats two tokens"
    REPEATS_3 = "where it repeats three"
    REPEATS_4 = "where it repeats four to eleven"
    REPEATS_12 = "where it repeats twelve or more"


_REPEATS = {2: Source.REPEATS_2, 3: Source.REPEATS_3, 4: Source.REPEATS_4, 12: Source.REPEATS_12}
"""By how many tokens are repeated at least: the more, the surer is what follows."""

_PRIOR = {
    Source.WINDOW: 0.85,
    Source.REPEATS_2: 0.3,
    Source.REPEATS_3: 0.5,
    Source.REPEATS_4: 0.8,
    Source.REPEATS_12: 0.96,
}
"""Shares of drafted tokens that are accepted, until a generation's own are known (docs/results.md)."""


def check_speculate(value: Any) -> Speculate:
    """The same value. Raises `OutOfRange` for any other than True, False and "auto"."""
    if value is True or value is False or (isinstance(value, str) and value == "auto"):
        return value  # type: ignore[return-value]
    raise OutOfRange(f'speculate is {value!r}; it can be True, False or "auto"')


def look_up(tokens: np.ndarray) -> tuple[Source, np.ndarray]:
    """What followed where the text last said what `tokens` (1-D) end with; the longest match wins. Often empty."""
    places = np.flatnonzero(tokens[:-1] == tokens[-1:]) + 1  # few, also of a long text
    places = _repeating(tokens, places, 2)
    longer = _repeating(tokens, places, 3)
    places = longer if len(longer) else places
    if not len(places):
        return Source.REPEATS_2, tokens[:0]
    places = places[-_LOOKED_AT:]
    lengths = _common_suffixes(tokens, places)
    length = lengths.max()
    place = places[lengths == length][-1]
    source = _REPEATS[max(least for least in _REPEATS if least <= length)]
    return source, tokens[place:][:MAX_DRAFT]


def _repeating(tokens: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """Those of the places behind n tokens that equal the last n; the last n - 1 are known to."""
    places = places[places >= n]
    return places[tokens[places - n] == tokens[-n]] if len(places) else places


def _common_suffixes(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many tokens before each of these places equal the last ones."""
    back = np.arange(1, min(_LONGEST_MATCH, len(tokens) - 1) + 1)
    at = places[:, None] - back
    same = (tokens[np.maximum(at, 0)] == tokens[len(tokens) - back]) & (at >= 0)
    return np.where(same.all(axis=1), len(back), same.argmin(axis=1))


class Acceptance:
    """The share of drafted tokens that were what full attention chose, the last ones counting most."""

    def __init__(self, prior: float) -> None:
        self._trials, self._accepted = 4.0, 4.0 * prior

    @property
    def rate(self) -> float:
        return self._accepted / self._trials

    def add(self, accepted: bool) -> None:
        keep = min(1.0, _MEMORY / self._trials)
        self._trials = keep * self._trials + 1
        self._accepted = keep * self._accepted + accepted


class Costs:
    """Seconds of a pass by its number of tokens, and of a drafted token, at about the same depth of the cache."""

    def __init__(self) -> None:
        self._depth = 0
        self._passes: dict[int, deque[float]] = {}
        self._medians: list[tuple[int, float]] = []  # of passes, by their number of tokens
        self._drafted: deque[float] = deque(maxlen=5)
        self.since_decode = 0  # passes
        self.credit = _CREDIT  # decoded tokens whose time drafts may lose

    def at(self, depth: int) -> Costs:
        """This, emptied if it was measured at another depth."""
        if not self._depth / _SAME_DEPTH <= depth <= self._depth * _SAME_DEPTH:
            self._depth, self.credit = depth, _CREDIT
            self._passes.clear()
            self._medians.clear()
            self._drafted.clear()
        return self

    def add_pass(self, n_tokens: int, seconds: float) -> None:
        self.since_decode = 0 if n_tokens == 1 else self.since_decode + 1
        # All is compared with passes of one token, so these are known best.
        self._passes.setdefault(n_tokens, deque(maxlen=15 if n_tokens == 1 else 5)).append(seconds)
        self._medians = [each for each in self._medians if each[0] != n_tokens]
        bisect.insort(self._medians, (n_tokens, median(self._passes[n_tokens])))

    def add_drafted(self, seconds: float) -> None:
        """Of one token."""
        self._drafted.append(seconds)

    @property
    def know_decode(self) -> bool:
        return len(self._passes.get(1, ())) >= _KNOWN

    @property
    def know_drafts(self) -> bool:
        return bool(self._drafted)

    @property
    def know_passes(self) -> bool:
        return len(self._passes) > 1

    def drafted_s(self) -> float:
        return median(self._drafted) if self._drafted else 0.0

    def pass_s(self, n_tokens: int) -> float:
        """Measured, or on the line through the measured ones beside it. A pass of two may cost more than one of three:
        a longer one is never taken for cheaper than a shorter one."""
        known = self._medians
        i = bisect.bisect_left(known, (n_tokens, 0.0))
        if i < len(known) and known[i][0] == n_tokens:
            return known[i][1]
        if len(known) < 2:
            return math.inf
        (n0, s0), (n1, s1) = (known[i - 1], known[i]) if 0 < i < len(known) else (known[0], known[-1])
        return s0 + max(0.0, s1 - s0) * (n_tokens - n0) / (n1 - n0)


class NominalCosts(Costs):
    """Costs that were not measured, for drafts that do not depend on the time: a decoded token is 1."""

    def drafted_s(self) -> float:
        return 0.4

    def pass_s(self, n_tokens: int) -> float:
        return 0.9 + 0.1 * n_tokens


@dataclass(frozen=True)
class Plan:
    """A draft: n tokens at most of this source. n is 0 where there is to be none."""

    source: Source
    n: int


class DraftControl:
    """Plans the drafts of one generation. costs: None for `speculate=True`, which does not look at the time."""

    def __init__(self, costs: Costs | None) -> None:
        self._measured = costs
        self._drafting_s = self._spent_s = 0.0  # on the draft that is made, and with its pass
        self._acceptance = {source: Acceptance(prior) for source, prior in _PRIOR.items()}

    def plan(self, depth: int, limits: dict[Source, int]) -> Plan:
        """The next draft. limits: the most tokens that each source can give now."""
        none = Plan(Source.WINDOW, 0)
        if self._measured is None:
            return self._best(NominalCosts(), limits)[1]
        if depth < MIN_TOKENS or not any(limits.values()):
            return none
        costs = self._measured.at(depth)
        is_due = costs.know_decode and costs.since_decode < _REFRESHED
        plan = self._plan_measured(costs, limits) if is_due and costs.credit >= 0 else none
        if not plan.n:
            costs.credit = min(_MOST_CREDIT, costs.credit + _INTEREST)
        return plan

    def _plan_measured(self, costs: Costs, limits: dict[Source, int]) -> Plan:
        may_probe = costs.credit >= _PROBE_CREDIT
        if not costs.know_passes or (limits[Source.WINDOW] and not costs.know_drafts):
            source = max(limits, key=lambda source: (min(limits[source], _PROBE), source is Source.WINDOW))
            return Plan(source, min(_PROBE, limits[source]) if may_probe else 0)
        speed, plan = self._best(costs, limits)
        pays = speed * costs.pass_s(1) >= _MARGIN
        return plan if pays or may_probe else Plan(plan.source, 0)

    def _best(self, costs: Costs, limits: dict[Source, int]) -> tuple[float, Plan]:
        """The draft that promises the most tokens a second, and how many."""
        rated = self._rated(costs, limits)
        speed, source, n = max(rated, key=lambda each: each[0], default=(0.0, Source.WINDOW, 0))
        return speed, Plan(source, n)

    def _rated(self, costs: Costs, limits: dict[Source, int]) -> Iterator[tuple[float, Source, int]]:
        for source, limit in limits.items():
            each_s = costs.drafted_s() if source is Source.WINDOW else 0.0
            rate = self._acceptance[source].rate
            expected = right = 1.0  # that the tokens so far are accepted
            for n in range(1, limit + 1):
                right *= rate
                expected += right
                yield expected / (n * each_s + costs.pass_s(n + 1)), source, n

    def add_drafted(self, n: int, seconds: float) -> None:
        """n tokens were drafted through the window, in so many seconds."""
        self._drafting_s = seconds
        if self._measured is not None and n:
            self._measured.add_drafted(seconds / n)

    def add_pass(self, n_tokens: int, seconds: float) -> None:
        """Full attention has read so many tokens at once."""
        self._spent_s, self._drafting_s = self._drafting_s + seconds, 0.0
        if self._measured is not None:
            self._measured.add_pass(n_tokens, seconds)

    def add_outcome(self, source: Source, n_accepted: int, n_drafted: int) -> None:
        """So many of a draft's tokens were chosen; the one after them was not, unless all were."""
        for _ in range(n_accepted):
            self._acceptance[source].add(True)
        if n_accepted < n_drafted:
            self._acceptance[source].add(False)
        costs = self._measured
        if costs is None or not n_drafted or not costs.know_decode:
            return
        costs.credit = min(_MOST_CREDIT, costs.credit + n_accepted + 1 - self._spent_s / costs.pass_s(1))
