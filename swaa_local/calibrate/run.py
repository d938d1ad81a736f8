"""`swaa-local calibrate`: what a request says, turned into questions, a search, a check, and what they found.

The flow alone: `material` makes the questions, `measure` asks the model, `search` decides what is tried.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from statistics import fmean, median

from swaa_local import __version__
from swaa_local.calibrate.evidence import Limits, Space, cautious
from swaa_local.calibrate.haystack import Haystack, read_haystack
from swaa_local.calibrate.log import CalibrateLog, Kinds
from swaa_local.calibrate.material import LEAST_CHECK, SHORTER, Material
from swaa_local.calibrate.measure import Bench, Prompted
from swaa_local.calibrate.prompts import EASY, GENERATED, ROOM_TO_ANSWER
from swaa_local.calibrate.request import CalibrateRequest, check_memory, config, plan
from swaa_local.calibrate.results import CalibrateError, Calibration, Check, Generated, Scale, Trial
from swaa_local.calibrate.search import Found, Search
from swaa_local.calibrate.table import front_of
from swaa_local.calibrate.watch import SILENT, Watch
from swaa_local.engine.context_length import gpu_layers
from swaa_local.engine.machine import describe_machine
from swaa_local.model_file.adapter import adapter_remarks, read_adapter
from swaa_local.model_file.model_info import ModelInfo, read_model_info
from swaa_local.report.intervals import Interval, paired
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.cost import pad_cells
from swaa_local.schedule.presets import PRESETS
from swaa_local.schedule.text import in_words

LEAST_RIGHT = 0.4
"""Share of a kind's questions that full attention must get right, or they are not asked."""
_WELL_ANSWERED = 0.7
"""If full attention gets fewer right, easier questions may be the better measure."""
_PILOT, _LONG = "pilot", "long"
"""Where it was found out which kinds of questions are answered."""
_LEAST_QUESTIONS = 6
_CHECK_SHARE, _MOST_CHECK_SHARE = 0.25, 0.45  # of the budget, at most; the second if it would be too few otherwise
_SINKS = 100
_TAILS = 64, 128
"""In the search, whose questions are short, and as it is checked and stored. A longer one only lets more tokens see the
whole text, but every question of the search would take longer by it."""
_SHORT_LENGTH = 1024
"""Tokens; shorter prompts have no room for the questions."""


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
        CalibrateLog(request.log, config(request, length, windows)) as log,
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
        prompts = self._material.prompts("search", scale, text)
        known = self._log.trials.get((schedule, scale, text))
        if known is not None and len(known.nll) == len(prompts):
            return known
        self._watch.trying(schedule, f"{scale} prompt {text + 1}")
        trial = replace(self._bench.trial(_at_scale(schedule, scale), scale, text, prompts), schedule=schedule)
        self._log.add_trial(trial)
        return trial


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
    checks: list[tuple[Schedule, list[Generated]]] = field(default_factory=list)

    def all(self) -> Calibration:
        judge = _Judge(self.material, self.bench, self.log, self.watch, self.clock)
        full = Schedule.full(self.info.n_layer)
        self.watch.stage("which questions full attention answers")
        if not self._has_own:
            self._choose_kinds(full)
        first = judge.trial(full, "long", 0)
        if not self._has_own:
            first = self._drop_kinds(judge, full, first)
        n_check, check_s = self._plan_check(first)
        space = Space(
            self.info.n_layer,
            self.length,
            self.windows,
            min(_SINKS, self.windows[0] // 4),
            self._tails()[0],
            _presets(self.info.n_layer, self.length),
        )
        until_s = self.request.budget_s - check_s
        limits = Limits(self.request.keep, until_s, self.material.n_long, self._n_short(), self.request.memory)
        search = Search(judge, space, limits, self.watch, tuple(self.log.trials.values()))
        interrupted = False
        try:
            search.run()
            found = search.found()
            if found.chosen is not None:
                self._check(full, found, n_check)
        except KeyboardInterrupt:
            interrupted = True
        return self._result(search, interrupted)

    @property
    def _has_own(self) -> bool:
        return self.request.questions is not None

    def _tails(self) -> tuple[int, int]:
        """Tokens of the tail in the search, and as it is stored. The user's questions may be long."""
        longest = self.material.longest_question if self._has_own else 0
        most = max(1, self.windows[0] // 2)
        return min(most, max(_TAILS[0], longest)), min(most, max(_TAILS[1], longest))

    def _final(self, schedule: Schedule) -> Schedule:
        """As it is checked and stored."""
        return replace(schedule, tail=max(schedule.tail, self._tails()[1])) if schedule.active_tail else schedule

    def _n_short(self) -> int:
        return 2 if self.length // SHORTER >= _SHORT_LENGTH else 0

    # Questions that can be asked

    def _choose_kinds(self, full: Schedule) -> None:
        """By a short prompt: which kinds of questions full attention answers, and whether it begins answers itself."""
        scale: Scale = "short" if self._n_short() else "long"
        if _PILOT not in self.log.kinds:
            tried: list[tuple[float, Kinds, Trial]] = []
            for kinds in (GENERATED, EASY):
                found, trial = self._try_kinds(full, scale, kinds)
                tried.append((fmean(found.shares[kind] for kind in found.kinds or kinds), found, trial))
                if found.kinds and tried[-1][0] >= _WELL_ANSWERED:
                    break
            _, found, trial = max(tried, key=lambda each: (bool(each[1].kinds), each[0]))
            if not found.kinds:
                self._refuse(found.shares, self.length // SHORTER if scale == "short" else self.length)
            if scale == "long" and found.kinds == GENERATED and not found.bare:
                self.log.add_trial(trial)  # on the very questions of the first text
            self.log.add_kinds(_PILOT, found)
        self.material.set_kinds("short", self.log.kinds[_PILOT])
        self.material.set_kinds("long", self.log.kinds.get(_LONG, self.log.kinds[_PILOT]))

    def _try_kinds(self, full: Schedule, scale: Scale, tried: tuple[str, ...]) -> tuple[Kinds, Trial]:
        """Those that are answered, and the trial with the beginnings of answers."""
        begun, bare = self.material.pilot(scale, tried)
        trial = self.bench.trial(full, scale, 0, begun)
        shares = _shares(begun, trial)
        if any(share < LEAST_RIGHT for share in shares.values()):
            without = _shares(bare, self.bench.trial(full, scale, 0, bare, timed=False))
        else:
            without = {}
        best = {kind: max(share, without.get(kind, 0.0)) for kind, share in shares.items()}
        kinds = tuple(kind for kind in tried if best.get(kind, 0.0) >= LEAST_RIGHT)
        bare_kinds = tuple(kind for kind in kinds if without.get(kind, 0.0) > shares[kind])
        return Kinds(kinds, bare_kinds, best), trial

    def _drop_kinds(self, judge: _Judge, full: Schedule, first: Trial) -> Trial:
        """Kinds that it answers in short prompts but not in long ones."""
        known = self.log.kinds.get(_LONG)
        if known is None:
            prompts = self.material.prompts("search", "long", 0)
            shares = _shares(prompts, first)
            asked = self.material.kinds("long")
            kinds = tuple(kind for kind in asked.kinds if shares.get(kind, 0.0) >= LEAST_RIGHT)
            if not kinds or sum(prompt.kind in kinds for prompt in prompts) < _LEAST_QUESTIONS:
                self._refuse(shares, self.length)
            known = Kinds(kinds, tuple(kind for kind in asked.bare if kind in kinds), shares)
            self.log.add_kinds(_LONG, known)
        dropped = [kind for kind in GENERATED if kind not in known.kinds]
        if dropped:
            self._say(
                f"not asked: {', '.join(dropped)}; full attention gives fewer than {LEAST_RIGHT:.0%} of the answers"
            )
        if known.kinds != self.material.kinds("long").kinds:
            self.material.set_kinds("long", known)
            first = judge.trial(full, "long", 0)
        return first

    def _refuse(self, shares: dict[str, float], length: int) -> None:
        said = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        raise CalibrateError(
            f"with full attention this model does not answer questions about texts of {length} tokens ({said} right), "
            "so no schedule can be judged by them; pass a shorter --length, your own --questions, or take a better "
            "model"
        )

    # The check

    def _plan_check(self, first: Trial) -> tuple[int, float]:
        """Texts of the check, and the seconds to be kept for it: full attention's answers and those of another."""
        prompts = self.material.prompts("search", "long", 0)
        n_tokens = sum(min(ROOM_TO_ANSWER, len(prompt.answer) + 8) for prompt in prompts)
        one = first.took_s + n_tokens * (first.decode_token_s or 0.0)
        n, least = self.material.n_check, min(LEAST_CHECK, self.material.n_check)
        while n > 1 and 2 * one * n > (_CHECK_SHARE if n > least else _MOST_CHECK_SHARE) * self.request.budget_s:
            n -= 1
        if n < least:
            self._say(
                f"the check has {n} text{'s' * (n > 1)} instead of {least}, for lack of time; a larger --budget, or a "
                "shorter --length, gives more certainty"
            )
        return n, 2 * one * n * 1.05

    def _check(self, full: Schedule, found: Found, n_texts: int) -> None:
        """Full attention and the best on texts that the search has not seen; the next best if that loses answers there,
        and others at the front if there is time."""
        self.watch.stage("answers to questions that the search has not seen")
        assert found.chosen is not None
        others = [each for each in front_of(found.candidates) if each.schedule != found.chosen.schedule]
        better = [each for each in others if each.quality.value > found.chosen.quality.value]
        wanted = [found.chosen, *sorted(better, key=lambda each: each.prefill or 1.0), *others]
        queue = list(dict.fromkeys(self._final(each.schedule) for each in wanted))
        self._answer([full, queue[0]], n_texts)
        for schedule in queue[1:]:
            costs = [sum(each.took_s for each in answers) for _, answers in self.checks]
            if self.clock.elapsed_s() + max(costs) > self.request.budget_s:
                if self._fails(self.checks[-1][0]):
                    self._say("another schedule was not checked, for lack of time")
                return
            self._answer([schedule], n_texts)

    def _answer(self, schedules: list[Schedule], n_texts: int) -> None:
        """In turns, so that a machine's bad moments hit all of them."""
        answers: dict[Schedule, list[Generated]] = {schedule: [] for schedule in schedules}
        for text in range(n_texts):
            prompts = self.material.prompts("check", "long", text)
            for schedule in schedules:
                known = self.log.answers.get((schedule, text))
                if known is None or len(known.right) != len(prompts):
                    self.watch.trying(schedule, f"check {text + 1} of {n_texts}")
                    known = self.bench.generate(schedule, text, prompts)
                    self.log.add_answers(known)
                answers[schedule].append(known)
        self.checks += list(answers.items())

    def _difference(self, schedule: Schedule) -> Interval:
        """Of right answers to full attention's, in pairs."""
        (_, full), *others = self.checks
        mine = next(answers for each, answers in others if each == schedule)
        texts = zip(mine, full, strict=True)
        return paired([float(a) - float(b) for one, two in texts for a, b in zip(one.right, two.right, strict=True)])

    def _fails(self, schedule: Schedule) -> bool:
        """Whether it rather loses more answers than it may, as the check saw it."""
        (_, full), *_ = self.checks
        share = fmean(right for answers in full for right in answers.right)
        return cautious(self._difference(schedule), -1) < (self.request.keep - 1) * share

    # What came of it

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.watch.note(note)

    def _result(self, search: Search, interrupted: bool) -> Calibration:
        found, full = search.found(), search.full()
        if full is None:
            raise KeyboardInterrupt
        chosen = found.chosen
        keeps = found.keeps if len(self.checks) < 2 else True
        checked = {schedule for schedule, _ in self.checks[1:]}
        failed = {schedule for schedule in checked if self._fails(schedule)}
        if chosen is not None and self._final(chosen.schedule) in failed:
            passed = [each for each in found.candidates if self._final(each.schedule) in checked - failed]
            if passed:
                self._say(f"{chosen.name} kept enough in the search, but not in the check, so it is not taken")
                chosen = min(passed, key=lambda each: each.prefill or 1.0)
            else:
                self._say("nothing that was checked kept enough of the answers there")
                lost = [each for each in found.candidates if self._final(each.schedule) in failed]
                chosen = max(lost, key=lambda each: self._difference(self._final(each.schedule)).value)
                keeps = False
        return Calibration(
            model=self.request.model.name,
            length=self.length,
            keep=self.request.keep,
            seed=self.request.seed,
            budget_s=self.request.budget_s,
            spent_s=self.clock.elapsed_s(),
            kinds=("own",) if self._has_own else self.material.kinds("long").kinds,
            digest=self.material.digest,
            full=full,
            candidates=found.candidates,
            gains=found.gains,
            gains_at=found.gains_at,
            chosen=self._final(chosen.schedule) if chosen else None,
            searched=chosen.schedule if chosen else None,
            keeps=keeps,
            checks=tuple(self._check_of(schedule, answers) for schedule, answers in self.checks),
            notes=(*self.notes, *found.notes),
            interrupted=interrupted,
            machine=describe_machine(__version__),
            on_gpu=gpu_layers(self.request.engine.n_gpu_layers) > 0,
            command=self.request.command,
        )

    def _check_of(self, schedule: Schedule, answers: list[Generated]) -> Check:
        full = self.checks[0][1]
        return Check(
            schedule=schedule,
            name=in_words(schedule),
            right=sum(sum(each.right) for each in answers),
            n=sum(len(each.right) for each in answers),
            difference=None if schedule.is_full else self._difference(schedule),
            prefill_s=median(each.prefill_s for each in answers),
            prefill=median(a.prefill_s / b.prefill_s for a, b in zip(answers, full, strict=True)),
            decode_token_s=median(each.decode_token_s for each in answers),
            decode=median(a.decode_token_s / b.decode_token_s for a, b in zip(answers, full, strict=True)),
            kv_bytes=answers[0].kv_bytes,
        )


def _shares(prompts: Sequence[Prompted], trial: Trial) -> dict[str, float]:
    """Of right answers, by kind."""
    by_kind: dict[str, list[bool]] = {}
    for prompt, right in zip(prompts, trial.right, strict=True):
        by_kind.setdefault(prompt.kind, []).append(right)
    return {kind: fmean(rights) for kind, rights in by_kind.items()}


def _at_scale(schedule: Schedule, scale: Scale) -> Schedule:
    if scale == "long" or schedule.is_full:
        return schedule
    return replace(schedule, window=max(1, schedule.window // SHORTER))


def _presets(n_layer: int, length: int) -> tuple[Schedule, ...]:
    """Published schedules for models of this depth whose windows are shorter than the prompts."""
    schedules = [preset.config(n_layer).schedule(n_layer) for preset in PRESETS.values() if preset.n_layer == n_layer]
    return tuple(dict.fromkeys(schedule for schedule in schedules if schedule.window <= length // 2))
