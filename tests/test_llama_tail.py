"""The tail in `Llama`: which tokens of a prompt read with full attention. The oracle of the logits is numpy."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.errors import OutOfRange
from tests.support.engine import assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import FULL, PREFILL, ScheduleKeys, random_tokens

EXACT = 1e-3
MODES = Sched(24, 4, (PREFILL, FULL, PREFILL, PREFILL))
CONFIG = SWAAConfig(24, 4, force_fa_decode=True, non_sliding_layers=[1], prompt_tail=10)
TOKENS = random_tokens(300)


@pytest.fixture
def load(tiny_model: Path) -> Iterator[Callable[..., Llama]]:
    opened = []

    def make(path: Path = tiny_model, **kwargs: Any) -> Llama:
        exact: dict[str, Any] = {
            "flash_attn": False,
            "type_k": 0,
            "type_v": 0,
            "logits_all": True,
            "n_threads": 1,
            "n_threads_batch": 1,
        }
        opened.append(Llama(str(path), **{"swaa": CONFIG, "n_ctx": 512, "n_ubatch": 32, **exact, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def logits(llm: Llama) -> np.ndarray:
    return llm.scores[: llm.n_tokens].copy()


def expected(*parts: tuple[list[int], bool]) -> np.ndarray:
    """Of tokens fed in turn, each part windowed or not."""
    model = NumpyModel(MODES)
    return np.concatenate([model.feed(tokens, decode=decode) for tokens, decode in parts if tokens])


@pytest.mark.parametrize("tail", [0, 1, 5, 40, 99, 100, 500])
@pytest.mark.parametrize("sizes", [{}, {"n_batch": 16, "n_ubatch": 7}, {"n_batch": 7, "n_ubatch": 7}], ids=str)
def test_the_last_tokens_of_a_prompt_see_all(load, tail, sizes):
    llm = load(swaa=dataclasses.replace(CONFIG, prompt_tail=tail), **sizes)
    prompt = TOKENS[:100]
    llm.eval(prompt)
    begin = max(0, 100 - tail)
    assert_close(logits(llm), expected((prompt[:begin], False), (prompt[begin:], True)), EXACT)


def test_a_prompt_in_pieces_has_its_tail_at_the_end(load):
    llm = load()
    llm.eval(TOKENS[:60], ends_prompt=False)
    llm.eval(TOKENS[60:100])
    assert_close(logits(llm), expected((TOKENS[:90], False), (TOKENS[90:100], True)), EXACT)


def test_what_is_cached_is_not_read_again_for_the_tail(load):
    """A follow-up shorter than the tail is read with full attention as a whole; what was there stays as it was."""
    llm = load()
    llm.eval(TOKENS[:100])
    llm.eval(TOKENS[100:104])
    assert_close(logits(llm), expected((TOKENS[:90], False), (TOKENS[90:100], True), (TOKENS[100:104], True)), EXACT)


@pytest.mark.parametrize(("own", "tail"), [(None, 10), (0, 0), (30, 30)])
def test_generation_has_it_and_may_name_its_own(load, own, tail):
    llm = load()
    answer = []
    for token in llm.generate(TOKENS[:100], temp=0.0, **({} if own is None else {"prompt_tail": own})):
        answer.append(token)
        if len(answer) == 4:
            break
    want = expected((TOKENS[: 100 - tail], False), (TOKENS[100 - tail : 100] + answer[:3], True))
    assert_close(logits(llm)[:103], want, EXACT)
    assert answer == want[99:103].argmax(1).tolist()


def test_a_tail_of_its_own_is_checked(load):
    with pytest.raises(OutOfRange, match="prompt_tail is -1"):
        next(load().generate(TOKENS[:9], prompt_tail=-1))


def test_completions_and_chats_have_it(load):
    with_tail, without = load(), load(swaa=dataclasses.replace(CONFIG, prompt_tail=0))
    text = "the quick brown fox " * 20
    for llm in (with_tail, without):
        llm.create_completion(text, max_tokens=1, temperature=0.0)
    n = with_tail.n_tokens
    assert_close(logits(with_tail)[: n - 11], logits(without)[: n - 11], EXACT)
    assert np.abs(logits(with_tail)[n - 2] - logits(without)[n - 2]).max() > 0.05


def test_progress_counts_the_tail(load):
    seen: list[tuple[int, int]] = []
    load(on_prefill=lambda done, total: seen.append((done, total))).eval(TOKENS[:100])
    assert seen == [(0, 100), (32, 100), (64, 100), (90, 100), (100, 100)]


def test_embeddings_have_none(load):
    texts = "a long text to embed " * 4
    kwargs = {"embedding": True, "logits_all": False}
    with_tail = load(**kwargs).embed(texts)
    without = load(swaa=dataclasses.replace(CONFIG, prompt_tail=0), **kwargs).embed(texts)
    np.testing.assert_allclose(with_tail, without, atol=1e-6)


def test_the_files_tail_is_the_default(load, tiny_model_factory):
    path = tiny_model_factory(schedule=ScheduleKeys(24, 4, MODES.layer_modes), extra={"swaa.tail": 10})
    llm = load(path, swaa=None)
    assert llm.swaa == CONFIG
    llm.eval(TOKENS[:100])
    assert_close(logits(llm), expected((TOKENS[:90], False), (TOKENS[90:100], True)), EXACT)


def test_another_tail_keeps_the_context(load):
    llm = load()
    llm.eval(TOKENS[:60], ends_prompt=False)
    llm.set_schedule(dataclasses.replace(CONFIG, prompt_tail=3))
    assert llm.n_tokens == 60
    assert llm.schedule is not None
    assert llm.schedule.tail == 3
    llm.eval(TOKENS[60:100])
    assert_close(logits(llm), expected((TOKENS[:97], False), (TOKENS[97:100], True)), EXACT)


def test_a_state_is_of_any_tail(load):
    llm = load()
    llm.eval(TOKENS[:60], ends_prompt=False)
    state = llm.save_state()
    other = load(swaa=dataclasses.replace(CONFIG, prompt_tail=3))
    other.load_state(state)
    other.eval(TOKENS[60:100])
    assert_close(logits(other)[60:], expected((TOKENS[:97], False), (TOKENS[97:100], True))[60:], EXACT)


def test_pickling_keeps_it(load):
    llm = pickle.loads(pickle.dumps(load()))
    assert llm.swaa == CONFIG
    llm.close()
