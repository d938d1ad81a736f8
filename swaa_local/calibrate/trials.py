"""Trials one after the other, none twice and none for which there is no time. Pure: a judge knows the model.

What is tried, `search` decides; what follows from it, `evidence`.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median
from typing import Protocol

from swaa_local.calibrate.evidence import Evidence, Limits, Space
from swaa_local.calibrate.results import Candidate, Scale, Trial
from swaa_local.schedule.config import Schedule


class Judge(Protocol):
    """What knows the model: the engine, or a simulation."""

    def trial(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
        """Try a schedule, with its window of full length, on a text of this scale."""
        ...

    def elapsed_s(self) -> float:
        """Since the calibration began."""
        ...


class Listener(Protocol):
    """What wants to know how a search goes."""

    def stage(self, what: str) -> None: ...

    def tried(self, schedule: Schedule, scale: Scale, best: Candidate | None, left_s: float) -> None: ...


class Trials:
    """Makes trials while there is time. evidence: all that were made. notes: what there was no time for."""

    def __init__(
        self, judge: Judge, space: Space, limits: Limits, listener: Listener | None = None, known: Iterable[Trial] = ()
    ) -> None:
        """known: trials that were made before, and that the judge counts as time that is over."""
        self._judge, self._limits, self._listener = judge, limits, listener
        self.evidence = Evidence(space, limits)
        self.evidence.take(list(known))
        self.notes: list[str] = []
        self._began = judge.elapsed_s()

    def stage(self, what: str) -> None:
        """Say what is done from now on."""
        if self._listener:
            self._listener.stage(what)

    def now_s(self) -> float:
        return self._judge.elapsed_s()

    @property
    def until_s(self) -> float:
        """When the search must be over, so that there is time for the check. Something to be checked comes first."""
        cost_s = self.cost("long")
        kept_s = self._limits.check_s(cost_s)
        if not self.evidence.tried() and self.now_s() + cost_s > self._limits.until_s - kept_s:
            kept_s = 0.0
        return self._limits.until_s - kept_s

    @property
    def long_fits(self) -> bool:
        """Whether there was or is time for one schedule on a prompt of full length."""
        fits = self.now_s() + self.cost("long") <= self._limits.until_s
        return bool(self._limits.n_long) and (fits or bool(self.evidence.tried()))

    def at(self, share: float, *, spare: int = 0) -> float:
        """When this share of the search's time is over; sooner, so that `spare` long trials can follow if any can."""
        until_s = self.until_s
        kept_s = spare * self.cost("long") if self.long_fits else 0.0
        return min(self._began + share * (until_s - self._began), until_s - kept_s)

    def left(self, until_s: float) -> float:
        """Seconds until then."""
        return until_s - self._judge.elapsed_s()

    def cost(self, scale: Scale) -> float:
        """Seconds of a trial, from those that were made; one bad moment of the machine does not count. Of short ones
        before any was made: a guess."""
        trials = [trial for (_, at, _), trial in self.evidence.trials.items() if at == scale]
        known = [trial for trial in trials if not trial.schedule.is_full][-12:]
        if trials:
            return median(trial.took_s for trial in (known if len(known) > 2 else trials))
        return 0.3 * self.cost("long") if scale == "short" else 0.0

    def _cost_of_full(self, scale: Scale) -> float:
        full = self.evidence.full_attention
        known = [
            trial.took_s for (schedule, at, _), trial in self.evidence.trials.items() if (schedule, at) == (full, scale)
        ]
        return max(self.cost(scale), fmean(known)) if known else self.cost(scale)

    def measure(self, schedule: Schedule, scale: Scale, text: int, until_s: float | None = None) -> Trial | None:
        """A trial, full attention's on this text before it; None if there is no time for it."""
        known, full = self.evidence.trials, self.evidence.full_attention
        key = (schedule, scale, text)
        if key in known:
            return known[key]
        needs_full = schedule != full and (full, scale, text) not in known
        needed_s = self.cost(scale) + (self._cost_of_full(scale) if needs_full else 0.0)
        if self.left(self.until_s if until_s is None else until_s) < needed_s:
            return None
        if needs_full:
            self._try(full, scale, text)
        return self._try(schedule, scale, text)

    def _try(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
        trial = self._judge.trial(schedule, scale, text)
        self.evidence.trials[schedule, scale, text] = trial
        if self._listener:
            self._listener.tried(schedule, scale, self.evidence.best(), self.left(self.until_s))
        return trial
