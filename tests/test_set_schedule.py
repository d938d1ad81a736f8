"""`Llama.set_schedule`: one loaded model under several schedules is as good as several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swaa_local.errors import ScheduleError, SWAAError
from swaa_local.llama import Llama
from swaa_local.schedule.config import LayerMode, Schedule, SWAAConfig
from tests.support.tiny import ScheduleKeys, random_tokens

FULL, PREFILL, ALWAYS = LayerMode

pytestmark = pytest.mark.usefixtures("engine")

STORED = ScheduleKeys(window=8, sinks=2, layer_modes=[FULL, PREFILL, ALWAYS, PREFILL])
SCHEDULES: list[Any] = [
    False,
    SWAAConfig(sliding_window_size=16),
    SWAAConfig(sliding_window_size=16, keep_first=4, force_fa_decode=True, non_sliding_layers=[1, 3]),
    Schedule(window=8, sinks=0, layer_modes=(PREFILL, ALWAYS, FULL, FULL)),
    None,
]
KWARGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
PROMPT = random_tokens(100)


@pytest.fixture(scope="module")
def model(tiny_model_factory: Callable[..., Path]) -> str:
    return str(tiny_model_factory(schedule=STORED))


@pytest.fixture
def llm(model: str) -> Iterator[Llama]:
    llm = Llama(model, **KWARGS)
    yield llm
    llm.close()


def greedy(llm: Llama) -> list[int]:
    tokens = llm.generate(PROMPT, temp=0.0)
    return [next(tokens) for _ in range(8)]


def logits(llm: Llama) -> np.ndarray:
    llm.reset()
    llm.eval(PROMPT)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


def test_each_schedule_gives_what_a_fresh_model_gives(llm: Llama, model: str) -> None:
    for swaa in SCHEDULES:
        llm.set_schedule(swaa)
        fresh = Llama(model, swaa=swaa, **KWARGS)
        assert (llm.schedule, llm.swaa, llm.kv_bytes) == (fresh.schedule, fresh.swaa, fresh.kv_bytes)
        assert np.array_equal(logits(llm), logits(fresh))
        assert greedy(llm) == greedy(fresh)
        fresh.close()


def test_none_is_the_schedule_of_the_file(llm: Llama) -> None:
    stored = llm.file_schedule
    assert stored == Schedule(window=8, sinks=2, layer_modes=(FULL, PREFILL, ALWAYS, PREFILL))
    llm.set_schedule(False)
    assert (llm.schedule, llm.file_schedule) == (None, stored)
    llm.set_schedule(None)
    assert llm.schedule == stored


def test_the_new_context_is_empty_and_as_long(llm: Llama) -> None:
    llm.eval(PROMPT)
    llm.set_schedule(False)
    assert (llm.n_tokens, llm.n_ctx()) == (0, 512)
    greedy(llm)
    assert llm.last_run is not None
    assert llm.last_run.cached_tokens == 0


@pytest.mark.parametrize("swaa", [True, 3, SWAAConfig(16, non_sliding_layers=[4]), Schedule(16, 0, (PREFILL,) * 3)])
def test_a_schedule_that_does_not_fit_changes_nothing(llm: Llama, swaa: Any) -> None:
    before = greedy(llm)
    with pytest.raises(ScheduleError):
        llm.set_schedule(swaa)
    assert llm.n_tokens > 0
    assert llm.schedule == llm.file_schedule
    assert greedy(llm) == before


def test_a_closed_model_says_so(llm: Llama) -> None:
    llm.close()
    with pytest.raises(SWAAError, match="closed"):
        llm.set_schedule(False)
