"""Drafts: whatever is drafted, a generation gives what it gives without.

The oracle is the same `Llama` with `speculate=False`, and for the distribution the softmax of its own logits. The cache
is F32 and flash attention off, so that the size of a batch changes no choice.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from swaa_local import Llama, SWAAConfig
from swaa_local.errors import ContextFull, OutOfRange
from tests.support.engine import GPU_LAYERS, cpu_features, quantize
from tests.support.tiny import random_tokens

HAS = cpu_features()
EXACT = HAS.get("AVX2") == "1" and "AMX_INT8" not in HAS and not GPU_LAYERS
TOKENS = random_tokens(300)
N = 60

FA_DECODE = SWAAConfig(sliding_window_size=64, keep_first=4, force_fa_decode=True, non_sliding_layers=[1])
NARROW = SWAAConfig(sliding_window_size=3, force_fa_decode=True)
WITH_RING = SWAAConfig(sliding_window_size=48, keep_first=4, force_fa_decode=[0, 1], non_sliding_layers=[3])
SCHEDULES = {"FA decode": FA_DECODE, "without sinks": NARROW, "with a ring": WITH_RING, "no schedule": False}
DRAFT_WINDOWS = {"FA decode": 64, "without sinks": 3, "with a ring": 48, "no schedule": 100}

SAMPLERS = {
    "greedy": {"temp": 0.0},
    "greedy with penalties": {"temp": 0.0, "repeat_penalty": 1.3, "presence_penalty": 0.2},
    "the defaults": {},
    "hot": {"temp": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "mirostat": {"mirostat_mode": 2},
}


@pytest.fixture
def load(tiny_model):
    opened = []

    def make(path: Path = tiny_model, swaa=FA_DECODE, **kwargs) -> Llama:
        exact = {"flash_attn": False, "type_k": 0, "type_v": 0}
        sizes = {"n_ctx": 1024, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1, "draft_window": 64}
        opened.append(Llama(str(path), swaa=swaa, **{**exact, **sizes, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def say(llm: Llama, speculate: bool, n: int = N, tokens=TOKENS, seed: int = 7, **sampling) -> list[int]:
    """The n tokens that follow, from an empty context."""
    llm.reset()
    llm.set_seed(seed)
    return list(islice(llm.generate(tokens, speculate=speculate, **sampling), n))


# The text


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_text_is_the_one_without_drafts(load, schedule, sampler):
    llm = load(swaa=SCHEDULES[schedule], draft_window=DRAFT_WINDOWS[schedule])
    for seed in (1, 2):
        plain = say(llm, False, seed=seed, **SAMPLERS[sampler])
        assert llm.last_run.drafted_tokens == 0
        assert say(llm, True, seed=seed, **SAMPLERS[sampler]) == plain
        assert llm.last_run.drafted_tokens > llm.last_run.accepted_tokens


def test_accepted_drafts_save_passes(load):
    llm = load()
    say(llm, False, temp=0.0)
    assert (llm.last_run.passes, llm.last_run.tokens_per_pass) == (N - 1, 1)
    say(llm, True, temp=0.0)
    run = llm.last_run
    # Of the last draft, some tokens may not have been asked for.
    assert run.generated_tokens - 1 == run.passes + run.accepted_tokens
    assert run.accepted_tokens > N / 3


def test_a_draft_that_ends_at_once_is_not_tried_for_each_token(load, monkeypatch):
    """As where the model wants to end and may not. Nothing is checked then, so only its time can tell."""
    llm = load(n_ctx=2048)
    tries, draft = [], llm._draft
    monkeypatch.setattr(llm, "_draft", lambda token, n: (tries.append(n), draft(token, n))[1][:0])
    plain = say(llm, False, n=200, tokens=random_tokens(1100), temp=0.0)
    assert say(llm, "auto", n=200, tokens=random_tokens(1100), temp=0.0) == plain
    assert 0 < len(tries) < 20


@pytest.mark.skipif(not EXACT, reason="passes are exact on x86 CPUs")
def test_no_pass_needs_more_cells_than_its_first_token(load, monkeypatch):
    """Attention would be divided between threads otherwise, and its sums with it."""
    llm = load()
    passes, decode = [], llm._decode
    monkeypatch.setattr(
        llm,
        "_decode",
        lambda tokens, *rest, **more: (passes.append((llm.n_tokens, len(tokens))), decode(tokens, *rest, **more))[1],
    )
    say(llm, True, n=250, temp=0.0)
    checked = [(at, n) for at, n in passes if at >= len(TOKENS) and n > 1]
    assert len(checked) > 20
    assert checked[0][0] < 512 < checked[-1][0]
    assert all(at // 256 == (at + n - 1) // 256 for at, n in checked)


def test_the_distribution_is_that_of_full_attention(load):
    """Of the second and third token, over many seeds, where the drafts are often wrong: Pearson's chi squared."""
    llm, n_runs = load(draft_window=16), 500
    sampling = {"temp": 1.0, "top_k": 4, "top_p": 1.0, "min_p": 0.0}
    first = say(llm, False, n=1, temp=0.0)

    def distribution(after: list[int]) -> dict[int, float]:
        oracle.reset()
        oracle.eval(TOKENS)
        for token in after:
            oracle.eval([token], decode=True)
        row = oracle.scores[oracle.n_tokens - 1].astype(float)
        best = np.argsort(row)[-4:]
        p = np.exp(row[best] - row[best].max())
        return dict(zip(best.tolist(), (p / p.sum()).tolist(), strict=True))

    oracle = load(logits_all=True)
    expected: Counter[tuple[int, ...]] = Counter()
    for one, p1 in distribution(first).items():
        for two, p2 in distribution([*first, one]).items():
            expected[one, two] = p1 * p2
    llm.reset()
    llm.eval(TOKENS)
    prompt_end = llm.save_state()
    seen: Counter[tuple[int, ...]] = Counter()
    n_drafted = n_accepted = 0
    for seed in range(n_runs):
        llm.load_state(prompt_end)
        llm.set_seed(seed)
        generation = llm.generate(TOKENS, speculate=True, logits_processor=_force(first, len(TOKENS)), **sampling)
        seen[tuple(islice(generation, 1, 3))] += 1
        n_drafted, n_accepted = n_drafted + llm.last_run.drafted_tokens, n_accepted + llm.last_run.accepted_tokens
    assert 0.05 < n_accepted / n_drafted < 0.95
    assert set(seen) <= set(expected)
    chi = sum((seen[pair] - n_runs * p) ** 2 / (n_runs * p) for pair, p in expected.items())
    freedom = len(expected) - 1
    assert chi < freedom + 4.5 * math.sqrt(2 * freedom)  # by chance less than once in 10,000


def _force(tokens: list[int], start: int) -> LogitsProcessorList:
    """The first tokens after the prompt are these."""

    def process(input_ids, scores):
        i = len(input_ids) - start
        if i < len(tokens):
            scores = np.full_like(scores, -np.inf)
            scores[tokens[i]] = 0
        return scores

    return LogitsProcessorList([process])


def test_a_text_that_repeats_itself_is_looked_up(load):
    """Also where there is no window to draft through."""
    llm = load(swaa=False, draft_window=0)
    plain = say(llm, False, n=300, temp=0.0)
    assert say(llm, True, n=300, temp=0.0) == plain
    assert llm.last_run.accepted_tokens > 0


# What a caller can see


def test_processors_and_criteria_see_the_same(load):
    llm = load()
    calls: dict[bool, list[tuple[str, tuple[int, ...]]]] = {False: [], True: []}
    for speculate, seen in calls.items():

        def process(input_ids, scores, seen=seen):
            seen.append(("process", tuple(input_ids)))
            scores[40:60] = -np.inf
            return scores

        def stop(input_ids, logits, seen=seen):
            seen.append(("stop", tuple(input_ids)))
            return len(input_ids) == len(TOKENS) + 40

        say(
            llm,
            speculate,
            logits_processor=LogitsProcessorList([process]),
            stopping_criteria=StoppingCriteriaList([stop]),
            temp=0.0,
        )
    assert calls[True] == calls[False]
    assert calls[True][-1][0] == "stop"


def test_the_context_holds_what_was_said_and_no_more(load):
    llm = load()
    seen: dict[bool, list[tuple[int, list[int]]]] = {False: [], True: []}
    for speculate, states in seen.items():
        llm.reset()
        for _ in islice(llm.generate(TOKENS, speculate=speculate, temp=0.0), N):
            states.append((llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()))
    assert seen[True] == seen[False]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_state_of_the_middle_of_an_answer(load, schedule):
    kwargs = {"swaa": SCHEDULES[schedule], "draft_window": DRAFT_WINDOWS[schedule]}
    llm, other = load(**kwargs), load(**kwargs)
    whole = say(llm, False, temp=0.0)
    sizes, resumed = set(), []
    for speculate in (False, True):
        llm.reset()
        generation = llm.generate(TOKENS, speculate=speculate, temp=0.0)
        said = list(islice(generation, 20))
        state = llm.save_state()
        sizes.add((state.n_tokens, None if schedule == "with a ring" else state.llama_state_size))
        assert [*said, *islice(generation, N - 20)] == whole  # saving changes nothing
        other.load_state(state)
        # The last token is read as one of the new prompt, so this is not what the first generation says.
        resumed.append(list(islice(other.generate([*TOKENS, *said], speculate=speculate, temp=0.0), N - 20)))
    assert len(sizes) == 1
    assert resumed[0] == resumed[1]


def test_tokens_can_be_sent(load):
    llm = load()
    texts = {}
    for speculate in (False, True):
        llm.reset()
        generation = llm.generate(TOKENS, speculate=speculate, temp=0.0)
        text = list(islice(generation, 10))
        text.append(generation.send([50, 51, 52]))
        texts[speculate] = text + list(islice(generation, 30))
    assert texts[True] == texts[False]


def test_the_end_of_the_context(load):
    llm = load(n_ctx=512)
    texts = {}
    for speculate in (False, True):
        llm.reset()
        said: list[int] = []
        with pytest.raises(ContextFull):
            said.extend(llm.generate(TOKENS, speculate=speculate, temp=0.0))
        texts[speculate] = said
    assert texts[True] == texts[False]
    assert len(texts[True]) == 512 - len(TOKENS) + 1


@pytest.mark.parametrize("when", [1, 2, 5])
def test_an_interrupt_while_drafting(load, monkeypatch, when):
    llm = load()
    whole = say(llm, False, temp=0.0)
    llm.reset()
    generation = llm.generate(TOKENS, speculate=True, temp=0.0)
    said = list(islice(generation, 10))
    make_batch, n_calls = llm._make_batch, 0

    def interrupted(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        if n_calls == when:
            raise KeyboardInterrupt
        return make_batch(*args, **kwargs)

    monkeypatch.setattr(llm, "_make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        said.extend(generation)
    monkeypatch.undo()
    assert said == whole[: len(said)]
    assert llm.n_tokens == len(TOKENS) + len(said) - 1
    more = llm.generate([*TOKENS, *said], speculate=True, temp=0.0)
    assert [*said, *islice(more, N - len(said))] == whole


def test_beside_a_draft_model(load):
    llm = load(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3))
    plain = say(load(), False, temp=0.0)
    assert say(llm, True, temp=0.0) == plain


# The methods


def test_completions_take_the_keyword(load):
    llm = load()
    texts = {}
    for speculate in (False, True):
        llm.reset()
        answer = llm.create_completion(TOKENS, max_tokens=N, temperature=0.9, seed=3, speculate=speculate)
        texts[speculate] = answer["choices"][0]["text"], answer["usage"], answer["choices"][0]["finish_reason"]
        assert bool(llm.last_run.drafted_tokens) == speculate
    assert texts[True] == texts[False]
    llm.reset()
    chunks = llm(TOKENS, max_tokens=N, temperature=0.9, seed=3, speculate=True, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == texts[True][0]
    assert llm.last_run.drafted_tokens
    stop = texts[True][0][20:23]
    for speculate in (False, True):
        llm.reset()
        answer = llm(TOKENS, max_tokens=N, temperature=0.9, seed=3, stop=[stop], speculate=speculate)
        texts[speculate] = answer["choices"][0]["text"], answer["usage"], answer["choices"][0]["finish_reason"]
    assert texts[True] == texts[False]
    assert texts[True][2] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_chats_take_the_keyword(load, stream):
    llm = load()
    messages = [{"role": "user", "content": "what is this? " * 20}]
    texts = {}
    for speculate in (False, True):
        llm.reset()
        answer = llm.create_chat_completion(
            messages, max_tokens=N, temperature=0.0, stream=stream, speculate=speculate, stop=["never"]
        )
        if stream:
            texts[speculate] = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer)
        else:
            texts[speculate] = answer["choices"][0]["message"]["content"]
        assert bool(llm.last_run.drafted_tokens) == speculate
    assert texts[True] == texts[False]


@pytest.mark.skipif(not EXACT, reason="passes of several tokens are those of one on x86 CPUs with AVX2")
@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}])
def test_quantized_models_say_exactly_the_same(load, tiny_model, tmp_path, sampling):
    """As people run them: quantized weights and cache, flash attention, other threads to read than to write."""
    quantized = tmp_path / "q.gguf"
    quantize(tiny_model, quantized, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    for type_kv in (1, 8):
        llm = load(quantized, flash_attn=True, type_k=type_kv, type_v=type_kv, n_threads=1, n_threads_batch=2)
        for seed in range(5):
            plain = say(llm, False, 150, seed=seed, **sampling)
            assert say(llm, True, 150, seed=seed, **sampling) == plain
            run = llm.last_run
            assert run.drafted_tokens > 50
            assert run.drafted_tokens <= 7 * run.passes


@pytest.mark.skipif(not EXACT, reason="passes of several tokens are those of one on x86 CPUs with AVX2")
@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}])
def test_rings_say_exactly_the_same(load, tiny_model, tmp_path, sampling):
    """All logits to the bit, for several rounds of the ring, of 256 cells, at whose end drafts are rejected as well."""
    quantized = tmp_path / "q.gguf"
    quantize(tiny_model, quantized, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    ring = SWAAConfig(sliding_window_size=48, keep_first=4)
    llm = load(quantized, swaa=ring, n_ctx=2048, flash_attn=True, type_k=1, type_v=1, logits_all=True)
    for seed in range(4):
        prompt = random_tokens(300, seed=seed)
        plain = say(llm, False, 900, prompt, seed, **sampling)
        logits = llm.scores[: llm.n_tokens].copy()
        assert say(llm, True, 900, prompt, seed, **sampling) == plain
        assert np.array_equal(llm.scores[: llm.n_tokens], logits)
        assert llm.last_run.drafted_tokens > llm.last_run.accepted_tokens > 500


def test_drafts_are_automatic_where_nobody_says(load):
    assert load().speculate == "auto"


def test_the_constructor_decides_where_a_call_does_not(load):
    llm = load(speculate=True)
    llm.create_completion(TOKENS, max_tokens=10, temperature=0.0)
    assert llm.last_run.drafted_tokens
    llm.create_completion(TOKENS, max_tokens=10, temperature=0.0, speculate=False)
    assert not llm.last_run.drafted_tokens
    llm.speculate = False
    llm.create_completion(TOKENS, max_tokens=10, temperature=0.0)
    assert not llm.last_run.drafted_tokens


@pytest.mark.parametrize("value", ["always", 1, 0.5, "True"])
def test_other_values_are_refused(load, value):
    with pytest.raises(OutOfRange, match="speculate is"):
        load(speculate=value)
    llm = load()
    with pytest.raises(OutOfRange, match="speculate is"):
        llm.create_completion("a", speculate=value)
    with pytest.raises(OutOfRange, match="speculate is"):
        next(llm.generate(TOKENS, speculate=value))


def test_logprobs(load):
    llm = load(logits_all=True)
    answers = {}
    for speculate in (False, True):
        llm.reset()
        answer = llm.create_completion(TOKENS, max_tokens=N, temperature=0.0, logprobs=3, speculate=speculate)
        answers[speculate] = answer["choices"][0]
        assert bool(llm.last_run.drafted_tokens) == speculate
    plain, drafted = (answers[speculate]["logprobs"] for speculate in (False, True))
    assert drafted["tokens"] == plain["tokens"]
    np.testing.assert_allclose(drafted["token_logprobs"], plain["token_logprobs"], atol=1e-3)
    assert [list(top) for top in drafted["top_logprobs"]] == [list(top) for top in plain["top_logprobs"]]


def test_grammars(load):
    llm = load()
    grammar = 'root ::= ("ab" | "cd" | "e" [0-9]+ " ")+'
    texts = {}
    for speculate in (False, True):
        llm.reset()
        made = LlamaGrammar.from_string(grammar, verbose=False)
        answer = llm(TOKENS, max_tokens=40, temperature=0.7, seed=2, grammar=made, speculate=speculate)
        texts[speculate] = answer["choices"][0]["text"]
    assert texts[True] == texts[False] != ""
    assert llm.last_run.accepted_tokens


def test_a_short_context_has_no_drafts_by_itself(load):
    llm = load(speculate="auto")
    say(llm, "auto", temp=0.0)
    assert llm.last_run.drafted_tokens == 0
