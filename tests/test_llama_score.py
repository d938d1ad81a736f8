"""`Llama.score`: the probability of an answer's tokens. The oracle is numpy's model under the same masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.errors import DecodeError, PromptTooLong
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

MODES = (PREFILL, FULL, PREFILL, PREFILL)
CONFIG = SWAAConfig(24, 4, force_fa_decode=True, non_sliding_layers=[1], prompt_tail=10)
TOKENS = random_tokens(200)
ANSWER = random_tokens(9, seed=5)


@pytest.fixture
def load(tiny_model: Path) -> Iterator[Callable[..., Llama]]:
    opened = []

    def make(**kwargs: Any) -> Llama:
        exact = {"flash_attn": False, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
        opened.append(Llama(str(tiny_model), **{"swaa": CONFIG, "n_ctx": 512, "n_ubatch": 32, **exact, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def expected(prompt: list[int], answer: list[int], tail: int, modes=MODES, temperature: float = 1.0) -> np.ndarray:
    """log softmax of numpy's logits, the prompt windowed up to its tail and everything after it decoded."""
    model = NumpyModel(Sched(24, 4, modes))
    n = len(prompt) - tail
    rows = np.concatenate(
        [model.feed(part, decode=decode) for part, decode in ((prompt[:n], False), (prompt[n:] + answer, True)) if part]
    )
    rows = rows[len(prompt) - 1 : -1].astype(np.float64) / temperature
    rows -= rows.max(axis=1, keepdims=True)
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return logprobs[np.arange(len(answer)), answer]


@pytest.mark.parametrize("tail", [0, 1, 10, 60])
@pytest.mark.parametrize("sizes", [{}, {"n_batch": 16, "n_ubatch": 7}, {"logits_all": True}], ids=str)
def test_probabilities_are_those_of_the_logits(load, tail, sizes):
    llm = load(swaa=dataclasses.replace(CONFIG, prompt_tail=tail), **sizes)
    score = llm.score(TOKENS, ANSWER, temperatures=(1.0, 0.5))
    assert score.logprobs.shape == (2, len(ANSWER))
    np.testing.assert_allclose(score.logprobs[0], expected(TOKENS, ANSWER, tail), atol=2e-3)
    np.testing.assert_allclose(score.logprobs[1], expected(TOKENS, ANSWER, tail, temperature=0.5), atol=4e-3)


@pytest.mark.parametrize("n_answer", [1, 2, 65, 66, 130])
def test_an_answer_of_any_length_is_scored_whole(load, n_answer):
    answer = random_tokens(n_answer, seed=7)
    score = load().score(TOKENS, answer)
    np.testing.assert_allclose(score.logprobs[0], expected(TOKENS, answer, 10), atol=2e-3)


def test_greedy_is_what_would_be_generated(load):
    llm = load()
    generated = [token for token, _ in zip(llm.generate(TOKENS, temp=0.0), range(8), strict=False)]
    assert llm.score(TOKENS, generated).greedy.all()
    other = [*generated[:4], (generated[4] + 1) % llm.n_vocab(), *generated[5:]]
    assert llm.score(TOKENS, other).greedy.tolist()[:5] == [True] * 4 + [False]


@pytest.mark.parametrize("tail", [0, 10, 60])
@pytest.mark.parametrize("modes", [MODES, (ALWAYS, PREFILL, FULL, ALWAYS)], ids=str)
def test_reusing_a_text_gives_the_score_of_reading_it_anew(load, tail, modes):
    """Questions of different lengths behind one text, in an order in which tails begin earlier and later."""
    config = Sched(24, 4, modes)
    swaa = SWAAConfig(
        24,
        4,
        force_fa_decode=[i for i, mode in enumerate(modes) if mode == PREFILL],
        non_sliding_layers=[i for i, mode in enumerate(modes) if mode == FULL],
        prompt_tail=tail,
    )
    assert tuple(swaa.schedule(4).layer_modes) == config.layer_modes
    llm, read = load(swaa=swaa), []
    llm.on_prefill = lambda done, total: read.append(total) if done == 0 else None
    for n_question, seed in ((30, 1), (5, 2), (55, 3), (30, 4)):
        prompt = TOKENS + random_tokens(n_question, seed=seed)
        got = llm.score(prompt, ANSWER, reuse=True).logprobs[0]
        np.testing.assert_allclose(got, expected(prompt, ANSWER, min(tail, len(prompt)), modes), atol=2e-3)
    assert read[0] == 230
    assert max(read[1:]) < 230  # the text was kept


def test_another_tail_keeps_what_stands_before_both(load):
    llm, read = load(), []
    llm.score(TOKENS, ANSWER)
    llm.set_schedule(dataclasses.replace(CONFIG, prompt_tail=40))
    llm.on_prefill = lambda done, total: read.append(total) if done == 0 else None
    got = llm.score(TOKENS, ANSWER, reuse=True).logprobs[0]
    np.testing.assert_allclose(got, expected(TOKENS, ANSWER, 40), atol=2e-3)
    assert read == [40]


def test_another_text_is_read_whole(load):
    llm = load()
    llm.score(TOKENS, ANSWER)
    other = random_tokens(150, seed=9)
    np.testing.assert_allclose(llm.score(other, ANSWER, reuse=True).logprobs[0], expected(other, ANSWER, 10), atol=2e-3)


def test_what_cannot_be_scored_is_refused_and_changes_nothing(load):
    llm = load()
    with pytest.raises(DecodeError, match="nothing to score: 200 tokens of prompt and 0 of answer"):
        llm.score(TOKENS, [])
    with pytest.raises(DecodeError, match="nothing to score: 0 tokens of prompt"):
        llm.score([], ANSWER)
    with pytest.raises(PromptTooLong, match="prompt is 513 tokens"):
        llm.score(random_tokens(504), ANSWER)
    with pytest.raises(DecodeError, match="invalid token"):
        llm.score(TOKENS, [llm.n_vocab()])
    assert llm.score(TOKENS, ANSWER).greedy.shape == (9,)
