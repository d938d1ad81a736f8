"""The search against simulated models, whose layers' gains, noise and times are known. No engine, no clock.

A simulated answer's NLL falls with what its full layers and its window bring; its chance is e^-NLL. Texts and questions
have noise of their own, which all schedules share, and each pair of schedule and text some more.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest

from swaa_local.calibrate.evidence import Evidence, Limits, Space
from swaa_local.calibrate.results import Candidate, Scale, Trial
from swaa_local.calibrate.search import Found, Search
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.model_layers import ModelLayers

LENGTH = 16384
WINDOWS = (1024, 2048, 4096)


@dataclass
class Model:
    """A judge. gains: of NLL, by layer; they add up, up to `missing`. decodes: layers that must not slide while they
    decode. noise: of an answer's NLL. trial_s: of a trial with full attention at full length."""

    n_layer: int
    gains: dict[int, float]
    missing: float = 1.0
    decodes: frozenset[int] = frozenset()
    noise: float = 0.02
    trial_s: float = 1.0
    n_questions: int = 16
    seed: int = 0
    attention: float = 0.7
    disturbed: float = 0.0
    """Share of the trials that another program makes up to 2.5 times as long."""
    clock: float = 0.0
    made: list[tuple[Schedule, Scale, int]] = field(default_factory=list)

    def elapsed_s(self) -> float:
        return self.clock

    def nll(self, schedule: Schedule) -> float:
        if schedule.is_full:
            return 0.1
        brought = sum(self.gains.get(layer, 0.0) for layer in schedule.layers(LayerMode.FULL))
        gap = max(0.0, self.missing - brought) * (1024 / schedule.window) ** 2
        lost = 1.5 * len(self.decodes & set(schedule.layers(LayerMode.ALWAYS)))
        return 0.1 + gap + lost

    def trial(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
        self.made.append((schedule, scale, text))
        pairs = sum(schedule.prefill_pairs(LENGTH)) / sum(Schedule.full(self.n_layer).prefill_pairs(LENGTH))
        prefill = (1 - self.attention + self.attention * pairs) * self.trial_s * (1 if scale == "long" else 0.15)
        luck = random.Random(f"{self.seed}/{len(self.made)}")
        if luck.random() < self.disturbed:
            prefill *= luck.uniform(1.1, 2.5)
        self.clock += prefill * 1.25
        nll = []
        for question in range(self.n_questions):
            shared = random.Random(f"{self.seed}/{scale}/{text}/{question}").gauss(0, 3 * self.noise)
            own = random.Random(f"{self.seed}/{scale}/{text}/{question}/{schedule}").gauss(0, self.noise)
            nll.append(max(0.0, self.nll(schedule) + shared + own))
        return Trial(
            schedule,
            scale,
            text,
            tuple(nll),
            tuple(math.exp(-each) for each in nll),
            tuple(each < 0.4 for each in nll),
            prefill,
            0.01 * sum(schedule.decode_keys(LENGTH)),
            sum(schedule.kv_cells(LENGTH)),
            prefill * 1.25,
        )

    def true_quality(self, schedule: Schedule) -> float:
        return math.exp(self.nll(Schedule.full(self.n_layer)) - self.nll(schedule))


def search(model: Model, budget_s: float, *, keep: float = 0.98, n_long: int = 3, n_short: int = 2, **kwargs) -> Found:
    space = Space(ModelLayers.of(model.n_layer), LENGTH, WINDOWS, sinks=100, tail=128)
    return Search(model, space, Limits(keep, budget_s, n_long, n_short, **kwargs)).run()


def chosen(found: Found) -> Candidate:
    assert found.chosen is not None
    return found.chosen


THREE_OF_28 = {8: 0.5, 14: 0.35, 16: 0.3}


@pytest.mark.parametrize("seed", range(5))
def test_with_time_it_finds_the_few_layers_that_matter(seed):
    model = Model(28, {**THREE_OF_28, 3: 0.05, 20: 0.05}, seed=seed)
    found = search(model, 270)
    best = chosen(found)
    assert found.keeps
    assert {8, 14, 16} <= set(best.schedule.layers(LayerMode.FULL))
    assert len(best.schedule.layers(LayerMode.FULL)) <= 4
    assert [gain.layer for gain in sorted(found.gains, key=lambda gain: -gain.gain)[:3]] == [8, 14, 16]
    assert all(gain.alone for gain in found.gains)


@pytest.mark.parametrize("seed", range(3))
def test_where_no_layer_matters_none_is_kept(seed):
    found = search(Model(28, {}, missing=0.0, seed=seed), 270)
    assert chosen(found).schedule.layers(LayerMode.FULL) == ()
    assert chosen(found).schedule.window == 1024
    assert found.keeps


def test_where_a_wide_window_does_it_no_layer_is_paid_for():
    """Every layer brings a little; half of them are needed at 1024, and none at 4096."""
    found = search(Model(28, dict.fromkeys(range(28), 0.004), missing=0.1), 270)
    best = chosen(found)
    assert found.keeps
    assert best.schedule.window == 4096
    assert len(best.schedule.layers(LayerMode.FULL)) <= 1


def test_where_nothing_keeps_enough_it_says_so_and_gives_the_best():
    model = Model(12, {}, missing=9.0)
    found = search(model, 200)
    assert not found.keeps
    assert chosen(found).quality.high < 0.98


@pytest.mark.parametrize("seed", range(4))
def test_a_tenth_of_the_time_still_finds_good_layers_by_short_prompts_and_groups(seed):
    model = Model(24, {5: 0.5, 15: 0.5}, trial_s=60, seed=seed)
    found = search(model, 900)
    best = chosen(found)
    assert model.true_quality(best.schedule) > 0.95
    assert {5, 15} <= set(best.schedule.layers(LayerMode.FULL))
    assert any(scale == "short" for _, scale, _ in model.made)
    assert any("lack of time" in note for note in found.notes)


@pytest.mark.parametrize("budget_s", [20, 60, 150, 400, 1500, 5000])
@pytest.mark.parametrize("trial_s", [1, 10, 40])
def test_the_time_is_kept(budget_s, trial_s):
    model = Model(28, THREE_OF_28, trial_s=trial_s)
    search(model, budget_s)
    assert model.clock <= budget_s + 0.1 * max(budget_s, 12.5 * trial_s)


def test_nothing_is_measured_twice():
    model = Model(28, THREE_OF_28)
    search(model, 270)
    assert len(model.made) == len(set(model.made))


def test_the_hopeless_are_left_after_one_text():
    model = Model(28, THREE_OF_28, missing=1.15)
    search(model, 2000)
    tried = [(schedule, text) for schedule, scale, text in model.made if scale == "long"]
    screened = {
        schedule for schedule, _ in tried if len(schedule.layers(LayerMode.FULL)) <= 1 and schedule.window == 2048
    }
    hopeless = {s for s, _ in tried if model.true_quality(s) < 0.6} - screened
    assert len(hopeless) > 5
    assert not [s for s, text in tried if s in hopeless and text > 0]


def test_layers_that_need_not_decode_in_full_slide():
    model = Model(16, {4: 1.0}, decodes=frozenset({9, 10}))
    found = search(model, 400)
    best = chosen(found)
    sliding = set(best.schedule.layers(LayerMode.ALWAYS))
    assert found.keeps
    assert not sliding & {9, 10}
    assert len(sliding) >= 8


def test_if_all_must_decode_in_full_none_slides():
    model = Model(16, {4: 1.0}, decodes=frozenset(range(16)))
    found = search(model, 400)
    assert found.keeps
    assert chosen(found).schedule.layers(LayerMode.ALWAYS) == ()


def test_for_memory_the_smallest_cache_is_taken():
    """Layer 4 full makes the answers right; that all others slide costs time here, but no answer."""
    fast, small = (chosen(search(Model(16, {4: 1.0}), 400, memory=memory)) for memory in (False, True))
    assert small.kv_bytes <= fast.kv_bytes


def test_two_runs_come_to_equal_quality():
    """The same model with other prompts: other layers may win, but the answers are as good."""
    gains = dict.fromkeys(range(0, 28, 2), 0.08)
    qualities = []
    for seed in range(6):
        model = Model(28, gains, missing=0.5, noise=0.05, seed=seed)
        found = search(model, 270)
        assert found.keeps
        qualities.append(model.true_quality(chosen(found).schedule))
    assert min(qualities) > 0.95


def test_a_preset_that_is_best_is_taken():
    preset = Schedule(512, 100, tuple(LayerMode.FULL if i == 4 else LayerMode.PREFILL for i in range(16)), 128)
    model = Model(16, {4: 3.0}, missing=1.0)
    space = Space(ModelLayers.of(16), LENGTH, WINDOWS, 100, 128, presets=(preset,))
    found = Search(model, space, Limits(0.98, 400, 3, 2)).run()
    assert chosen(found).schedule.window == 512


def test_without_time_for_anything_nothing_is_chosen():
    model = Model(28, THREE_OF_28, trial_s=100)
    model.clock = 50
    found = search(model, 40)
    assert found.chosen is None
    assert found.notes


@pytest.mark.parametrize("trials", [5, 9, 14])
@pytest.mark.parametrize("seed", range(3))
def test_a_few_trials_at_full_length_are_enough_for_a_schedule_that_keeps_most(trials, seed):
    """As on a slow machine: what was tried on long prompts decides, and the time is kept."""
    model = Model(24, {5: 0.4, 15: 0.4}, missing=0.8, trial_s=100, seed=seed)
    found = search(model, 100 * trials)
    assert chosen(found).scale == "long"
    assert model.true_quality(chosen(found).schedule) > 0.85
    assert model.clock <= 1.1 * 100 * trials


@pytest.mark.parametrize("trials", [6, 9])
@pytest.mark.parametrize("layer", range(8))
def test_a_small_model_without_short_prompts_finds_its_layer_in_a_few_trials(trials, layer):
    model = Model(8, {layer: 0.6}, missing=0.6, noise=0.05, trial_s=10)
    space = Space(ModelLayers.of(8), LENGTH, WINDOWS[:1], 100, 64)
    found = Search(model, space, Limits(0.95, 10 * trials, 6, 0)).run()
    assert layer in chosen(found).schedule.layers(LayerMode.FULL)


def test_where_one_trial_at_full_length_fits_it_is_made_whatever_the_check_would_take():
    model = Model(24, THREE_OF_28, trial_s=100)
    found = search(model, 300, check_s=lambda trial_s: 4 * trial_s)
    assert chosen(found).scale == "long"
    assert any("lack of time" in note for note in found.notes)


@pytest.mark.parametrize("trial_s", [10, 60])
def test_time_for_the_check_is_left(trial_s):
    model = Model(24, THREE_OF_28, trial_s=trial_s)
    found = search(model, 900, check_s=lambda trial_s: 4 * trial_s)
    assert found.candidates
    last = [1.25 * each.prefill * trial_s for each in found.candidates if each.prefill is not None]
    assert model.clock <= 900 - 4 * 0.9 * min(last)


def test_one_trial_that_the_machine_disturbs_does_not_end_the_search():
    @dataclass
    class Disturbed(Model):
        def trial(self, schedule: Schedule, scale: Scale, text: int) -> Trial:
            trial = super().trial(schedule, scale, text)
            if scale == "long" and sum(at == "long" for _, at, _ in self.made) == 3:
                self.clock += 4 * trial.took_s
                trial = replace(trial, took_s=5 * trial.took_s)
            return trial

    model = Disturbed(24, {5: 0.5, 15: 0.5}, trial_s=40)
    found = search(model, 900, check_s=lambda trial_s: 6 * trial_s)
    assert chosen(found).n_texts >= 2


def test_what_else_the_machine_does_hardly_changes_what_is_found():
    """Half of the times are of no use; the median of what they say is."""

    def n_full(disturbed: float) -> float:
        counts = []
        for seed in range(12):
            model = Model(
                24, {3: 0.3, 7: 0.25, 9: 0.2, 11: 0.2, 12: 0.05}, seed=seed, attention=0.4, disturbed=disturbed
            )
            counts.append(len(chosen(search(model, 60)).schedule.layers(LayerMode.FULL)))
        return sum(counts) / len(counts)

    assert n_full(0.5) <= n_full(0.0) + 0.75


def test_without_time_for_full_length_short_prompts_decide():
    """Full attention was read at full length, and no schedule can be; or not even that."""
    for n_long, budget_s in ((3, 220), (0, 220)):
        model = Model(24, {5: 0.5, 15: 0.5}, trial_s=100)
        found = search(model, budget_s, n_long=n_long)
        assert {scale for schedule, scale, _ in model.made if not schedule.is_full} == {"short"}
        assert model.clock <= 1.1 * budget_s
        assert chosen(found).scale == "short"
        assert chosen(found).prefill is None  # times of short prompts say nothing of long ones
        assert model.true_quality(chosen(found).schedule) > 0.85
        assert all(each.scale == "short" for each in found.candidates)


def test_a_schedule_that_sees_less_than_one_that_fails_promises_little_and_one_that_sees_more_than_a_good_one_much():
    model = Model(16, {4: 1.0}, noise=0.004)
    space = Space(ModelLayers.of(16), LENGTH, WINDOWS, 100, 64)
    known = Evidence(space, Limits(0.98, 100, 3, 2))
    for tried in (space.schedule((3, 5), 2048), space.schedule((4,), 1024)):  # the first loses much, the second nothing
        for schedule in (Schedule.full(16), tried):
            known.trials[schedule, "long", 0] = model.trial(schedule, "long", 0)
    before = Evidence(space, Limits(0.98, 100, 3, 2))
    less, more, other = space.schedule((3,), 1024), space.schedule((4, 9), 1024), space.schedule((7,), 4096)
    assert known.promise(less) < before.promise(less) / 3
    assert known.promise(more) > before.promise(more) * 2
    assert known.promise(other) / (1 - known.time(other)) == before.promise(other) / (1 - before.time(other))


def test_layers_are_ranked_with_a_smaller_window_where_the_middle_one_loses_nothing():
    model = Model(16, {4: 1.0, 9: 0.5}, missing=0.1, noise=0.002)  # of 0.1 a window of 2048 brings 0.075
    found = search(model, 600)
    assert "window 1024" in found.gains_at
    assert max(found.gains, key=lambda gain: gain.gain).layer in {4, 9}


@dataclass
class Sinking(Model):
    """Its answers need more sinks than the search begins with."""

    def nll(self, schedule: Schedule) -> float:
        return super().nll(schedule) + (0.0 if schedule.is_full or schedule.sinks > 100 else 0.04)


def test_other_sinks_are_taken_if_answers_are_better_and_only_then():
    assert chosen(search(Sinking(16, {4: 1.0}, noise=0.004), 600, keep=0.95)).schedule.sinks == 400
    found = search(Model(16, {4: 1.0}, decodes=frozenset(range(16))), 600)
    assert chosen(found).schedule.sinks == 100
    assert chosen(found).schedule.tail == 128
    assert any(each.schedule.sinks == 4 for each in found.candidates)


def test_what_is_known_decides_when_the_time_is_over():
    """As when the same command is given again: nothing is tried, and the same is found, gains included."""
    model = Model(28, THREE_OF_28)
    before = search(model, 270)
    trials = [model.trial(*each) for each in list(model.made)]
    again = Model(28, THREE_OF_28, clock=300.0)
    space = Space(ModelLayers.of(28), LENGTH, WINDOWS, sinks=100, tail=128)
    found = Search(again, space, Limits(0.98, 270, 3, 2), known=trials).run()
    assert again.made == []
    assert chosen(found).schedule == chosen(before).schedule
    assert found.gains == before.gains
    lower = Search(again, space, Limits(0.6, 270, 3, 2), known=trials).run()
    assert again.made == []
    assert chosen(lower).prefill <= chosen(found).prefill  # type: ignore[operator]


def test_a_known_trial_on_other_questions_is_not_compared():
    model = Model(16, {4: 1.0})
    other = model.trial(Schedule(1024, 100, (LayerMode.PREFILL,) * 16, 128), "long", 0)
    known = [
        model.trial(Schedule.full(16), "long", 0),
        replace(other, nll=(0.1,), chance=(0.9,), right=(True,)),
    ]
    model.made.clear()
    model.clock = 0.0
    space = Space(ModelLayers.of(16), LENGTH, WINDOWS, 100, 128)
    Search(model, space, Limits(0.98, 100, 3, 2), known=known).run()
    assert (other.schedule, "long", 0) in model.made
    assert (Schedule.full(16), "long", 0) not in model.made
