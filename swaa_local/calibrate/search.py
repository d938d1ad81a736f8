"""Which schedules are tried, and on how many prompts. Pure: what a schedule does, a judge tells; what follows from it,
`evidence`.

The order: which layers matter, one at a time or in groups first (`layer_gains`); whole schedules in a race where half
goes on after each text (`_race`); what lies beside the best (`_refine`); which layers may slide while they decode too
(`_slide`); other sinks and tails (`_vary`). Everything is compared on the same questions, in pairs. docs/calibrate.md
describes it for users.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from swaa_local.calibrate.candidates import beside, sliding, varied, whole
from swaa_local.calibrate.evidence import Limits, Space
from swaa_local.calibrate.layer_gains import screen
from swaa_local.calibrate.results import Candidate, LayerGain, Scale, Trial
from swaa_local.calibrate.trials import Judge, Listener, Trials
from swaa_local.schedule.config import LayerMode, Schedule, SWAAConfig

_SHARES = {"screen": 0.3, "race": 0.65, "refine": 0.72, "confirm": 0.8, "slide": 0.94}
_MEMORY_SHARES = {"screen": 0.25, "race": 0.45, "refine": 0.5, "confirm": 0.55, "slide": 0.94}
"""Of the search's time, when each stage must be done. For the smallest cache it is sliding that counts."""
_LEAST_LONG = 3
"""Trials at full length that are kept when layers are ranked and schedules compared on short prompts."""
_UNKEPT_SHARE = 0.88  # instead of the one of `refine`, while nothing keeps enough
_FIRST_SHARE = 0.35  # of the race's time, for whole schedules on short prompts
_LEAST_VARIED = 6  # trials; with less time the best on more texts is worth more than other sinks
_SPARE = 40  # trials; with time for so many, one may show something


@dataclass(frozen=True)
class Found:
    """chosen: None if nothing was tried. keeps: whether it keeps what was asked for, as far as the search saw."""

    chosen: Candidate | None
    keeps: bool
    candidates: tuple[Candidate, ...]
    gains: tuple[LayerGain, ...]
    gains_at: str
    notes: tuple[str, ...]


class Search:
    """One search. `run` it; `found` says at any time what it has come to."""

    def __init__(
        self,
        judge: Judge,
        space: Space,
        limits: Limits,
        listener: Listener | None = None,
        known: Iterable[Trial] = (),
    ) -> None:
        """known: trials that were made before, and that the judge counts as time that is over."""
        self._space, self._limits = space, limits
        self._trials = Trials(judge, space, limits, listener, known)
        self._known = self._trials.evidence
        self._gains_at = ""

    def run(self) -> Found:
        """Search until the time is over or nothing is left to be tried."""
        if self._limits.n_long:
            self._trials.measure(self._known.full_attention, "long", 0)
        until, shares = self._trials.at, _MEMORY_SHARES if self._limits.memory else _SHARES
        until_s = until(shares["screen"], spare=_LEAST_LONG)
        self._gains_at = screen(self._trials, self._space, self._limits, until_s)
        candidates = whole(self._space, self._known.ranking())
        if not self._trials.long_fits:
            self._race(list(candidates), self._limits.until_s)
        else:
            self._race(list(candidates), until(shares["race"]))
            self._refine(candidates, until(shares["refine"]))
            self._confirm(until(shares["confirm"]))
            self._slide(until(shares["slide"]))
            self._vary(self._trials.until_s)
            self._confirm(self._trials.until_s)
        return self.found()

    # What was measured

    def found(self) -> Found:
        tried = self._known.tried(self._known.scale)
        candidates = sorted(tried, key=lambda each: (each.prefill or math.inf, -each.quality.value))
        best = self._known.best()
        return Found(
            best,
            best is not None and self._known.is_kept(best),
            tuple(candidates),
            tuple(sorted(self._known.gains.values(), key=lambda gain: gain.layer)),
            self._gains_at,
            tuple(self._trials.notes),
        )

    def full(self) -> Candidate | None:
        """Full attention, measured against itself, on the prompts that schedules are judged by; None if on none."""
        full = self._known.full_attention
        return self._known.candidate(full, self._known.scale) or self._known.candidate(full)

    @property
    def long_s(self) -> float | None:
        """Seconds of a trial at full length; None if none was made."""
        return self._trials.cost("long") or None

    # Stages

    def _race(self, candidates: list[Schedule], until_s: float) -> None:
        """After each text, those that promise most go on to the next: half of them, and none that is hopeless."""
        trials, long_fits = self._trials, self._trials.long_fits
        rungs: list[tuple[Scale, int]] = [("long", i) for i in range(self._limits.n_long if long_fits else 0)]
        if self._limits.n_short and len(candidates) * trials.cost("long") > 0.6 * trials.left(until_s):
            rungs = [("short", 0), *rungs]
        if not long_fits:
            rungs = [("short", i) for i in range(self._limits.n_short)]
        naive = SWAAConfig(self._space.windows[-1]).schedule(self._space.model)
        if long_fits and trials.left(until_s) > _SPARE * trials.cost("long"):
            trials.measure(naive, "long", 0)  # to show what the rest of a schedule is for
        for number, (scale, text) in enumerate(rungs):
            trials.stage(f"{len(candidates)} schedules on {scale} prompt {text + 1}")
            share = 1.0 if number == len(rungs) - 1 else _FIRST_SHARE if scale == "short" and long_fits else 0.55
            rung_end = trials.now_s() + trials.left(until_s) * share
            if scale == "short" and long_fits:
                rung_end = min(rung_end, trials.at(1.0, spare=_LEAST_LONG))
            done = self._rung(candidates, scale, text, rung_end)
            if len(done) < len(candidates):
                trials.notes.append(
                    f"{len(candidates) - len(done)} of {len(candidates)} schedules were not tried on {scale} prompt "
                    f"{text + 1}, for lack of time"
                )
            if scale == "long" or not long_fits:
                candidates = done
            candidates = [each for each in candidates if not self._known.is_hopeless(each)]
            candidates.sort(key=lambda each: -self._known.promise(each))
            if scale == "long" or len(done) > 1:
                candidates = candidates[: max(3, -(-len(candidates) // 2))]
            if not candidates or (scale == "long" and trials.left(until_s) < trials.cost("long")):
                break

    def _rung(self, candidates: Iterable[Schedule], scale: Scale, text: int, until_s: float) -> list[Schedule]:
        """Those for which there was time on this text; what promises most is tried first, after all that is known."""
        trials, left, done = self._trials, list(candidates), list[Schedule]()
        while left:
            schedule = max(left, key=self._known.promise)
            left.remove(schedule)
            # At least two are to be compared, however long that takes.
            is_first = len(self._known.tried(scale)) < 2 and (scale == "long" or not trials.long_fits)
            end_s = max(until_s, trials.until_s) if is_first else until_s
            if trials.measure(schedule, scale, text, end_s) is not None:
                done.append(schedule)
        return done

    def _refine(self, candidates: Sequence[Schedule], until_s: float) -> None:
        """What lies beside the best, what promises most first, until all of it was tried. While nothing keeps enough,
        also those of the candidates for which the race had no time, for as long as there is any."""
        self._trials.stage("what lies beside the best")
        while True:
            best = self._known.best()
            if best is None:
                return
            near, end_s = beside(best, self._space, self._known), until_s
            if not self._known.is_kept(best):
                end_s = self._trials.at(_UNKEPT_SHARE)
                near += [each for each in candidates if each not in near]
            untried = [each for each in near if (each, "long", 0) not in self._known.trials]
            if not untried:
                return
            schedule = max(untried, key=self._known.promise)
            for text in range(max(1, best.n_texts)):
                if self._trials.measure(schedule, "long", text, end_s) is None:
                    self._trials.notes.append("the search beside the best was cut short, for lack of time")
                    return
                if self._known.is_hopeless(schedule):
                    break

    def _slide(self, until_s: float) -> None:
        """Which windowed layers may slide while they decode too: they need no cache beyond the window."""
        best = self._known.best()
        if best is None or not self._known.is_kept(best):
            return
        base = best.schedule
        layers = base.layers(LayerMode.PREFILL)
        affordable = int(self._trials.left(until_s) / max(1e-9, self._trials.cost("long")))
        if affordable < 4 or len(layers) < 2:
            self._trials.notes.append("which layers may slide while decoding was not tried, for lack of time")
            return
        self._trials.stage("which layers may slide while decoding")
        n_groups = min(len(layers), max(2, affordable // 3))
        bounds = [round(len(layers) * i / n_groups) for i in range(n_groups + 1)]
        groups = [layers[a:b] for a, b in pairwise(bounds)]
        losses = {}
        for group in groups:
            if (trial := self._trials.measure(sliding(base, group), "long", 0, until_s)) is None:
                break
            losses[group] = fmean(trial.nll) - fmean(self._known.trials[base, "long", 0].nll)
        kept = base
        for group in sorted(losses, key=lambda each: losses[each]):
            tried = sliding(kept, group)
            for text in range(best.n_texts):
                if self._trials.measure(tried, "long", text, until_s) is None:
                    return
                if self._known.is_hopeless(tried):
                    break
            candidate = self._known.candidate(tried)
            if candidate is None or candidate.n_texts < best.n_texts or not self._known.is_kept(candidate):
                continue
            if not self._known.is_worse(tried, base):
                kept = tried

    def _vary(self, until_s: float) -> None:
        """Other sinks and tails for the best; they cost and save little, so they are taken only if answers are shown to
        be better."""
        best = self._known.best()
        if best is None:
            return
        if self._trials.left(until_s) < _LEAST_VARIED * self._trials.cost("long"):
            self._trials.notes.append("other sinks and tails were not tried, for lack of time")
            return
        base = best.schedule
        self._trials.stage("other sinks and tails")
        for other in varied(base):
            self._known.varied[other] = base
            for text in range(best.n_texts):
                if self._trials.measure(other, "long", text, until_s) is None:
                    self._trials.notes.append("not all other sinks and tails were tried, for lack of time")
                    return
                if self._known.is_worse(other, base) or self._known.is_hopeless(other):
                    break

    def _confirm(self, until_s: float) -> None:
        """The best must hold on all texts, as far as there is time; what does not is the best no more."""
        self._trials.stage("the best on more texts")
        while True:
            best = self._known.best()
            if best is None:
                return
            if best.n_texts >= self._limits.n_long:
                # One that promises more may have been tried on a single text.
                others = [each for each in self._known.tried() if each.n_texts == 1 and self._known.is_kept(each)]
                better = [
                    each for each in others if self._known.time(each.schedule) < 0.97 * self._known.time(best.schedule)
                ]
                if not better:
                    return
                best = max(better, key=lambda each: self._known.promise(each.schedule))
            if self._trials.measure(best.schedule, "long", best.n_texts, until_s) is None:
                return
