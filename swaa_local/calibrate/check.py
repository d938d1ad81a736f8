"""The check: answers that are generated to questions which the search has not seen, and what follows from them.

Knows the model by its bench, and what the search found; which schedule is taken, `run` decides.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, median

from swaa_local.calibrate.evidence import cautious
from swaa_local.calibrate.log import CalibrateLog
from swaa_local.calibrate.material import LEAST_CHECK, Material
from swaa_local.calibrate.measure import Bench
from swaa_local.calibrate.prompts import ROOM_TO_ANSWER
from swaa_local.calibrate.results import Check, Generated, Trial
from swaa_local.calibrate.search import Found
from swaa_local.calibrate.table import front_of
from swaa_local.calibrate.watch import Watch
from swaa_local.report.intervals import Interval, paired
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import in_words

_SHARE, _MOST_SHARE = 0.25, 0.45  # of the budget, at most; the second if it would be too few otherwise


class Checks:
    """Answers of full attention and of others. keep: share of full attention's quality. elapsed_s: of the budget.
    final: a schedule of the search as it is checked and stored."""

    def __init__(
        self,
        material: Material,
        bench: Bench,
        log: CalibrateLog,
        watch: Watch,
        *,
        keep: float,
        budget_s: float,
        elapsed_s: Callable[[], float],
        final: Callable[[Schedule], Schedule],
        say: Callable[[str], None],
    ) -> None:
        self._material, self._bench, self._log, self._watch = material, bench, log, watch
        self._keep, self._budget_s, self._elapsed_s, self._final, self._say = keep, budget_s, elapsed_s, final, say
        self._made: list[tuple[Schedule, list[Generated]]] = []

    def plan(self, first: Trial) -> tuple[int, float]:
        """Texts of the check, and the seconds to be kept for it: full attention's answers and those of another."""
        prompts = self._material.prompts("search", "long", 0)
        n_tokens = sum(min(ROOM_TO_ANSWER, len(prompt.answer) + 8) for prompt in prompts)
        one = first.took_s + n_tokens * (first.decode_token_s or 0.0)
        n, least = self._material.n_check, min(LEAST_CHECK, self._material.n_check)
        while n > 1 and 2 * one * n > (_SHARE if n > least else _MOST_SHARE) * self._budget_s:
            n -= 1
        if n < least:
            self._say(
                f"the check has {n} text{'s' * (n > 1)} instead of {least}, for lack of time; a larger --budget, or a "
                "shorter --length, gives more certainty"
            )
        return n, 2 * one * n * 1.05

    def make(self, full: Schedule, found: Found, n_texts: int) -> None:
        """Full attention and the best on texts that the search has not seen; the next best if that loses answers there,
        and others at the front if there is time."""
        self._watch.stage("answers to questions that the search has not seen")
        assert found.chosen is not None
        others = [each for each in front_of(found.candidates) if each.schedule != found.chosen.schedule]
        better = [each for each in others if each.quality.value > found.chosen.quality.value]
        wanted = [found.chosen, *sorted(better, key=lambda each: each.prefill or 1.0), *others]
        queue = list(dict.fromkeys(self._final(each.schedule) for each in wanted))
        self._answer([full, queue[0]], n_texts)
        for schedule in queue[1:]:
            costs = [sum(each.took_s for each in answers) for _, answers in self._made]
            if self._elapsed_s() + max(costs) > self._budget_s:
                if self.fails(self._made[-1][0]):
                    self._say("another schedule was not checked, for lack of time")
                return
            self._answer([schedule], n_texts)

    def _answer(self, schedules: list[Schedule], n_texts: int) -> None:
        """In turns, so that a machine's bad moments hit all of them."""
        answers: dict[Schedule, list[Generated]] = {schedule: [] for schedule in schedules}
        for text in range(n_texts):
            prompts = self._material.prompts("check", "long", text)
            for schedule in schedules:
                known = self._log.answers.get((schedule, text))
                if known is None or len(known.right) != len(prompts):
                    self._watch.trying(schedule, f"check {text + 1} of {n_texts}")
                    known = self._bench.generate(schedule, text, prompts)
                    self._log.add_answers(known)
                answers[schedule].append(known)
        self._made += list(answers.items())

    @property
    def checked(self) -> tuple[Schedule, ...]:
        """Schedules whose answers there are, without full attention."""
        return tuple(schedule for schedule, _ in self._made[1:])

    def difference(self, schedule: Schedule) -> Interval:
        """Of right answers to full attention's, in pairs."""
        (_, full), *others = self._made
        mine = next(answers for each, answers in others if each == schedule)
        texts = zip(mine, full, strict=True)
        return paired([float(a) - float(b) for one, two in texts for a, b in zip(one.right, two.right, strict=True)])

    def fails(self, schedule: Schedule) -> bool:
        """Whether it rather loses more answers than it may, as the check saw it."""
        (_, full), *_ = self._made
        share = fmean(right for answers in full for right in answers.right)
        return cautious(self.difference(schedule), -1) < (self._keep - 1) * share

    def results(self) -> tuple[Check, ...]:
        """Full attention first, then in the order in which they were made."""
        return tuple(self._result(schedule, answers) for schedule, answers in self._made)

    def _result(self, schedule: Schedule, answers: list[Generated]) -> Check:
        full = self._made[0][1]
        return Check(
            schedule=schedule,
            name=in_words(schedule),
            right=sum(sum(each.right) for each in answers),
            n=sum(len(each.right) for each in answers),
            difference=None if schedule.is_full else self.difference(schedule),
            prefill_s=median(each.prefill_s for each in answers),
            prefill=median(a.prefill_s / b.prefill_s for a, b in zip(answers, full, strict=True)),
            decode_token_s=median(each.decode_token_s for each in answers),
            decode=median(a.decode_token_s / b.decode_token_s for a, b in zip(answers, full, strict=True)),
            kv_bytes=answers[0].kv_bytes,
        )
