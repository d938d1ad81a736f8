"""The check against a simulated model whose right answers are known. No engine; a clock that the answers move."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from swaa_local.calibrate.check import LEAST_QUESTIONS, Checks
from swaa_local.calibrate.results import Candidate, Generated
from swaa_local.calibrate.search import Found
from swaa_local.calibrate.watch import SILENT
from swaa_local.report.intervals import Interval
from swaa_local.schedule.config import LayerMode, Schedule

N_LAYER, N_ASKED, N_TEXTS = 8, 20, 6
FULL = Schedule.full(N_LAYER)


def windowed(*full: int, window: int = 256) -> Schedule:
    modes = tuple(LayerMode.FULL if i in full else LayerMode.PREFILL for i in range(N_LAYER))
    return Schedule(window, 16, modes, 64)


EVEN, ODD = windowed(0, 2, 4, 6), windowed(1, 3, 5, 7)


@dataclass
class Simulated:
    """Material, bench, log and clock in one. right: of `N_ASKED` questions of each text; full attention has all."""

    right: dict[Schedule, int] = field(default_factory=dict)
    text_s: float = 10.0
    clock: float = 0.0
    answers: dict[tuple[Schedule, int], Generated] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    n_check: int = N_TEXTS
    has_own: bool = False

    def prompts(self, part: str, scale: str, number: int) -> list[Any]:
        assert (part, scale) == ("check", "long")
        return [SimpleNamespace()] * N_ASKED

    def generate(self, schedule: Schedule, number: int, prompts: list[Any]) -> Generated:
        self.clock += self.text_s
        n = self.right.get(schedule, N_ASKED)
        right = tuple(i < n for i in range(N_ASKED))
        return Generated(schedule, number, ("",) * N_ASKED, right, 1.0, 0.01, 100, self.text_s)

    def add_answers(self, answers: Generated) -> None:
        assert (answers.schedule, answers.text) not in self.answers
        self.answers[answers.schedule, answers.text] = answers

    def checks(self, budget_s: float) -> Checks:
        simulated: Any = self
        return Checks(
            simulated,
            simulated,
            simulated,
            SILENT,
            n_asked=N_ASKED,
            keep=0.95,
            budget_s=budget_s,
            elapsed_s=lambda: self.clock,
            final=lambda schedule: schedule,
            say=self.notes.append,
        )

    def check(self, budget_s: float, *candidates: Candidate) -> Checks:
        checks = self.checks(budget_s)
        checks.make(FULL, Found(candidates[0], True, candidates, (), "", ()), (EVEN, ODD), self.text_s)
        return checks


def candidate(schedule: Schedule, prefill: float, quality: float = 1.0) -> Candidate:
    interval = Interval(quality, quality - 0.02, quality + 0.02)
    return Candidate(schedule, "", interval, 0.1, 20, 20, prefill, 1.0, 1.0, 0.01, 100, 2)


BEST, SECOND = windowed(3, window=64), windowed(3, 5, window=64)


def test_with_time_the_best_is_compared_with_full_attention_and_every_second_layer_on_all_texts():
    made = Simulated()
    results = made.check(1000, candidate(BEST, 0.5)).results()
    assert [each.schedule for each in results] == [FULL, BEST, EVEN, ODD]
    assert {each.n for each in results} == {N_TEXTS * N_ASKED}
    assert made.notes == []


@pytest.mark.parametrize(("budget_s", "n_texts", "n_schedules"), [(240, 4, 4), (105, 2, 4), (62, 2, 2), (29, 1, 2)])
def test_with_less_time_there_are_fewer_texts_and_then_fewer_schedules(budget_s, n_texts, n_schedules):
    made = Simulated()
    results = made.check(budget_s, candidate(BEST, 0.5)).results()
    assert [each.schedule for each in results] == [FULL, BEST, EVEN, ODD][:n_schedules]
    assert {each.n for each in results} == {n_texts * N_ASKED}
    assert any("not checked beside it" in note for note in made.notes) == (n_schedules < 4)
    assert made.clock <= 1.05 * budget_s


def test_without_time_nothing_is_checked_and_it_is_said():
    made = Simulated()
    assert made.check(10, candidate(BEST, 0.5)).results() == ()
    assert made.clock == 0
    assert "nothing was checked" in made.notes[0]


def test_if_the_best_loses_answers_the_next_best_is_checked_before_anything_else():
    made = Simulated({BEST: 15, SECOND: 20})
    checks = made.check(1000, candidate(BEST, 0.5), candidate(SECOND, 0.6, 1.01))
    assert checks.checked[:2] == (BEST, SECOND)
    assert checks.fails(BEST)
    assert not checks.fails(SECOND)


def test_what_the_log_has_is_taken_even_when_the_time_is_over():
    made = Simulated()
    made.check(1000, candidate(BEST, 0.5))
    n = len(made.answers)
    made.clock, again = 5000.0, made
    results = again.check(1000, candidate(BEST, 0.5)).results()
    assert len(made.answers) == n
    assert [each.n for each in results] == [N_TEXTS * N_ASKED] * 4


def test_time_that_is_kept_for_it_follows_a_trials_time_and_never_takes_more_than_its_share():
    checks = Simulated().checks(1000)
    quick, slow, slower = (checks.kept_s(trial_s) for trial_s in (1, 30, 160))
    assert 0 < quick < slow <= 420
    assert checks.kept_s(100) >= 2 * 100  # full attention's and another's answers to one text
    assert slower <= 420
    assert checks.kept_s(10_000) == 0  # then nothing can be checked, and all of the time is the search's


def test_fewer_than_the_least_questions_is_said():
    made = Simulated()
    n = made.check(29, candidate(BEST, 0.5)).results()[0].n
    assert n < LEAST_QUESTIONS
    assert any(f"has {n} questions instead of {LEAST_QUESTIONS}" in note for note in made.notes)
