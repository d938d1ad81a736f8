"""`Llama` on a hybrid model: generating, going back in a conversation, states, prefixes, and what is refused.

The oracle of the logits is the numpy reference; that of a conversation that goes back is the same text read anew.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from swaa_local import Llama, ScheduleError, SWAAConfig
from swaa_local.engine import checkpoints, memory
from swaa_local.engine.context_length import ContextFitWarning
from swaa_local.errors import ContextTooLarge, OutOfRange, StateError
from swaa_local.prefix_cache.store import PrefixCache
from tests.support import tiny_hybrid
from tests.support.engine import assert_close
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens
from tests.support.tiny_hybrid import ATTENDING, forward_hybrid, hybrid, write_tiny_hybrid

EXACT = 1e-3
TOKENS = random_tokens(900)
SCHEDULES: dict[str, Any] = {
    "full attention": False,
    "FA decode": SWAAConfig(24, 4, True, [ATTENDING[1]]),
    "FA decode with a tail": SWAAConfig(24, 4, True, prompt_tail=16),
    "rings": SWAAConfig(24, 4),
    "all modes": SWAAConfig(24, 4, [ATTENDING[0]], [ATTENDING[1]]),
}
Load = Callable[..., Llama]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hybrid(tmp_path_factory.mktemp("hybrid") / "model.gguf")


@pytest.fixture
def load(path: Path) -> Iterator[Load]:
    opened: list[Llama] = []

    def make(swaa: Any = False, **kwargs: Any) -> Llama:
        threads = {"n_threads": 1, "n_threads_batch": 1}
        opened.append(Llama(str(path), swaa=swaa, **{"n_ctx": 2048, "n_ubatch": 64, **threads, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def answer(llm: Llama, prompt: list[int], n: int = 12) -> list[int]:
    return list(islice(llm.generate(prompt, temp=0.0), n))


def parts_read(llm: Llama, run: Callable[[], Any]) -> int:
    """Tokens of prompts that are evaluated while this runs."""
    read: list[int] = []
    llm.on_prefill = lambda _done, total: read.append(total)
    run()
    llm.on_prefill = None
    return max(read, default=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_prompts_and_answers_are_read_in_their_phases(load, name):
    llm = load(SCHEDULES[name], flash_attn=False, type_k=0, type_v=0, logits_all=True)
    said = answer(llm, TOKENS[:300])
    text = [*TOKENS[:300], *said[:-1]]
    modes = llm.schedule.layer_modes if llm.schedule else hybrid(1, 0, (FULL,) * 4).layer_modes
    window, sinks, tail = (llm.schedule.window, llm.schedule.sinks, llm.schedule.tail) if llm.schedule else (1, 0, 0)
    schedule = hybrid(window, sinks, [modes[layer] for layer in ATTENDING])
    assert_close(llm.scores[: len(text)], forward_hybrid(text, schedule, 300 - tail), EXACT)


def test_layers_are_counted_where_they_are_listed(load):
    llm = load(SWAAConfig(24, 4, [ATTENDING[0]], [ATTENDING[1]]))
    assert llm.schedule is not None
    assert llm.schedule.layer_modes == hybrid(24, 4, (PREFILL, FULL, ALWAYS, ALWAYS)).layer_modes
    with pytest.raises(ScheduleError, match=r"layer 2 is recurrent and cannot slide.* 1, 3, 4, 6"):
        llm.set_schedule(SWAAConfig(24, 4, [2]))
    llm.set_schedule(False)
    assert llm.schedule is None


# Conversations


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_conversation_goes_on_where_it_was(load, name):
    """Nothing of it is read again."""
    llm, anew = load(SCHEDULES[name]), load(SCHEDULES[name])
    first = answer(llm, TOKENS[:300])
    prompt = [*TOKENS[:300], *first, *TOKENS[400:440]]
    assert parts_read(llm, lambda: answer(llm, prompt, 1)) <= 41  # with the last token of the answer
    anew.eval(TOKENS[:300])
    anew.eval(first[:-1], decode=True)
    anew.eval([first[-1], *TOKENS[400:440]])
    said = answer(llm, prompt)
    again = [int(anew.sample(temp=0.0))]
    while len(again) < len(said):
        anew.eval(again[-1:], decode=True)
        again.append(int(anew.sample(temp=0.0)))
    assert said == again


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_end_of_a_prompt_is_read_from_a_checkpoint(load, name):
    """A state cannot be cut, but what it was near the end of the last prompt is kept; answers are those of a reading
    from the beginning."""
    llm = load(SCHEDULES[name])
    answer(llm, TOKENS[:600])
    for end in (TOKENS[700:710], TOKENS[720:790]):
        prompt = [*TOKENS[:590], *end]
        assert 0 < parts_read(llm, lambda prompt=prompt: answer(llm, prompt, 1)) <= 2 * 64 + len(end)
        got = answer(llm, prompt)
        assert got == answer(load(SCHEDULES[name]), prompt)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_text_with_another_beginning_is_read_as_a_whole(load, name):
    llm = load(SCHEDULES[name])
    answer(llm, TOKENS[:300])
    prompt = [*TOKENS[:5], *TOKENS[400:600]]
    assert parts_read(llm, lambda: answer(llm, prompt, 1)) == len(prompt)
    assert answer(llm, prompt) == answer(load(SCHEDULES[name]), prompt)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_prompt_again(load, name):
    llm = load(SCHEDULES[name])
    said = answer(llm, TOKENS[:300])
    assert answer(llm, TOKENS[:300]) == said
    assert answer(llm, TOKENS[:200]) == answer(load(SCHEDULES[name]), TOKENS[:200])


def test_eval_after_going_back_reads_what_it_must(load):
    llm = load(SCHEDULES["FA decode"], flash_attn=False, type_k=0, type_v=0, logits_all=True)
    llm.eval(TOKENS[:200])
    llm.n_tokens = 150
    llm.eval(TOKENS[300:320])
    text = [*TOKENS[:150], *TOKENS[300:320]]
    schedule = hybrid(24, 4, (PREFILL, FULL, PREFILL, PREFILL))
    assert_close(llm.scores[: len(text)], forward_hybrid(text, schedule), EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scores_of_many_questions_about_one_text(load, name):
    """Which is read once, but for its end; a score is that of a cold reading."""
    llm = load(SCHEDULES[name], n_ubatch=64)
    for seed in (1, 2, 3):
        prompt, said = [*TOKENS[:600], *random_tokens(20, seed=seed)], random_tokens(8, seed=9)
        read = parts_read(llm, lambda prompt=prompt, said=said: llm.score(prompt, said, reuse=True))
        assert read == len(prompt) if seed == 1 else read <= 2 * 64 + 20
        warm = llm.score(prompt, said, reuse=True)
        cold = load(SCHEDULES[name], n_ubatch=64).score(prompt, said)
        assert np.allclose(warm.logprobs, cold.logprobs, atol=2e-3)


def test_reset_begins_anew(load):
    llm = load(SCHEDULES["FA decode"])
    said = answer(llm, TOKENS[:300])
    llm.reset()
    assert answer(llm, TOKENS[:300]) == said


# Stopped


def test_a_prompt_that_was_stopped_goes_on_from_there(load):
    llm = load(SCHEDULES["FA decode"])

    def stop(done: int, _total: int) -> None:
        if done >= 128:
            raise KeyError

    llm.on_prefill = stop
    with pytest.raises(KeyError):
        answer(llm, TOKENS[:300])
    llm.on_prefill = None
    said = answer(llm, TOKENS[:300])
    assert llm.last_run is not None
    assert llm.last_run.cached_tokens == 128
    assert said == answer(load(SCHEDULES["FA decode"]), TOKENS[:300])


@pytest.mark.parametrize("name", ["full attention", "FA decode", "rings"])
def test_ctrl_c_while_llama_cpp_computes(load, name):
    """A state that was half computed is not gone on from: it is taken back to a checkpoint, or begun anew."""
    llm = load(SCHEDULES[name], n_batch=128)
    started = threading.Event()
    llm.on_prefill = lambda _done, _total: started.set()
    killer = threading.Thread(target=lambda: (started.wait(), os.kill(os.getpid(), signal.SIGINT)))
    killer.start()

    def read_over_and_over() -> None:
        while True:
            answer(llm, TOKENS, 1)
            llm.reset()

    with pytest.raises(KeyboardInterrupt):
        read_over_and_over()
    killer.join()
    llm.on_prefill = None
    assert answer(llm, TOKENS) == answer(load(SCHEDULES[name], n_batch=128), TOKENS)


# States


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_state_goes_on_as_what_it_was_taken_of(load, name):
    llm = load(SCHEDULES[name])
    answer(llm, TOKENS[:300])
    state = llm.save_state()
    copy = load(SCHEDULES[name])
    copy.load_state(state)
    assert copy.n_tokens == llm.n_tokens
    more = [*llm.input_ids[: llm.n_tokens].tolist(), *TOKENS[500:540]]
    assert answer(copy, more) == answer(llm, more)


def test_a_state_of_another_schedule_is_refused(load):
    llm, other = load(SCHEDULES["FA decode"]), load(SCHEDULES["rings"])
    llm.eval(TOKENS[:100])
    with pytest.raises(StateError, match="schedule"):
        other.load_state(llm.save_state())
    assert other.n_tokens == 0
    assert answer(other, TOKENS[:200]) == answer(load(SCHEDULES["rings"]), TOKENS[:200])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_text_on_disk_is_taken_up_at_its_end(load, tmp_path, name):
    first, second = TOKENS[600:640], TOKENS[700:760]

    def ask(question: list[int], *, cache: bool = True) -> tuple[list[int], int]:
        llm = load(SCHEDULES[name])
        if cache:
            llm.set_cache(PrefixCache(tmp_path / "states"))
        said = list(islice(llm.generate([*TOKENS[:600], *question], temp=0.0, document_ends=[600]), 12))
        assert llm.last_run is not None
        return said, llm.last_run.cached_tokens

    assert ask(first)[1] == 0
    assert ask(second) == (ask(second, cache=False)[0], 600)


# What is refused


def test_drafts(load):
    with pytest.raises(OutOfRange, match="speculate is True, but the model has recurrent layers"):
        load(speculate=True)
    with pytest.raises(OutOfRange, match="draft_model is given, but the model has recurrent layers"):
        load(draft_model=LlamaPromptLookupDecoding())
    with pytest.raises(ScheduleError, match="'lfm2' has recurrent layers, whose state cannot take drafts back"):
        load(SCHEDULES["FA decode"], draft_window=128)
    llm = load(SCHEDULES["FA decode"])
    assert llm.draft_window == 0
    with pytest.raises(OutOfRange, match="speculate is True"):
        llm.create_completion("abcabcabcabc", max_tokens=4, speculate=True)
    text = "abcabcabcabc" * 20
    plain, auto = (
        llm.create_completion(text, max_tokens=8, temperature=0, speculate=how)["choices"][0]["text"]
        for how in (False, "auto")
    )
    assert plain == auto
    assert llm.last_run is not None
    assert llm.last_run.drafted_tokens == 0


# Memory


def test_a_context_whose_states_the_memory_cannot_hold_is_refused_before_it_is_made(tmp_path, monkeypatch):
    """The cache of 256 tokens takes 256 KiB, the last 2048 inputs of three convolutions 3 MiB."""
    monkeypatch.setattr(tiny_hybrid, "L_CACHE", 2049)
    path = write_tiny_hybrid(tmp_path / "m.gguf")
    monkeypatch.setattr(memory, "most_host_bytes", lambda: 2 << 20)
    with pytest.raises(ContextTooLarge, match=r"^a context of 256 tokens needs a KV cache of 3\.\d MiB, and") as error:
        Llama(str(path), n_ctx=256)
    assert error.value.n_ctx_fits == 0
    assert "free some memory" in str(error.value)
    monkeypatch.setattr(memory, "most_host_bytes", lambda: 4 << 20)
    llm = Llama(str(path), n_ctx=256)
    assert llm.kv_bytes == error.value.needed_bytes - 256 * memory._CELL_BYTES
    llm.close()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("most", [40 << 10, 1 << 20, 256 << 20])
def test_checkpoints_take_no_more_than_is_estimated(load, monkeypatch, name, most):
    monkeypatch.setattr(checkpoints, "MOST_BYTES", most)
    chosen: list[Any] = []
    monkeypatch.setattr(memory, "fit_n_ctx", lambda cost, *_args, **_free: chosen.append(cost) or 2048)
    with pytest.warns(ContextFitWarning):
        llm = load(SCHEDULES[name], n_ubatch=8, n_batch=8, n_ctx=0)
    answer(llm, TOKENS, 1)
    kept = [each.nbytes for each in llm._checkpoints._kept.values()]
    estimate = chosen[0].checkpoints(2048)
    assert sum(kept) <= estimate <= chosen[0].host(2048) - llm.kv_bytes
    assert estimate <= max(most, 2 * most)
    if sum(kept) + max(kept) > most:  # the bound was met
        assert estimate < 4 * sum(kept)
