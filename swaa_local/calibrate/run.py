"""`swaa-local calibrate`: what a request says, turned into questions, a search, a check, and what they found.

The flow alone: `material` makes the questions, `measure` asks the model, `search` decides what is tried.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from swaa_local import __version__
from swaa_local.calibrate.asking import Asking
from swaa_local.calibrate.check import Checks
from swaa_local.calibrate.evidence import Limits, Space
from swaa_local.calibrate.haystack import Haystack, read_haystack
from swaa_local.calibrate.log import CalibrateLog
from swaa_local.calibrate.material import SHORTER, Material
from swaa_local.calibrate.measure import Bench
from swaa_local.calibrate.request import CalibrateRequest, check_memory, config, plan
from swaa_local.calibrate.results import CalibrateError, Calibration, Scale, Trial
from swaa_local.calibrate.search import Search
from swaa_local.calibrate.watch import SILENT, Watch
from swaa_local.engine.context_length import gpu_layers
from swaa_local.engine.machine import describe_machine
from swaa_local.model_file.adapter import adapter_remarks, read_adapter
from swaa_local.model_file.model_info import ModelInfo, read_model_info
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.cost import pad_cells
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.schedule.presets import PRESETS

_SINKS = 100
_TAILS = 64, 128
"""In the search, whose questions are short, and as it is checked and stored. A longer one only lets more tokens see the
whole text, but every question of the search would take longer by it."""
_LONGER_READING, _LONGER_ASKING = 6.0, 2.5
"""Times that a prompt of full length takes what a short one does: to read, and to answer its questions; about."""


def calibrate(request: CalibrateRequest, watch: Watch = SILENT) -> Calibration:
    """Search and check. Ctrl-C ends either, and what is known by then is returned, as `interrupted`.

    Raises `CalibrateError`, and what `Llama` raises; what was measured is in the log.
    """
    from swaa_local.engine.adapter import AdapterWarning

    clock = _Clock()
    info = read_model_info(request.model)
    if info.unsupported is not None:
        raise CalibrateError(f"no schedule can apply: {info.unsupported}")
    haystack = read_haystack(request.data, watch.note) if request.data else Haystack()
    length, windows, own = plan(request, info, haystack, watch)
    for note in own.left_out if own else ():
        watch.note(note)
    check_memory(request, info, length)
    if request.engine.lora is not None:
        for remark in adapter_remarks(read_adapter(request.engine.lora.path), request.model, []):
            watch.note(remark)
    with (
        warnings.catch_warnings(),
        CalibrateLog(request.log, config(request, length, windows), info.layers) as log,
        closing(Bench(request.model, pad_cells(length), request.engine, watch.on_prefill)) as bench,
    ):
        clock.before_s = log.took_before_s
        warnings.simplefilter("ignore", AdapterWarning)  # it runs with one schedule after the other here
        if not bench.has_template:
            watch.note("this model has no chat template, so ChatML is used; a base model answers poorly")
        material = Material(bench, log, haystack, own, length, windows[-1], request.seed)
        run = _Run(request, info, length, windows, material, bench, log, watch, clock)
        try:
            return run.all()
        finally:
            watch.end()


class _Clock:
    """Seconds since the calibration began, and those that what is in the log had taken before."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.before_s = 0.0

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began + self.before_s


class _Judge:
    """The engine as the search sees it."""

    def __init__(self, material: Material, bench: Bench, log: CalibrateLog, watch: Watch, clock: _Clock) -> None:
        self._material, self._bench, self._log, self._watch, self._clock = material, bench, log, watch, clock

    def elapsed_s(self) -> float:
        return self._clock.elapsed_s()

    def trial(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
        if (known := self.known(schedule, scale, text)) is not None:
            return known
        self._watch.trying(schedule, f"{scale} prompt {text + 1}")
        started_s = self._clock.elapsed_s()
        prompts = self._material.prompts("search", scale, text)
        trial = self._bench.trial(_at_scale(schedule, scale), scale, text, prompts)
        trial = replace(trial, schedule=schedule, took_s=self._clock.elapsed_s() - started_s)
        self._log.add_trial(trial)
        return trial

    def known(self, schedule: Schedule, scale: Scale, text: int) -> Trial | None:
        """A trial of the log, with the questions that are still asked."""
        trial = self._log.trials.get((schedule, scale, text))
        kept = None if trial is None else self._material.kept(scale, text, len(trial.nll))
        return None if trial is None or kept is None else trial.only(kept)

    def all_known(self, scales: Sequence[Scale]) -> list[Trial]:
        """All of the log's that can be compared."""
        known = [self.known(*each) for each in self._log.trials if each[1] in scales]
        return [trial for trial in known if trial is not None]


@dataclass
class _Run:
    """One calibration, from the first question to the last."""

    request: CalibrateRequest
    info: ModelInfo
    length: int
    windows: tuple[int, ...]
    material: Material
    bench: Bench
    log: CalibrateLog
    watch: Watch
    clock: _Clock
    notes: list[str] = field(default_factory=list)
    _long_s: float | None = None

    def all(self) -> Calibration:
        judge = _Judge(self.material, self.bench, self.log, self.watch, self.clock)
        full = Schedule.full(self.info.layers)
        self.watch.stage("which questions full attention answers")
        n_short = self.material.n_short
        asking = Asking(self.material, self.bench, self.log, self.length, self._say)
        if not self.material.has_own:
            asking.choose(full, "short" if n_short else "long")
        n_long = self.material.n_long if self._has_time_for_long(judge, full, n_short) else 0
        if n_long:
            first = judge.trial(full, "long", 0)
            if not self.material.has_own:
                asking.drop(first)
        asked = judge.trial(full, "long" if n_long else "short", 0).nll
        checks = Checks(
            self.material,
            self.bench,
            self.log,
            self.watch,
            n_asked=len(asked),
            keep=self.request.keep,
            budget_s=self.request.budget_s,
            elapsed_s=self.clock.elapsed_s,
            final=self._final,
            say=self._say,
        )
        space = Space(
            self.info.layers,
            self.length,
            self.windows,
            min(_SINKS, self.windows[0] // 4),
            self._tails()[0],
            _presets(self.info.layers, self.length),
        )
        limits = Limits(
            self.request.keep,
            self.request.budget_s,
            n_long,
            n_short,
            self.request.memory,
            checks.kept_s if n_long else lambda _trial_s: 0.0,
        )
        scales: tuple[Scale, ...] = ("short", "long") if n_long else ("short",)
        search = Search(judge, space, limits, self.watch, judge.all_known(scales))
        interrupted = False
        try:
            search.run()
            found = search.found()
            if found.chosen is not None and found.chosen.scale == "long":
                periodic = [space.schedule(space.model.sliding[i::2], self.windows[-1]) for i in (0, 1)]
                checks.make(full, found, periodic, search.long_s or 0.0)
        except KeyboardInterrupt:
            interrupted = True
        return self._result(search, checks, interrupted)

    def _has_time_for_long(self, judge: _Judge, full: Schedule, n_short: int) -> bool:
        """Whether full attention and one schedule can be tried at full length, as a short prompt lets one expect."""
        if (full, "long", 0) in self.log.trials or not n_short:
            return True
        short = judge.trial(full, "short", 0)
        reading_s = short.prefill_s or short.took_s
        self._long_s = _LONGER_READING * reading_s + _LONGER_ASKING * (short.took_s - reading_s)
        left_s = self.request.budget_s - self.clock.elapsed_s()
        return 2 * self._long_s <= left_s

    def _tails(self) -> tuple[int, int]:
        """Tokens of the tail in the search, and as it is stored. The user's questions may be long."""
        longest = self.material.longest_question if self.material.has_own else 0
        most = max(1, self.windows[0] // 2)
        return min(most, max(_TAILS[0], longest)), min(most, max(_TAILS[1], longest))

    def _final(self, schedule: Schedule) -> Schedule:
        """As it is checked and stored."""
        return replace(schedule, tail=max(schedule.tail, self._tails()[1])) if schedule.active_tail else schedule

    # What came of it

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.watch.note(note)

    def _result(self, search: Search, checks: Checks, interrupted: bool) -> Calibration:
        found, full = search.found(), search.full()
        if full is None:
            raise KeyboardInterrupt
        chosen = found.chosen
        checked = set(checks.checked)
        keeps = True if checked else found.keeps
        failed = {schedule for schedule in checked if checks.fails(schedule)}
        if chosen is not None and full.scale == "short":
            self._say(
                f"no schedule was tried on a prompt of {self.length} tokens, for lack of time: all this is by prompts"
                f" of {self.length // SHORTER} with windows of a quarter, and layers may matter that do not there"
            )
        if chosen is not None and self._final(chosen.schedule) in failed:
            passed = [each for each in found.candidates if self._final(each.schedule) in checked - failed]
            if passed:
                self._say(f"{chosen.name} kept enough in the search, but not in the check, so it is not taken")
                chosen = min(passed, key=lambda each: each.prefill or 1.0)
            else:
                self._say("nothing of what the search tried kept enough of the answers in the check")
                lost = [each for each in found.candidates if self._final(each.schedule) in failed]
                chosen = max(lost, key=lambda each: checks.difference(self._final(each.schedule)).value)
                keeps = False
        return Calibration(
            model=self.request.model.name,
            length=self.length,
            keep=self.request.keep,
            seed=self.request.seed,
            budget_s=self.request.budget_s,
            spent_s=self.clock.elapsed_s(),
            kinds=("own",) if self.material.has_own and full.scale == "long" else self.material.kinds(full.scale).kinds,
            digest=self.material.digest,
            full=full,
            candidates=found.candidates,
            gains=found.gains,
            gains_at=found.gains_at,
            chosen=self._final(chosen.schedule) if chosen else None,
            searched=chosen.schedule if chosen else None,
            keeps=keeps,
            checks=checks.results(),
            notes=(*self.notes, *found.notes),
            long_s=search.long_s or self._long_s,
            interrupted=interrupted,
            machine=describe_machine(__version__),
            on_gpu=gpu_layers(self.request.engine.n_gpu_layers) > 0,
            command=self.request.command,
        )


def _at_scale(schedule: Schedule, scale: Scale) -> Schedule:
    if scale == "long" or schedule.is_full:
        return schedule
    return replace(schedule, window=max(1, schedule.window // SHORTER))


def _presets(model: ModelLayers, length: int) -> tuple[Schedule, ...]:
    """Published schedules for models of this depth whose windows are shorter than the prompts."""
    published = [preset for preset in PRESETS.values() if preset.n_layer == model.n_layer]
    schedules = [preset.config(model).schedule(model) for preset in published]
    return tuple(dict.fromkeys(schedule for schedule in schedules if schedule.window <= length // 2))
