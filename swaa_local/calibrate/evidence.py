"""What trials tell of schedules: quality and times against full attention's, which one is best, what others promise.

Pure: knows trials; what is tried, `search` decides. Everything is compared on the same questions, in pairs.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from swaa_local.calibrate.results import Candidate, LayerGain, Scale, Trial
from swaa_local.report.intervals import Interval, paired
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.schedule.text import in_words

CAUTION = 0.5
"""Standard errors that are taken off a measured quality: the best of many looks better than it is."""
_Z95 = 1.959964
_SAME_TIME = 0.03
"""Times that are closer than this are taken to be equal."""
_SHORT_ERROR = 0.05
"""How far quality on short prompts is off that on long ones, beside what is due to chance: a standard error."""
_OTHER_WINDOW = 0.25
"""What a schedule with another window counts for where short prompts are corrected by long ones."""
_EXPECTED = 2
"""Measurements of a time that what the others took counts for."""


@dataclass(frozen=True)
class Space:
    """What may be chosen from. model: whose layers. windows: in tokens, ascending, for prompts of full length. presets:
    as they are."""

    model: ModelLayers
    length: int
    windows: tuple[int, ...]
    sinks: int
    tail: int
    presets: tuple[Schedule, ...] = ()

    def schedule(self, full: Iterable[int], window: int) -> Schedule:
        kept = set(full)
        modes = [LayerMode.FULL] * self.model.n_layer
        for layer in self.model.sliding:
            modes[layer] = LayerMode.FULL if layer in kept else LayerMode.PREFILL
        return Schedule(window, self.sinks, tuple(modes), self.tail, self.model)


@dataclass(frozen=True)
class Limits:
    """keep: of full attention's quality. until_s: when the search and the check must be over. n_long, n_short: texts
    that there are; no long ones if there is no time for them. memory: take the smallest cache instead of the fastest
    reading. check_s: seconds to be kept for the check, given those of a trial at full length."""

    keep: float
    until_s: float
    n_long: int
    n_short: int
    memory: bool = False
    check_s: Callable[[float], float] = lambda _trial_s: 0.0


class Evidence:
    """Trials, and what follows from them. trials: by schedule, scale and text. gains: of layers. varied: schedules with
    other sinks or another tail, and what they were tried instead of."""

    def __init__(self, space: Space, limits: Limits) -> None:
        self._space, self._limits = space, limits
        self.full_attention = Schedule.full(space.model)
        self.trials: dict[tuple[Schedule, Scale, int], Trial] = {}
        self.gains: dict[int, LayerGain] = {}
        self.varied: dict[Schedule, Schedule] = {}
        self._qualities: dict[tuple[Schedule, Scale, int], Interval] = {}  # by the number of texts
        self._candidates_known: dict[tuple[Schedule, Scale, int], Candidate] = {}
        self._shares: dict[Schedule, float] = {}
        self._slope_known = (-1, 0.5)  # by so many trials

    def take(self, known: Sequence[Trial]) -> None:
        """Keep those that can be compared: with full attention on the same questions."""
        full = {(trial.scale, trial.text): trial for trial in known if trial.schedule == self.full_attention}
        for trial in known:
            base = full.get((trial.scale, trial.text))
            if base is not None and len(base.nll) == len(trial.nll):
                self.trials[trial.schedule, trial.scale, trial.text] = trial
        for schedule in {schedule for schedule, _, _ in self.trials} - {self.full_attention, *self._space.presets}:
            plain = replace(schedule, sinks=self._space.sinks, tail=self._space.tail if schedule.active_tail else 0)
            if schedule.sinks and schedule != plain and (plain, "long", 0) in self.trials:
                self.varied[schedule] = plain

    def pairs(self, schedule: Schedule, base: Schedule, scale: Scale) -> list[tuple[Trial, Trial]]:
        """Trials of both on the same texts."""
        n = self._limits.n_long if scale == "long" else self._limits.n_short
        both = [(self.trials.get((schedule, scale, i)), self.trials.get((base, scale, i))) for i in range(n)]
        return [(one, other) for one, other in both if one is not None and other is not None]

    def quality(self, schedule: Schedule, scale: Scale = "long") -> Interval | None:
        """As a share of full attention's: the mean chance of the answers over its. None before there is a trial."""
        pairs = self.pairs(schedule, self.full_attention, scale)
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

    def candidate(self, schedule: Schedule, scale: Scale = "long") -> Candidate | None:
        quality, pairs = self.quality(schedule, scale), self.pairs(schedule, self.full_attention, scale)
        if quality is None:
            return None
        key = (schedule, scale, len(pairs))
        if key not in self._candidates_known:
            self._candidates_known[key] = self._candidate_of(schedule, quality, pairs, scale)
        return self._candidates_known[key]

    @staticmethod
    def _candidate_of(
        schedule: Schedule, quality: Interval, pairs: list[tuple[Trial, Trial]], scale: Scale
    ) -> Candidate:
        trials = [trial for trial, _ in pairs]
        timed = [(a, b) for a, b in pairs if a.prefill_s is not None and b.prefill_s is not None]
        if scale == "short":  # these times tell nothing of long prompts
            timed = []
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
            scale=scale,
        )

    def tried(self, scale: Scale = "long") -> list[Candidate]:
        known = {schedule for schedule, at, _ in self.trials if at == scale and schedule != self.full_attention}
        return [candidate for schedule in known if (candidate := self.candidate(schedule, scale)) is not None]

    @property
    def scale(self) -> Scale:
        """Of the prompts that schedules are judged by: short ones only if none was tried on a long one."""
        return "long" if self.tried() else "short"

    def is_kept(self, candidate: Candidate) -> bool:
        return cautious(candidate.quality) >= self._limits.keep

    def best(self) -> Candidate | None:
        """The fastest that keeps what is asked for, and of those as fast the one with the smallest cache and the best
        answers; the one with the best answers if none does. Other sinks or another tail if they are shown to be better.
        By short prompts if none was tried on a long one."""
        tried = [each for each in self.tried(self.scale) if each.schedule not in self.varied]
        if not tried:
            return None
        best = self._fittest(tried)
        varied = [each for v, base in self.varied.items() if base == best.schedule and (each := self.candidate(v))]
        better = [each for each in varied if self.is_worse(best.schedule, each.schedule)]
        return max([best, *better], key=lambda each: (each in better, cautious(each.quality)))

    def _fittest(self, tried: Sequence[Candidate]) -> Candidate:
        kept = [each for each in tried if self.is_kept(each)]
        if not kept:
            return max(tried, key=lambda each: cautious(each.quality))
        # One text alone is believed only where there was no time for a second.
        kept = [each for each in kept if each.n_texts >= min(2, self._limits.n_long)] or kept
        if self._limits.memory:
            return min(kept, key=lambda each: (each.kv_bytes, self.time(each.schedule), -each.quality.value))
        fastest = min(self.time(each.schedule) for each in kept)
        equal = [each for each in kept if self.time(each.schedule) <= fastest * (1 + _SAME_TIME)]
        return min(equal, key=lambda each: (each.kv_bytes, -cautious(each.quality)))

    def time(self, schedule: Schedule) -> float:
        """Of prefill, as a share of full attention's: measured, and by the query-key pairs and what all others took,
        which one bad moment of the machine does not change."""
        timed = [
            a.prefill_s / b.prefill_s
            for a, b in self.pairs(schedule, self.full_attention, "long")
            if a.prefill_s is not None and b.prefill_s is not None
        ]
        expected = 1 + self._slope() * (self._share(schedule) - 1)
        return median([*timed, *[expected] * _EXPECTED])

    def _slope(self) -> float:
        """How much of a full prompt's time goes with its query-key pairs."""
        if self._slope_known[0] == len(self.trials):
            return self._slope_known[1]
        found = []  # slope, and how much it tells
        for (schedule, scale, text), trial in self.trials.items():
            full = self.trials.get((self.full_attention, scale, text))
            if scale == "long" and full and full.prefill_s and trial.prefill_s and schedule != self.full_attention:
                saved = 1 - self._share(schedule)
                if saved > 0:
                    found.append(((1 - trial.prefill_s / full.prefill_s) / saved, saved))
        slope = min(1.0, max(0.05, _weighted_median(found))) if found else 0.5
        self._slope_known = (len(self.trials), slope)
        return slope

    def _share(self, schedule: Schedule) -> float:
        """Of full attention's query-key pairs."""
        if schedule not in self._shares:
            length = self._space.length
            whole = sum(self.full_attention.prefill_pairs(length))
            self._shares[schedule] = sum(schedule.prefill_pairs(length)) / whole
        return self._shares[schedule]

    def promise(self, schedule: Schedule) -> float:
        """The time that this may be expected to save: what it saves, times the chance that it keeps enough."""
        return self._chance(schedule) * max(0.01, 1 - self.time(schedule))

    def _chance(self, schedule: Schedule) -> float:
        """That it keeps enough: by its own trials; by those of others that see more, or less, if it has none."""
        if (quality := self.quality(schedule)) is not None:
            return self._chance_by(quality, 0.0)
        if (quality := self.quality(schedule, "short")) is not None:
            bias = self._bias(schedule.window)
            quality = Interval(quality.value + bias, quality.low + bias, quality.high + bias)
            chance = self._chance_by(quality, _SHORT_ERROR)
        else:
            full, windows = schedule.layers(LayerMode.FULL), self._space.windows
            wide = sum(window < schedule.window for window in windows) / len(windows)
            brings = sum(max(0.0, gain.gain) for gain in self.gains.values())
            kept = sum(max(0.0, self.gain(layer)) for layer in full) / brings if brings else 0.0
            chance = min(0.9, 0.1 + 0.3 * wide + 0.4 * len(full) / len(self._space.model.sliding) + 0.4 * kept)
        for other in {tried for tried, scale, _ in self.trials if scale == "long"} - {self.full_attention}:
            if (quality := self.quality(other)) is None:
                continue
            if _sees_all_of(other, schedule):
                chance = min(chance, self._chance_by(quality, 0.0))
            elif _sees_all_of(schedule, other):
                chance = max(chance, self._chance_by(quality, 0.0))
        return chance

    def _bias(self, window: int) -> float:
        """How much more than on short prompts schedules have kept on long ones; those with this window count most."""
        above = 0.0
        below = 1.0  # as if one more had kept the same on both
        for other in {tried for tried, scale, _ in self.trials if scale == "long"} - {self.full_attention}:
            short, long = self.quality(other, "short"), self.quality(other)
            if short is not None and long is not None:
                weight = 1.0 if other.window == window else _OTHER_WINDOW
                above += weight * (long.value - short.value)
                below += weight
        return above / below

    def _chance_by(self, quality: Interval, error: float) -> float:
        spread = math.hypot((quality.high - quality.low) / (2 * _Z95), error)
        return 0.5 * (1 + math.erf((quality.value - self._limits.keep) / spread / math.sqrt(2)))

    def is_hopeless(self, schedule: Schedule) -> bool:
        quality = self.quality(schedule)
        return quality is not None and quality.high < self._limits.keep

    def gain(self, layer: int) -> float:
        return self.gains[layer].gain if layer in self.gains else 0.0

    def ranking(self) -> list[int]:
        """Layers, the one that brings most first."""
        return sorted(self.gains, key=lambda layer: (-self.gain(layer), layer))

    def is_worse(self, schedule: Schedule, base: Schedule) -> bool:
        """Whether the answers are shown to be worse."""
        pairs = self.pairs(schedule, base, "long")
        return paired([a - b for one, two in pairs for a, b in zip(one.chance, two.chance, strict=True)]).high < 0


def _sees_all_of(one: Schedule, other: Schedule) -> bool:
    """Whether every token sees under `one` at least what it sees under `other`."""
    if one.window < other.window or one.sinks < other.sinks or one.tail < other.tail:
        return False
    # Full attention's mode has the smallest number, and a window at all times the greatest.
    return all(a <= b for a, b in zip(one.layer_modes, other.layer_modes, strict=True))


def _weighted_median(values: list[tuple[float, float]]) -> float:
    """values: each with its weight."""
    values = sorted(values)
    below = list(itertools.accumulate(weight for _, weight in values))
    return values[bisect.bisect_left(below, below[-1] / 2)][0]


def cautious(measured: Interval, sign: int = 1) -> float:
    """A measured value less `CAUTION` standard errors; sign -1: with so many added, to be cautious about a loss."""
    return measured.value - sign * CAUTION * (measured.high - measured.low) / (2 * _Z95)
