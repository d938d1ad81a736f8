"""Which schedules are tried, on how many prompts, and which one is taken. Pure: what a schedule does, a judge tells.

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
from statistics import fmean, median
from typing import Protocol

from swaa_local.calibrate.results import Candidate, LayerGain, Scale, Trial
from swaa_local.report.intervals import Interval, paired
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.layers import format_layers
from swaa_local.schedule.text import in_words

CAUTION = 0.5
"""Standard errors that are taken off a measured quality: the best of many looks better than it is."""
_Z95 = 1.959964
_SAME_TIME = 0.03
"""Times that are closer than this are taken to be equal."""
_SHORT_ERROR = 0.05
"""How far quality on short prompts is off that on long ones, beside what is due to chance: a standard error."""
_EXPECTED = 2
"""Measurements of a time that what the others took counts for."""
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
class Space:
    """What may be chosen from. windows: in tokens, ascending, for prompts of full length. presets: as they are."""

    n_layer: int
    length: int
    windows: tuple[int, ...]
    sinks: int
    tail: int
    presets: tuple[Schedule, ...] = ()

    def schedule(self, full: Iterable[int], window: int) -> Schedule:
        kept = set(full)
        modes = tuple(LayerMode.FULL if i in kept else LayerMode.PREFILL for i in range(self.n_layer))
        return Schedule(window, self.sinks, modes, self.tail)


@dataclass(frozen=True)
class Limits:
    """keep: of full attention's quality. until_s: when the search must be over. n_long, n_short: texts that there are.
    memory: take the smallest cache instead of the fastest reading."""

    keep: float
    until_s: float
    n_long: int
    n_short: int
    memory: bool = False


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
        self._full = Schedule.full(space.n_layer)
        self._trials: dict[tuple[Schedule, Scale, int], Trial] = {}
        self._gains: dict[int, LayerGain] = {}
        self._gains_at = ""
        self._varied: dict[Schedule, Schedule] = {}  # other sinks or another tail, and what they were tried instead of
        self._notes: list[str] = []
        self._qualities: dict[tuple[Schedule, Scale, int], Interval] = {}  # by the number of texts
        self._candidates_known: dict[tuple[Schedule, int], Candidate] = {}
        self._shares: dict[Schedule, float] = {}
        self._slope_known = (-1, 0.5)  # by so many trials
        self._began = judge.elapsed_s()
        self._take(list(known))

    def _take(self, known: Sequence[Trial]) -> None:
        """Keep those that can be compared: with full attention on the same questions."""
        full = {(trial.scale, trial.text): trial for trial in known if trial.schedule == self._full}
        for trial in known:
            base = full.get((trial.scale, trial.text))
            if base is not None and len(base.nll) == len(trial.nll):
                self._trials[trial.schedule, trial.scale, trial.text] = trial
        for schedule in {schedule for schedule, _, _ in self._trials} - {self._full, *self._space.presets}:
            plain = replace(schedule, sinks=self._space.sinks, tail=self._space.tail if schedule.active_tail else 0)
            if schedule.sinks and schedule != plain and (plain, "long", 0) in self._trials:
                self._varied[schedule] = plain

    def run(self) -> Found:
        """Search until the time is over or nothing is left to be tried."""
        if self._measure(self._full, "long", 0) is None:
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
        candidates = sorted(self._tried(), key=lambda each: (each.prefill or math.inf, -each.quality.value))
        best = self._best()
        return Found(
            best,
            best is not None and self._is_kept(best),
            tuple(candidates),
            tuple(sorted(self._gains.values(), key=lambda gain: gain.layer)),
            self._gains_at,
            tuple(self._notes),
        )

    def _at(self, share: float) -> float:
        return self._began + share * (self._limits.until_s - self._began)

    def _left(self, until_s: float) -> float:
        return until_s - self._judge.elapsed_s()

    def _cost(self, scale: Scale) -> float:
        """Seconds of a trial, from those that were made. Of short ones before any was made: a guess."""
        trials = [trial for (_, at, _), trial in self._trials.items() if at == scale]
        known = [trial for trial in trials if not trial.schedule.is_full][-12:] or trials
        if known:
            return fmean(trial.took_s for trial in known)
        return 0.3 * self._cost("long") if scale == "short" else 0.0

    def _measure(self, schedule: Schedule, scale: Scale, text: int, until_s: float | None = None) -> Trial | None:
        """A trial, full attention's on this text before it; None if there is no time for it."""
        key = (schedule, scale, text)
        if key in self._trials:
            return self._trials[key]
        needs = 1 + (schedule != self._full and (self._full, scale, text) not in self._trials)
        if self._left(self._limits.until_s if until_s is None else until_s) < needs * self._cost(scale):
            return None
        if needs == 2:
            self._try(self._full, scale, text)
        return self._try(schedule, scale, text)

    def _try(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
        trial = self._judge.trial(schedule, scale, text)
        self._trials[schedule, scale, text] = trial
        if self._listener:
            self._listener.tried(schedule, scale, self._best(), self._left(self._limits.until_s))
        return trial

    def _pairs(self, schedule: Schedule, base: Schedule, scale: Scale) -> list[tuple[Trial, Trial]]:
        """Trials of both on the same texts."""
        n = self._limits.n_long if scale == "long" else self._limits.n_short
        both = [(self._trials.get((schedule, scale, i)), self._trials.get((base, scale, i))) for i in range(n)]
        return [(one, other) for one, other in both if one is not None and other is not None]

    def _quality(self, schedule: Schedule, scale: Scale = "long") -> Interval | None:
        """As a share of full attention's: the mean chance of the answers over its. None before there is a trial."""
        pairs = self._pairs(schedule, self._full, scale)
        if not pairs:
            return None
        key = (schedule, scale, len(pairs))
        if key not in self._qualities:
            self._qualities[key] = self._quality_of(pairs)
        return self._qualities[key]

    @staticmethod
    def _quality_of(pairs: list[tuple[Trial, Trial]]) -> Interval:
        whole = fmean(chance for _, full in pairs for chance in full.chance)
        differences = [(a - b) / whole for one, full in pairs for a, b in zip(one.chance, full.chance, strict=True)]
        interval = paired(differences)
        return Interval(1 + interval.value, 1 + interval.low, 1 + interval.high)

    def _candidate(self, schedule: Schedule) -> Candidate | None:
        quality, pairs = self._quality(schedule), self._pairs(schedule, self._full, "long")
        if quality is None:
            return None
        key = (schedule, len(pairs))
        if key not in self._candidates_known:
            self._candidates_known[key] = self._candidate_of(schedule, quality, pairs)
        return self._candidates_known[key]

    @staticmethod
    def _candidate_of(schedule: Schedule, quality: Interval, pairs: list[tuple[Trial, Trial]]) -> Candidate:
        trials = [trial for trial, _ in pairs]
        timed = [(a, b) for a, b in pairs if a.prefill_s is not None and b.prefill_s is not None]
        return Candidate(
            schedule=schedule,
            name=in_words(schedule),
            quality=quality,
            nll=fmean(nll for trial in trials for nll in trial.nll),
            right=sum(sum(trial.right) for trial in trials),
            n=sum(len(trial.right) for trial in trials),
            prefill=median(a.prefill_s / b.prefill_s for a, b in timed) if timed else None,  # type: ignore[operator]
            decode=median(a.decode_token_s / b.decode_token_s for a, b in timed) if timed else None,  # type: ignore[operator]
            prefill_s=median(a.prefill_s for a, _ in timed) if timed else None,  # type: ignore[type-var]
            decode_token_s=median(a.decode_token_s for a, _ in timed) if timed else None,  # type: ignore[type-var]
            kv_bytes=trials[-1].kv_bytes,
            n_texts=len(trials),
        )

    def full(self) -> Candidate | None:
        """Full attention, measured against itself."""
        return self._candidate(self._full)

    def _tried(self) -> list[Candidate]:
        known = {schedule for schedule, scale, _ in self._trials if scale == "long" and schedule != self._full}
        return [candidate for schedule in known if (candidate := self._candidate(schedule)) is not None]

    def _is_kept(self, candidate: Candidate) -> bool:
        return cautious(candidate.quality) >= self._limits.keep

    def _best(self) -> Candidate | None:
        """The fastest that keeps what is asked for, and of those as fast the one with the smallest cache and the best
        answers; the one with the best answers if none does. Other sinks or another tail if they are shown to be better.
        """
        tried = [each for each in self._tried() if each.schedule not in self._varied]
        if not tried:
            return None
        best = self._fittest(tried)
        varied = [each for v, base in self._varied.items() if base == best.schedule and (each := self._candidate(v))]
        better = [each for each in varied if self._is_worse(best.schedule, each.schedule)]
        return max([best, *better], key=lambda each: (each in better, cautious(each.quality)))

    def _fittest(self, tried: Sequence[Candidate]) -> Candidate:
        kept = [each for each in tried if self._is_kept(each)]
        if not kept:
            return max(tried, key=lambda each: cautious(each.quality))
        # One text alone is believed only where there was no time for a second.
        kept = [each for each in kept if each.n_texts >= min(2, self._limits.n_long)] or kept
        if self._limits.memory:
            return min(kept, key=lambda each: (each.kv_bytes, self._time(each.schedule), -each.quality.value))
        fastest = min(self._time(each.schedule) for each in kept)
        equal = [each for each in kept if self._time(each.schedule) <= fastest * (1 + _SAME_TIME)]
        return min(equal, key=lambda each: (each.kv_bytes, -cautious(each.quality)))

    # What may be expected

    def _time(self, schedule: Schedule) -> float:
        """Of prefill, as a share of full attention's: measured, and by the query-key pairs and what all others took,
        which one bad moment of the machine does not change."""
        timed = [
            a.prefill_s / b.prefill_s
            for a, b in self._pairs(schedule, self._full, "long")
            if a.prefill_s is not None and b.prefill_s is not None
        ]
        expected = 1 + self._slope() * (self._share(schedule) - 1)
        return (sum(timed) + _EXPECTED * expected) / (len(timed) + _EXPECTED)

    def _slope(self) -> float:
        """How much of a full prompt's time goes with its query-key pairs."""
        if self._slope_known[0] == len(self._trials):
            return self._slope_known[1]
        above = below = 0.0
        for (schedule, scale, text), trial in self._trials.items():
            full = self._trials.get((self._full, scale, text))
            if scale == "long" and full and full.prefill_s and trial.prefill_s and schedule != self._full:
                share = self._share(schedule) - 1
                above += share * (trial.prefill_s / full.prefill_s - 1)
                below += share * share
        slope = min(1.0, max(0.05, above / below)) if below else 0.5
        self._slope_known = (len(self._trials), slope)
        return slope

    def _share(self, schedule: Schedule) -> float:
        """Of full attention's query-key pairs."""
        if schedule not in self._shares:
            length = self._space.length
            whole = sum(self._full.prefill_pairs(length))
            self._shares[schedule] = sum(schedule.prefill_pairs(length)) / whole
        return self._shares[schedule]

    def _promise(self, schedule: Schedule) -> float:
        """The time that this may be expected to save: what it saves, times the chance that it keeps enough."""
        quality, error = self._quality(schedule), 0.0
        if quality is None:
            quality, error = self._quality(schedule, "short"), _SHORT_ERROR
        if quality is None:
            full, windows = schedule.layers(LayerMode.FULL), self._space.windows
            wide = sum(window < schedule.window for window in windows) / len(windows)
            brings = sum(max(0.0, gain.gain) for gain in self._gains.values())
            kept = sum(max(0.0, self._gain(layer)) for layer in full) / brings if brings else 0.0
            chance = min(0.9, 0.1 + 0.3 * wide + 0.4 * len(full) / self._space.n_layer + 0.4 * kept)
        else:
            spread = math.hypot((quality.high - quality.low) / (2 * _Z95), error)
            chance = 0.5 * (1 + math.erf((quality.value - self._limits.keep) / spread / math.sqrt(2)))
        return chance * max(0.01, 1 - self._time(schedule))

    def _is_hopeless(self, schedule: Schedule) -> bool:
        quality = self._quality(schedule)
        return quality is not None and quality.high < self._limits.keep

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
        new = sum((each, "long", 0) not in self._trials for each in alone)
        fits = new * self._cost("long") <= max(0.0, self._left(until_s))
        scale: Scale = "long" if fits or not self._limits.n_short else "short"
        self._stage(f"what each layer brings, on {scale} prompts")
        if self._measure(none, scale, 0, until_s) is None:
            self._notes.append("layers were not ranked: there was no time for it")
            return
        self._gains_at = f"{scale} prompts, window {window if scale == 'long' else window // 4}"
        known = sum((each, scale, 0) in self._trials for each in alone[1:])
        affordable = known + int(max(0.0, self._left(until_s)) / self._cost(scale))
        if affordable < min(n, _LEAST_SCREEN):
            self._notes.append("layers were not ranked: there was no time for it")
            return
        size = _group_size(n, affordable)
        groups = [tuple(range(i, min(n, i + size))) for i in range(0, n, size)]
        self._gain_of_groups(groups, none, scale, 0, until_s)
        if size > 1:
            ranked = sorted(groups, key=lambda group: -sum(self._gain(layer) for layer in group))
            for group in ranked:
                if self._left(until_s) < len(group) * self._cost(scale):
                    break
                self._gain_of_groups([(layer,) for layer in group], none, scale, 0, until_s)
            grouped = n - sum(gain.alone for gain in self._gains.values())
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
            pairs = self._pairs(kept, none, scale)
            gain = fmean(b - a for one, base in pairs for a, b in zip(one.nll, base.nll, strict=True)) / len(group)
            for layer in group:
                if len(group) == 1 or layer not in self._gains:
                    self._gains[layer] = LayerGain(layer, gain, len(group) == 1)

    def _gain(self, layer: int) -> float:
        return self._gains[layer].gain if layer in self._gains else 0.0

    def ranking(self) -> list[int]:
        """Layers, the one that brings most first."""
        return sorted(self._gains, key=lambda layer: (-self._gain(layer), layer))

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
            candidates.sort(key=lambda each: -self._promise(each))
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
            candidates = [each for each in done if not self._is_hopeless(each)]
            candidates.sort(key=lambda each: -self._promise(each))
            candidates = candidates[: max(3, -(-len(candidates) // 2))]
            if not candidates or self._left(until_s) < self._cost("long"):
                break

    def _refine(self, until_s: float) -> None:
        """What lies beside the best, until nothing there is better."""
        self._stage("what lies beside the best")
        while True:
            best = self._best()
            if best is None:
                return
            untried = [each for each in self._beside(best) if (each, "long", 0) not in self._trials]
            if not untried:
                return
            for schedule in sorted(untried, key=lambda each: -self._promise(each)):
                for text in range(max(1, best.n_texts)):
                    if self._measure(schedule, "long", text, until_s) is None:
                        self._notes.append("the search beside the best was cut short, for lack of time")
                        return
                    if self._is_hopeless(schedule):
                        break
            after = self._best()
            if after is None or after.schedule == best.schedule:
                return

    def _beside(self, best: Candidate) -> list[Schedule]:
        schedule, windows, ranked = best.schedule, self._space.windows, self.ranking()
        full = set(schedule.layers(LayerMode.FULL))
        near: list[Schedule] = []
        at = windows.index(schedule.window) if schedule.window in windows else 0
        if self._is_kept(best):
            weakest = sorted(full, key=self._gain)[:4]
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
        best = self._best()
        if best is None or not self._is_kept(best):
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
            losses[group] = fmean(trial.nll) - fmean(self._trials[base, "long", 0].nll)
        kept = base
        for group in sorted(losses, key=lambda each: losses[each]):
            tried = _sliding(kept, group)
            for text in range(best.n_texts):
                if self._measure(tried, "long", text, until_s) is None:
                    return
                if self._is_hopeless(tried):
                    break
            candidate = self._candidate(tried)
            if candidate is None or candidate.n_texts < best.n_texts or not self._is_kept(candidate):
                continue
            if not self._is_worse(tried, base):
                kept = tried

    def _vary(self, until_s: float) -> None:
        """Other sinks and tails for the best; they cost and save little, so they are taken only if answers are shown to
        be better."""
        best = self._best()
        if best is None or self._left(until_s) < self._cost("long"):
            return
        base = best.schedule
        self._stage("other sinks and tails")
        sinks = [n for n in (4, 16, 4 * base.sinks) if n != base.sinks and n < base.window]
        tails = [n for n in (base.tail // 2, 2 * base.tail) if n] if base.active_tail else []
        for varied in [replace(base, sinks=n) for n in sinks] + [replace(base, tail=n) for n in tails]:
            self._varied[varied] = base
            for text in range(best.n_texts):
                if self._measure(varied, "long", text, until_s) is None:
                    self._notes.append("not all other sinks and tails were tried, for lack of time")
                    return
                if self._is_worse(varied, base) or self._is_hopeless(varied):
                    break

    def _is_worse(self, schedule: Schedule, base: Schedule) -> bool:
        """Whether the answers are shown to be worse."""
        pairs = self._pairs(schedule, base, "long")
        return paired([a - b for one, two in pairs for a, b in zip(one.chance, two.chance, strict=True)]).high < 0

    def _confirm(self, until_s: float) -> None:
        """The best must hold on all texts, as far as there is time; what does not is the best no more."""
        self._stage("the best on more texts")
        while True:
            best = self._best()
            if best is None:
                return
            if best.n_texts >= self._limits.n_long:
                # One that promises more may have been tried on a single text.
                others = [each for each in self._tried() if each.n_texts == 1 and self._is_kept(each)]
                better = [each for each in others if self._time(each.schedule) < 0.97 * self._time(best.schedule)]
                if not better:
                    return
                best = max(better, key=lambda each: self._promise(each.schedule))
            if self._measure(best.schedule, "long", best.n_texts, until_s) is None:
                return


def cautious(measured: Interval, sign: int = 1) -> float:
    """A measured value less `CAUTION` standard errors; sign -1: with so many added, to be cautious about a loss."""
    return measured.value - sign * CAUTION * (measured.high - measured.low) / (2 * _Z95)


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


def describe_gains(gains: Sequence[LayerGain], n: int = 5) -> str:
    """The layers that bring most, in words."""
    ranked = sorted(gains, key=lambda gain: -gain.gain)[:n]
    return format_layers(gain.layer for gain in ranked)
