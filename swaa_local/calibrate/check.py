"""The check: answers that are generated to questions which the search has not seen, and what follows from them.

Knows the model by its bench, and what the search found; which schedule is taken, `run` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

from swaa_local.calibrate.evidence import cautious
from swaa_local.calibrate.log import CalibrateLog
from swaa_local.calibrate.material import Material
from swaa_local.calibrate.measure import Bench
from swaa_local.calibrate.results import Check, Generated
from swaa_local.calibrate.search import Found
from swaa_local.calibrate.table import front_of
from swaa_local.calibrate.watch import Watch
from swaa_local.report.intervals import Interval, paired
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import in_words

LEAST_QUESTIONS, MOST_QUESTIONS = 40, 128
"""Of the check, where the time allows it."""
_SHARE, _MOST_SHARE = 0.38, 0.42
"""Of the budget that may be kept for the check: with schedules to compare, and of the chosen one alone."""
_GENERATING = 1.3  # times a trial's time: answers are generated token by token
_SLACK = 0.04  # of the budget; rather a little late than without a check


class Checks:
    """Answers of full attention and of others. n_asked: questions of a text, about. keep: share of full attention's
    quality. elapsed_s: of the budget. final: a schedule of the search as it is checked and stored. say: is told what
    there was no time for."""

    def __init__(
        self,
        material: Material,
        bench: Bench,
        log: CalibrateLog,
        watch: Watch,
        *,
        n_asked: int,
        keep: float,
        budget_s: float,
        elapsed_s: Callable[[], float],
        final: Callable[[Schedule], Schedule],
        say: Callable[[str], None],
    ) -> None:
        self._material, self._bench, self._log, self._watch = material, bench, log, watch
        self._n_asked = max(1, n_asked)
        self._keep, self._budget_s, self._elapsed_s, self._final, self._say = keep, budget_s, elapsed_s, final, say
        self._made: dict[Schedule, list[Generated]] = {}  # full attention first

    def kept_s(self, trial_s: float) -> float:
        """Seconds that a search should leave for the check, where a trial at full length takes `trial_s`."""
        return self._plan(trial_s, _SHARE * self._budget_s, _MOST_SHARE * self._budget_s)[1]

    def _plan(self, trial_s: float, room_s: float, most_room_s: float) -> tuple[int, float]:
        """Texts, and seconds: of four schedules in the room, or else of two in the most room; as many as there are, and
        fewer than `LEAST_QUESTIONS` need only as a last resort. (0, 0.0) if not even one text fits."""
        least, most = (min(self._material.n_check, -(-n // self._n_asked)) for n in (LEAST_QUESTIONS, MOST_QUESTIONS))
        one_s = trial_s * _GENERATING

        def takes(n: int, schedules: int) -> float:
            return n * (schedules + self._material.has_own) * one_s  # its own answers are generated first

        for n in range(most, least - 1, -1):
            if takes(n, 4) <= room_s:
                return n, takes(n, 4)
        for n in range(least, 0, -1):
            if takes(n, 2) <= most_room_s:
                return n, takes(n, 2)
        return 0, 0.0

    def make(self, full: Schedule, found: Found, periodic: Sequence[Schedule], trial_s: float) -> None:
        """Full attention and the best on texts that the search has not seen; the next best if that loses answers there;
        the periodic schedules to compare with, and others at the front, if there is time. trial_s: as in `kept_s`."""
        self._watch.stage("answers to questions that the search has not seen")
        assert found.chosen is not None
        left_s, slack_s = self._budget_s - self._elapsed_s(), _SLACK * self._budget_s
        n_texts, _ = self._plan(trial_s, left_s, left_s + slack_s)
        chosen = self._final(found.chosen.schedule)
        for text in range(self._material.n_check):
            # In turns, so that a machine's bad moments hit both.
            if not self._answer([full, chosen], text, trial_s if text < n_texts else math.inf):
                break
        if not self._made:
            self._say("nothing was checked on questions that the search has not seen, for lack of time")
            return
        n_asked = sum(len(answers.right) for answers in self._made[full])
        n_texts = len(self._made[full])
        if n_asked < LEAST_QUESTIONS and n_texts < self._material.n_check:
            self._say(f"the check has {n_asked} questions instead of {LEAST_QUESTIONS} or more, for lack of time")
        others = [each for each in front_of(found.candidates) if each.schedule != found.chosen.schedule]
        better = [each for each in others if each.quality.value > found.chosen.quality.value]
        better.sort(key=lambda each: each.prefill or 1.0)
        next_best = [self._final(each.schedule) for each in (*better, *others)]
        n_first = len(better) if self.fails(chosen) else 0
        compared = [self._final(each) for each in periodic]
        for schedule in dict.fromkeys([*next_best[:n_first], *compared, *next_best[n_first:]]):
            if schedule in self._made:
                continue
            for text in range(n_texts):
                if not self._answer([schedule], text, (n_texts - text) * trial_s):
                    break
        if missing := [in_words(each) for each in compared if each not in self._made]:
            self._say(f"not checked beside it, for lack of time: {'; '.join(missing)}")
        if self.fails(chosen) and not any(each in self._made for each in next_best):
            self._say("another schedule was not checked, for lack of time")

    def _answer(self, schedules: Sequence[Schedule], text: int, trials_s: float) -> bool:
        """Answers of all of these to the questions of a text; False if there is no time for so many seconds of trials
        with each. What is in the log takes none."""
        logged = [self._log.answers.get((schedule, text)) for schedule in schedules]
        needed_s = sum(each is None for each in logged) * trials_s * _GENERATING if None in logged else 0.0
        if needed_s and self._elapsed_s() + needed_s > (1 + _SLACK) * self._budget_s:
            return False
        prompts = self._material.prompts("check", "long", text)
        for schedule, known in zip(schedules, logged, strict=True):
            if known is None or len(known.right) != len(prompts):
                self._watch.trying(schedule, f"text {text + 1} of the check")
                known = self._bench.generate(schedule, text, prompts)
                self._log.add_answers(known)
            self._made.setdefault(schedule, []).append(known)
        return True

    @property
    def checked(self) -> tuple[Schedule, ...]:
        """Schedules whose answers there are, without full attention."""
        return tuple(self._made)[1:]

    def difference(self, schedule: Schedule) -> Interval:
        """Of right answers to full attention's, in pairs."""
        texts = zip(self._made[schedule], self._full, strict=False)  # there may have been time for fewer
        return paired([float(a) - float(b) for one, two in texts for a, b in zip(one.right, two.right, strict=True)])

    @property
    def _full(self) -> list[Generated]:
        return next(iter(self._made.values()))

    def fails(self, schedule: Schedule) -> bool:
        """Whether it rather loses more answers than it may, as the check saw it."""
        share = fmean(right for answers in self._full for right in answers.right)
        return cautious(self.difference(schedule), -1) < (self._keep - 1) * share

    def results(self) -> tuple[Check, ...]:
        """Full attention first, then in the order in which they were made."""
        return tuple(self._result(schedule, answers) for schedule, answers in self._made.items())

    def _result(self, schedule: Schedule, answers: list[Generated]) -> Check:
        pairs = list(zip(answers, self._full, strict=False))
        return Check(
            schedule=schedule,
            name=in_words(schedule),
            right=sum(sum(each.right) for each in answers),
            n=sum(len(each.right) for each in answers),
            difference=None if schedule.is_full else self.difference(schedule),
            prefill_s=median(each.prefill_s for each in answers),
            prefill=median(a.prefill_s / b.prefill_s for a, b in pairs),
            decode_token_s=median(each.decode_token_s for each in answers),
            decode=median(a.decode_token_s / b.decode_token_s for a, b in pairs),
            kv_bytes=answers[0].kv_bytes,
        )
