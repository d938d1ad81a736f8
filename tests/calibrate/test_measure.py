"""What is measured, against the same asked the slow way: each question read anew, or generated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from swaa_local import Llama
from swaa_local.calibrate.haystack import Haystack
from swaa_local.calibrate.log import CalibrateLog, Kinds
from swaa_local.calibrate.material import Material
from swaa_local.calibrate.measure import TEMPERATURE, Bench, Prompted
from swaa_local.calibrate.prompts import Maker
from swaa_local.engine.options import EngineOptions
from swaa_local.needle.model import bundled_model
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.model_layers import ModelLayers
from tests.support.scripted import THINKING_TEMPLATE, scripted_model

pytestmark = pytest.mark.usefixtures("engine")

F, P, A = LayerMode.FULL, LayerMode.PREFILL, LayerMode.ALWAYS
ENGINE = EngineOptions(n_threads=1, n_threads_batch=1)
LENGTH = 1536
FULL_ATTENTION = Schedule.full(8)
WINDOWED = Schedule(64, 16, (P, P, P, F, P, P, P, P), 32)
SLIDING = Schedule(64, 16, (A, A, P, F, P, A, P, P), 32)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench(bundled_model(), LENGTH, ENGINE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompts(bench: Bench) -> list[Prompted]:
    maker = Maker(Haystack(), bench.count, bench.count_prompt, kinds=("statements", "sections"), n_questions=6)
    return bench.prompted(maker.text("search", LENGTH, 64, 0))


@pytest.mark.parametrize("schedule", [FULL_ATTENTION, WINDOWED, SLIDING], ids=["full", "windowed", "sliding"])
def test_questions_that_share_a_reading_score_as_if_each_was_read_anew(bench, prompts, schedule):
    trial = bench.trial(schedule, "long", 0, prompts)
    cold = Llama(str(bundled_model()), swaa=False if schedule.is_full else schedule, n_ctx=LENGTH, **ENGINE.arguments())
    for i, prompt in enumerate(prompts):
        found = cold.score(prompt.tokens, prompt.answer, temperatures=(1.0, TEMPERATURE))
        assert trial.nll[i] == pytest.approx(-found.logprobs[0].mean(), abs=0.02)
        assert trial.chance[i] == pytest.approx(math.exp(found.logprobs[1].sum()), abs=0.02)
    cold.close()
    assert trial.prefill_s is not None


def test_another_tail_alone_is_not_read_again_and_scores_as_if_it_was(bench, prompts):
    read = []
    bench.trial(WINDOWED, "long", 0, prompts)
    bench.llm.on_prefill = lambda done, total: read.append(total) if done == 0 else None
    varied = bench.trial(replace(WINDOWED, tail=96), "long", 0, prompts)
    bench.llm.on_prefill = None
    assert max(read) < 300
    assert varied.prefill_s is None
    anew = bench.trial(replace(WINDOWED, tail=96), "long", 0, prompts)
    assert anew.prefill_s is not None
    assert varied.nll == pytest.approx(anew.nll, abs=0.02)


def test_an_answer_is_right_in_a_trial_if_it_is_generated(bench, prompts):
    """Behind its beginning the model says the value at once, so that both must agree."""
    naive = Schedule(64, 0, (A,) * 8)
    for schedule in (FULL_ATTENTION, WINDOWED, naive):
        trial, generated = bench.trial(schedule, "long", 0, prompts), bench.generate(schedule, 0, prompts)
        assert generated.right == trial.right
        for prompt, said, right in zip(prompts, generated.answers, generated.right, strict=True):
            assert (prompt.references[0] in said) == right
    assert sum(trial.right) < len(prompts)  # the naive window does not see the answers


def test_a_kind_that_is_asked_no_more_leaves_the_scores_of_the_others_as_they_are(bench, tmp_path):
    """So that a text need not be read again when full attention turns out not to answer some of its questions."""
    with CalibrateLog(tmp_path / "log.jsonl", {"model": "needle"}, ModelLayers.of(8)) as log:
        material = Material(bench, log, Haystack(), None, LENGTH, 64, 0)
        for scale in ("short", "long"):
            material.set_kinds(scale, Kinds(("statements", "sections"), (), {}))
        all_of_them = bench.trial(WINDOWED, "long", 0, material.prompts("search", "long", 0))
        n = len(all_of_them.nll)
        assert material.kept("long", 0, n) == list(range(n))
        material.set_kinds("long", Kinds(("sections",), (), {}))
        fewer = material.prompts("search", "long", 0)
        kept = material.kept("long", 0, n)
        assert kept is not None
        assert 0 < len(fewer) == len(kept) < n
        assert all_of_them.only(kept).nll == pytest.approx(bench.trial(WINDOWED, "long", 0, fewer).nll, abs=0.02)
        assert material.kept("long", 0, len(kept)) == list(range(len(kept)))
        assert material.kept("long", 0, n + 1) is None  # of other questions


def test_all_of_an_answer_is_scored_and_nothing_of_the_prompt(bench, prompts):
    for prompt in prompts:
        whole = bench.llm.detokenize([*prompt.tokens, *prompt.answer]).decode()
        assert whole.endswith(f" {prompt.references[0]}")
        assert prompt.references[0] in bench.llm.detokenize(list(prompt.answer)).decode()
        assert prompt.references[0] not in whole[-200 : -len(prompt.references[0])]


ALWAYS_THINKING = THINKING_TEMPLATE.partition("{% if enable_thinking")[0] + "<think>"


@pytest.mark.parametrize("template", [THINKING_TEMPLATE, ALWAYS_THINKING], ids=["may", "must"])
def test_a_model_that_thinks_is_asked_to_answer_at_once(tmp_path, template):
    model = scripted_model(tmp_path / "m.gguf", list("yes"), chat_template=template)
    made = Bench(model, 512, ENGINE)
    text = made.llm.detokenize(made._begin("What?"), special=True).decode()
    made.close()
    assert text.count("<think>") == text.count("</think>") == 1
