"""Which schedules are tried, and on how many prompts. Pure: what a schedule does, a judge tells; what follows from it,
`evidence`.

The order: which layers matter, one at a time or in groups first (`_screen`); whole schedules in a race where half goes
on after each text (`_race`); what lies beside the best (`_refine`); which layers may slide while they decode too
(`_slide`); other sinks and tails (`_vary`). Everything is compared on the same questions, in pairs. docs/calibrate.md
describes it for users.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Protocol

from swaa_local.calibrate.evidence import Evidence, Limits, Space
from swaa_local.calibrate.results import Candidate, LayerGain, Scale, Trial
from swaa_local.schedule.config import LayerMode, Schedule

_SHARES = {"screen": 0.3, "race": 0.65, "refine": 0.72, "confirm": 0.8, "slide": 0.94}
"""Of the search's time, when each stage must be done; sliding has the rest."""
_SPARE = 40  # trials; with time for so many, one may show something
_LEAST_SCREEN = 5  # trials


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
        self._judge, self._space, self._limits, self._listener = judge, space, limits, listener
        self._known = Evidence(space, limits)
        self._known.take(list(known))
        self._gains_at = ""
        self._notes: list[str] = []
        self._began = judge.elapsed_s()

    def run(self) -> Found:
        """Search until the time is over or nothing is left to be tried."""
        if self._measure(self._known.full_attention, "long", 0) is None:
            self._notes.append("there was no time to measure anything")
            return self.found()
        self._screen(self._at(_SHARES["screen"]))
        self._race(self._candidates(), self._at(_SHARES["race"]))
        self._refine(self._at(_SHARES["refine"]))
        self._confirm(self._at(_SHARES["confirm"]))
        self._slide(self._at(_SHARES["slide"]))
        self._vary(self._limits.until_s)
        self._confirm(self._limits.until_s)
        return self.found()

    # What was measured

    def found(self) -> Found:
        candidates = sorted(self._known.tried(), key=lambda each: (each.prefill or math.inf, -each.quality.value))
        best = self._known.best()
        return Found(
            best,
            best is not None and self._known.is_kept(best),
            tuple(candidates),
            tuple(sorted(self._known.gains.values(), key=lambda gain: gain.layer)),
            self._gains_at,
            tuple(self._notes),
        )

    def _at(self, share: float) -> float:
        return self._began + share * (self._limits.until_s - self._began)

    def _left(self, until_s: float) -> float:
        return until_s - self._judge.elapsed_s()

    def _cost(self, scale: Scale) -> float:
        """Seconds of a trial, from those that were made. Of short ones before any was made: a guess."""
        trials = [trial for (_, at, _), trial in self._known.trials.items() if at == scale]
        known = [trial for trial in trials if not trial.schedule.is_full][-12:] or trials
        if known:
            return fmean(trial.took_s for trial in known)
        return 0.3 * self._cost("long") if scale == "short" else 0.0

    def _measure(self, schedule: Schedule, scale: Scale, text: int, until_s: float | None = None) -> Trial | None:
        """A trial, full attention's on this text before it; None if there is no time for it."""
        key = (schedule, scale, text)
        if key in self._known.trials:
            return self._known.trials[key]
        needs = 1 + (
            schedule != self._known.full_attention
            and (self._known.full_attention, scale, text) not in self._known.trials
        )
        if self._left(self._limits.until_s if until_s is None else until_s) < needs * self._cost(scale):
            return None
        if needs == 2:
            self._try(self._known.full_attention, scale, text)
        return self._try(schedule, scale, text)

    def _try(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
        trial = self._judge.trial(schedule, scale, text)
        self._known.trials[schedule, scale, text] = trial
        if self._listener:
            self._listener.tried(schedule, scale, self._known.best(), self._left(self._limits.until_s))
        return trial

    def full(self) -> Candidate | None:
        """Full attention, measured against itself."""
        return self._known.candidate(self._known.full_attention)

    # Stages

    def _stage(self, what: str) -> None:
        if self._listener:
            self._listener.stage(what)

    def _screen(self, until_s: float) -> None:
        """What each layer brings by itself, with windows in all others."""
        n = self._space.n_layer
        window = self._space.windows[len(self._space.windows) // 2]
        none = self._space.schedule((), window)
        alone = [none, *(self._space.schedule((layer,), window) for layer in range(n))]
        new = sum((each, "long", 0) not in self._known.trials for each in alone)
        fits = new * self._cost("long") <= max(0.0, self._left(until_s))
        scale: Scale = "long" if fits or not self._limits.n_short else "short"
        self._stage(f"what each layer brings, on {scale} prompts")
        if self._measure(none, scale, 0, until_s) is None:
            self._notes.append("layers were not ranked: there was no time for it")
            return
        self._gains_at = f"{scale} prompts, window {window if scale == 'long' else window // 4}"
        known = sum((each, scale, 0) in self._known.trials for each in alone[1:])
        affordable = known + int(max(0.0, self._left(until_s)) / self._cost(scale))
        if affordable < min(n, _LEAST_SCREEN):
            self._notes.append("layers were not ranked: there was no time for it")
            return
        size = _group_size(n, affordable)
        groups = [tuple(range(i, min(n, i + size))) for i in range(0, n, size)]
        self._gain_of_groups(groups, none, scale, 0, until_s)
        if size > 1:
            ranked = sorted(groups, key=lambda group: -sum(self._known.gain(layer) for layer in group))
            for group in ranked:
                if self._left(until_s) < len(group) * self._cost(scale):
                    break
                self._gain_of_groups([(layer,) for layer in group], none, scale, 0, until_s)
            grouped = n - sum(gain.alone for gain in self._known.gains.values())
            self._notes.append(f"{grouped} of {n} layers were measured only in groups of {size}, for lack of time")
            return
        n_texts = self._limits.n_long if scale == "long" else self._limits.n_short
        for text in range(1, n_texts):
            if self._left(until_s) < (n + 2) * self._cost(scale):
                break
            self._gain_of_groups(groups, none, scale, text, until_s)

    def _gain_of_groups(
        self, groups: Sequence[tuple[int, ...]], none: Schedule, scale: Scale, text: int, until_s: float
    ) -> None:
        for group in groups:
            kept = self._space.schedule(group, none.window)
            if self._measure(none, scale, text, until_s) is None or self._measure(kept, scale, text, until_s) is None:
                return
            pairs = self._known.pairs(kept, none, scale)
            gain = fmean(b - a for one, base in pairs for a, b in zip(one.nll, base.nll, strict=True)) / len(group)
            for layer in group:
                if len(group) == 1 or layer not in self._known.gains:
                    self._known.gains[layer] = LayerGain(layer, gain, len(group) == 1)

    def ranking(self) -> list[int]:
        """Layers, the one that brings most first."""
        return sorted(self._known.gains, key=lambda layer: (-self._known.gain(layer), layer))

    def _candidates(self) -> list[Schedule]:
        """Whole schedules worth a trial: none, the best few, an eighth, a quarter, half; periodic ones; presets."""
        n, ranked = self._space.n_layer, self.ranking()
        sets: dict[tuple[int, ...], None] = {(): None}
        if ranked:
            for k in (1, 2, 3, 4, round(n / 8), round(n / 4), round(n / 2)):
                if 0 < k < n:
                    sets[tuple(sorted(ranked[:k]))] = None
        for step in (2, 4):
            for start in range(step):
                if len(periodic := tuple(range(start, n, step))) < n:
                    sets[periodic] = None
        made = {self._space.schedule(full, window): None for window in self._space.windows for full in sets}
        return list(made | dict.fromkeys(self._space.presets))

    def _race(self, candidates: list[Schedule], until_s: float) -> None:
        """After each text, those that promise most go on to the next: half of them, and none that is hopeless."""
        rungs: list[tuple[Scale, int]] = [("long", i) for i in range(self._limits.n_long)]
        whole = len(candidates) * self._cost("long")
        if whole > 0.6 * self._left(until_s) and self._limits.n_short:
            rungs.insert(0, ("short", 0))
        naive = Schedule(self._space.windows[-1], 0, (LayerMode.ALWAYS,) * self._space.n_layer)
        if self._left(until_s) > _SPARE * self._cost("long"):
            self._measure(naive, "long", 0)  # to show what the rest of a schedule is for
        for number, (scale, text) in enumerate(rungs):
            candidates.sort(key=lambda each: -self._known.promise(each))
            self._stage(f"{len(candidates)} schedules on {scale} prompt {text + 1}")
            last = number == len(rungs) - 1
            rung_end = self._judge.elapsed_s() + self._left(until_s) * (1.0 if last else 0.55)
            done: list[Schedule] = []
            for schedule in candidates:
                # At least two are to be compared, however long that takes.
                end = self._limits.until_s if number == 0 and len(done) < 2 else rung_end
                if self._measure(schedule, scale, text, end) is not None:
                    done.append(schedule)
            if len(done) < len(candidates):
                self._notes.append(
                    f"{len(candidates) - len(done)} of {len(candidates)} schedules were not tried on {scale} prompt "
                    f"{text + 1}, for lack of time"
                )
            candidates = [each for each in done if not self._known.is_hopeless(each)]
            candidates.sort(key=lambda each: -self._known.promise(each))
            candidates = candidates[: max(3, -(-len(candidates) // 2))]
            if not candidates or self._left(until_s) < self._cost("long"):
                break

    def _refine(self, until_s: float) -> None:
        """What lies beside the best, until nothing there is better."""
        self._stage("what lies beside the best")
        while True:
            best = self._known.best()
            if best is None:
                return
            untried = [each for each in self._beside(best) if (each, "long", 0) not in self._known.trials]
            if not untried:
                return
            for schedule in sorted(untried, key=lambda each: -self._known.promise(each)):
                for text in range(max(1, best.n_texts)):
                    if self._measure(schedule, "long", text, until_s) is None:
                        self._notes.append("the search beside the best was cut short, for lack of time")
                        return
                    if self._known.is_hopeless(schedule):
                        break
            after = self._known.best()
            if after is None or after.schedule == best.schedule:
                return

    def _beside(self, best: Candidate) -> list[Schedule]:
        schedule, windows, ranked = best.schedule, self._space.windows, self.ranking()
        full = set(schedule.layers(LayerMode.FULL))
        near: list[Schedule] = []
        at = windows.index(schedule.window) if schedule.window in windows else 0
        if self._known.is_kept(best):
            weakest = sorted(full, key=self._known.gain)[:4]
            near += [self._space.schedule(full - {layer}, schedule.window) for layer in weakest]
            if at > 0:
                near.append(self._space.schedule(full, windows[at - 1]))
                near += [self._space.schedule(full | {layer}, windows[at - 1]) for layer in _others(ranked, full)[:2]]
            if full and weakest:
                near += [
                    self._space.schedule((full - {weakest[0]}) | {layer}, schedule.window)
                    for layer in _others(ranked, full)[:3]
                ]
        else:
            near += [self._space.schedule(full | {layer}, schedule.window) for layer in _others(ranked, full)[:4]]
            if at + 1 < len(windows):
                near.append(self._space.schedule(full, windows[at + 1]))
        return [each for each in dict.fromkeys(near) if not each.is_full]

    def _slide(self, until_s: float) -> None:
        """Which windowed layers may slide while they decode too: they need no cache beyond the window."""
        best = self._known.best()
        if best is None or not self._known.is_kept(best):
            return
        base = best.schedule
        layers = base.layers(LayerMode.PREFILL)
        affordable = int(self._left(until_s) / max(1e-9, self._cost("long")))
        if affordable < 4 or len(layers) < 2:
            self._notes.append("which layers may slide while decoding was not tried, for lack of time")
            return
        self._stage("which layers may slide while decoding")
        n_groups = min(len(layers), max(2, affordable // 3))
        bounds = [round(len(layers) * i / n_groups) for i in range(n_groups + 1)]
        groups = [layers[a:b] for a, b in pairwise(bounds)]
        losses = {}
        for group in groups:
            if (trial := self._measure(_sliding(base, group), "long", 0, until_s)) is None:
                break
            losses[group] = fmean(trial.nll) - fmean(self._known.trials[base, "long", 0].nll)
        kept = base
        for group in sorted(losses, key=lambda each: losses[each]):
            tried = _sliding(kept, group)
            for text in range(best.n_texts):
                if self._measure(tried, "long", text, until_s) is None:
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
        if best is None or self._left(until_s) < self._cost("long"):
            return
        base = best.schedule
        self._stage("other sinks and tails")
        sinks = [n for n in (4, 16, 4 * base.sinks) if n != base.sinks and n < base.window]
        tails = [n for n in (base.tail // 2, 2 * base.tail) if n] if base.active_tail else []
        for varied in [replace(base, sinks=n) for n in sinks] + [replace(base, tail=n) for n in tails]:
            self._known.varied[varied] = base
            for text in range(best.n_texts):
                if self._measure(varied, "long", text, until_s) is None:
                    self._notes.append("not all other sinks and tails were tried, for lack of time")
                    return
                if self._known.is_worse(varied, base) or self._known.is_hopeless(varied):
                    break

    def _confirm(self, until_s: float) -> None:
        """The best must hold on all texts, as far as there is time; what does not is the best no more."""
        self._stage("the best on more texts")
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
            if self._measure(best.schedule, "long", best.n_texts, until_s) is None:
                return


def _group_size(n_layer: int, affordable: int) -> int:
    """Layers that are tried together, where so many trials can be afforded: as few as leave time for those of the best
    group one by one, or at least for all groups."""
    sizes = range(1, n_layer)
    enough = [size for size in sizes if -(-n_layer // size) + (size if size > 1 else 0) <= affordable]
    return next(iter(enough), next(size for size in (*sizes, n_layer) if -(-n_layer // size) <= affordable))


def _others(ranked: Sequence[int], full: set[int]) -> list[int]:
    return [layer for layer in ranked if layer not in full]


def _sliding(schedule: Schedule, layers: Iterable[int]) -> Schedule:
    """The schedule with these layers windowed at all times."""
    chosen = set(layers)
    modes = tuple(LayerMode.ALWAYS if i in chosen else mode for i, mode in enumerate(schedule.layer_modes))
    return replace(schedule, layer_modes=modes, tail=schedule.tail if LayerMode.PREFILL in modes else 0)
