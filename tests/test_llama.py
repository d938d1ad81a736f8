"""`Llama`: schedule, phases, limits, defaults and the places where it stands in for `llama_cpp.Llama`.

The oracle of the logits is the numpy reference; where llama_cpp's own class is the oracle, it is used unchanged.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import closing
from itertools import islice
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from swaa_local import Llama, PromptTooLong, Schedule, ScheduleError, SWAAConfig, SWAAError
from swaa_local.engine import memory
from swaa_local.errors import ContextFull, ModelLoadError, StateError
from swaa_local.schedule.config import default_n_ubatch
from tests.support.engine import assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

EXACT = 1e-3
FA_DECODE = SWAAConfig(sliding_window_size=24, keep_first=4, force_fa_decode=True, non_sliding_layers=[1])
RING = SWAAConfig(sliding_window_size=24, keep_first=4)
FA_DECODE_MODES = Sched(24, 4, (PREFILL, FULL, PREFILL, PREFILL))
RING_MODES = Sched(24, 4, (ALWAYS,) * 4)
TOKENS = random_tokens(700)


@pytest.fixture
def load(tiny_model):
    opened = []

    def make(path: Path = tiny_model, **kwargs) -> Llama:
        threads = {"n_threads": 1, "n_threads_batch": 1}
        opened.append(Llama(str(path), **{"n_ctx": 1024, "n_ubatch": 32, **threads, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


@pytest.fixture
def exact(load):
    """Like `load`, with everything that makes logits comparable to float64: f32 cache, no flash attention, all rows."""

    def make(swaa=FA_DECODE, **kwargs) -> Llama:
        return load(swaa=swaa, flash_attn=False, type_k=0, type_v=0, logits_all=True, **kwargs)

    return make


def logits(llm: Llama) -> np.ndarray:
    return llm.scores[: llm.n_tokens].copy()


# The schedule


def test_the_files_schedule_is_the_default(load, tiny_model_factory):
    llm = load(tiny_model_factory(schedule=FA_DECODE_MODES))
    assert llm.swaa == FA_DECODE
    assert llm.schedule == Schedule(24, 4, FA_DECODE_MODES.layer_modes)


def test_false_means_full_attention(load, exact, tiny_model_factory):
    llm = exact(swaa=False, path=tiny_model_factory(schedule=FA_DECODE_MODES))
    assert (llm.swaa, llm.schedule) == (None, None)
    llm.eval(TOKENS[:100])
    assert_close(logits(llm), forward(TOKENS[:100]), EXACT)


def test_a_config_replaces_the_files_schedule(exact, tiny_model_factory):
    llm = exact(swaa=RING, path=tiny_model_factory(schedule=FA_DECODE_MODES))
    assert llm.swaa == RING
    llm.eval(TOKENS[:100])
    assert_close(logits(llm), forward(TOKENS[:100], RING_MODES), EXACT)


def test_no_schedule_anywhere_is_none(load):
    assert load().swaa is None


@pytest.mark.parametrize("wrong", [True, 256, {"sliding_window_size": 256}])
def test_swaa_of_another_type_is_refused(tiny_model, wrong):
    with pytest.raises(ScheduleError, match="swaa must be None, False or an SWAAConfig"):
        Llama(str(tiny_model), swaa=wrong)


def test_a_layer_past_the_last_is_refused_with_the_layer_count(tiny_model):
    with pytest.raises(ScheduleError, match="4 layers"):
        Llama(str(tiny_model), swaa=SWAAConfig(24, non_sliding_layers=[4]), n_ctx=256)


# Phases


def test_eval_is_prefill_and_eval_decode_is_decode(exact):
    llm = exact()
    llm.eval(TOKENS[:100])
    llm.eval(TOKENS[100:101])  # one token, and still prompt
    llm.eval(TOKENS[101:140], decode=True)  # many, and still generated
    llm.eval(TOKENS[140:200])
    phases = np.array([101 <= i < 140 for i in range(200)])
    assert_close(logits(llm), NumpyModel(FA_DECODE_MODES).feed(TOKENS[:200], decode=phases), EXACT)


def test_generate_prefills_the_prompt_and_decodes_the_answer(exact):
    llm = exact()
    answer = list(islice(llm.generate(TOKENS[:150], temp=0.0), 60))
    want = forward(TOKENS[:150] + answer, FA_DECODE_MODES, prompt_end=150)
    assert answer == want[149:-1].argmax(axis=1).tolist()
    assert_close(logits(llm), want[: llm.n_tokens], EXACT)


def test_the_replayed_last_token_of_a_cached_prompt_is_prefill(exact):
    llm = exact()
    next(llm.generate(TOKENS[:150], temp=0.0))
    llm.eval(TOKENS[150:200])
    next(llm.generate(TOKENS[:120], temp=0.0))  # held in full: only its last token is evaluated, alone in its batch
    assert llm.last_run.cached_tokens == 119
    assert_close(logits(llm)[119:120], forward(TOKENS[:120], FA_DECODE_MODES)[119:], EXACT)


def test_a_prefix_is_reused_and_the_rest_prefilled(exact):
    llm = exact()
    first = list(islice(llm.generate(TOKENS[:100], temp=0.0), 20))
    second = TOKENS[:100] + first[:10] + TOKENS[200:240]
    next(llm.generate(second, temp=0.0))
    reference = NumpyModel(FA_DECODE_MODES)
    want = [reference.feed(second[:100]), reference.feed(second[100:110], decode=True), reference.feed(second[110:])]
    assert llm.last_run.cached_tokens == 110
    assert_close(logits(llm), np.concatenate(want), EXACT)


def test_completion_and_chat_go_through_the_same_phases(exact):
    llm = exact()
    answer = llm.create_completion(TOKENS[:150], max_tokens=20, temperature=0)["choices"][0]["text"]
    llm.reset()
    chunks = llm(TOKENS[:150], max_tokens=20, temperature=0, stream=True)
    assert answer == "".join(chunk["choices"][0]["text"] for chunk in chunks)
    decoded = llm.n_tokens - 150
    want = forward(llm.input_ids[: llm.n_tokens].tolist(), FA_DECODE_MODES, prompt_end=150)
    assert decoded == 19
    assert_close(logits(llm), want, EXACT)
    reply = llm.create_chat_completion([{"role": "user", "content": "hello " * 20}], max_tokens=20, temperature=0)
    n_prompt = reply["usage"]["prompt_tokens"]
    want = forward(llm.input_ids[: llm.n_tokens].tolist(), FA_DECODE_MODES, prompt_end=n_prompt)
    assert_close(logits(llm), want, EXACT)


def test_drafted_tokens_are_decoded_and_change_no_answer(exact, load):
    prompt = TOKENS[:40] * 3
    plain = list(islice(exact().generate(prompt, temp=0.0), 40))
    drafting = exact(draft_model=LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=6))
    drafted = list(islice(drafting.generate(prompt, temp=0.0), 40))
    assert drafted == plain
    assert drafting.last_run.generated_tokens == 40


def test_logits_processors_see_every_position_and_steer(exact):
    llm, seen = exact(), []

    def forbid(input_ids, scores):
        seen.append(len(input_ids))
        scores = np.array(scores)
        scores[int(scores.argmax())] = -np.inf
        return scores

    stream = llm.generate(TOKENS[:100], temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([forbid]))
    answer = list(islice(stream, 10))
    want = forward(TOKENS[:100] + answer, FA_DECODE_MODES, prompt_end=100)[99:-1]
    assert answer == np.argsort(want, axis=1)[:, -2].tolist()
    assert seen == list(range(100, 110))


def test_sent_tokens_follow_the_answer_and_are_decoded(load):
    llm = load(swaa=FA_DECODE, flash_attn=False, type_k=0, type_v=0)
    stream = llm.generate(TOKENS[:100], temp=0.0)
    first = [next(stream), next(stream)]
    third = stream.send(TOKENS[300:320])
    fourth = next(stream)
    text = TOKENS[:100] + first + TOKENS[300:320] + [third]
    want = forward([*text, fourth], FA_DECODE_MODES, prompt_end=100)
    assert llm.input_ids[: llm.n_tokens].tolist() == text
    assert (third, fourth) == (want[-3].argmax(), want[-2].argmax())


def test_a_phase_does_not_leak_out_of_a_paused_generator(exact):
    llm = exact()
    stream = llm.generate(TOKENS[:50], temp=0.0)
    next(stream), next(stream)
    llm.reset()
    llm.eval(TOKENS[:120])
    assert_close(logits(llm), forward(TOKENS[:120], FA_DECODE_MODES), EXACT)


# The ring


def test_a_ring_that_lost_the_prefix_is_evaluated_again(exact):
    llm = exact(RING)
    next(llm.generate(TOKENS[:600], temp=0.0))
    second = TOKENS[:100] + TOKENS[650:680]
    next(llm.generate(second, temp=0.0))
    assert llm.last_run.cached_tokens == 0
    assert_close(logits(llm), forward(second, RING_MODES), EXACT)


def test_eval_after_going_back_evaluates_a_lost_ring_again_with_the_same_phases(exact):
    modes = Sched(24, 4, (ALWAYS, PREFILL, ALWAYS, PREFILL))
    llm = exact(SWAAConfig(24, 4, force_fa_decode=[1, 3]))
    llm.eval(TOKENS[:80])
    llm.eval(TOKENS[80:100], decode=True)
    llm.eval(TOKENS[100:600], decode=True)
    llm.n_tokens = 100  # what upstream's own code does to go back
    llm.eval(TOKENS[600:610], decode=True)
    tokens = TOKENS[:100] + TOKENS[600:610]
    assert_close(logits(llm), forward(tokens, modes, prompt_end=80), EXACT)


def test_a_ring_is_smaller_than_the_context(load):
    full, ring = load(swaa=False, n_ctx=4096), load(swaa=RING, n_ctx=4096)
    assert full.kv_bytes == 4096 * 4 * 2 * 64 * 2  # cells, layers, K and V, elements, bytes of f16
    assert ring.kv_bytes == full.kv_bytes * 256 // 4096


# Limits


def test_a_prompt_that_does_not_fit_names_both_counts_and_the_remedy(load):
    llm = load(n_ctx=256)
    message = r"^prompt is 600 tokens but the context is 256; pass n_ctx=1280 or shorten it$"
    for attempt in (
        lambda: llm(TOKENS[:600], max_tokens=1),
        lambda: list(llm(TOKENS[:600], stream=True)),
        lambda: next(llm.generate(TOKENS[:600])),
        lambda: llm.eval(TOKENS[:600]),
    ):
        with pytest.raises(PromptTooLong, match=message):
            attempt()
        assert llm.n_tokens == 0
    with pytest.raises(ValueError, match=r"prompt is \d+ tokens but the context is 256"):
        llm.create_chat_completion([{"role": "user", "content": "x" * 600}])


def test_a_prompt_error_keeps_what_was_there(load):
    llm = load(n_ctx=256)
    llm.eval(TOKENS[:200])
    with pytest.raises(PromptTooLong, match="prompt is 300 tokens"):
        llm.eval(TOKENS[200:300])
    assert llm.n_tokens == 200


def test_a_full_context_ends_generation_with_an_error(load):
    llm = load(n_ctx=256)
    with pytest.raises(ContextFull, match="256 tokens is full"):
        list(llm.generate(TOKENS[:250], temp=0.0))
    assert llm.n_tokens == 256


def test_the_context_is_what_llama_cpp_made_of_it(load):
    llm = load(n_ctx=300)
    assert llm.n_ctx() == 512
    llm.eval(TOKENS[:500])
    assert llm.n_tokens == 500


def test_the_models_own_context_is_the_default(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(n_ctx=0).n_ctx() == 4096
        assert load(n_ctx=None).n_ctx() == 4096


def test_a_context_that_does_not_fit_is_shortened_with_a_warning(load, tiny_model_factory, monkeypatch):
    long = tiny_model_factory(n_ctx_train=1 << 20)
    monkeypatch.setattr(memory, "free_host_bytes", lambda **_: 512 << 20)
    with pytest.warns(UserWarning, match=r"1048576 tokens does not fit the free memory; using \d+"):
        llm = load(long, n_ctx=0)
    assert memory.MIN_N_CTX < llm.n_ctx() < 1 << 20
    assert llm.kv_bytes < 512 << 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(long, n_ctx=0, swaa=RING).n_ctx() == 1 << 20  # all rings: the length costs nothing
        assert load(long, n_ctx=8192).n_ctx() == 8192


@pytest.mark.parametrize("swaa", [False, FA_DECODE, RING])
@pytest.mark.parametrize("kv_type", [1, 8])
def test_the_estimate_of_the_cache_is_what_llama_cpp_allocates(load, swaa, kv_type):
    llm = load(swaa=swaa, type_k=kv_type, type_v=kv_type, n_ctx=2048)
    cost = memory.context_cost(
        llm.model, llm.schedule, llm.context_params, n_ubatch=32, n_gpu_layers=0, logits_all=False
    )
    assert cost.kv(2048) == llm.kv_bytes


def test_the_context_is_never_useless(load, tiny_model_factory, monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda **_: 0)
    with pytest.warns(UserWarning, match="using 4096"):
        assert load(tiny_model_factory(n_ctx_train=1 << 20), n_ctx=0).n_ctx() == memory.MIN_N_CTX
    assert load(n_ctx=0).n_ctx() == 4096


# Errors


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (Sched(0, 4, (PREFILL,) * 4), r"swaa\.window"),
        (Sched(24, 4, (PREFILL,) * 3), r"swaa\.layer_modes"),
        (Sched(24, 4, (7,) * 4), r"swaa\.layer_modes"),
    ],
)
def test_a_malformed_schedule_is_reported_in_the_engines_words(tiny_model_factory, capfd, schedule, reason):
    with pytest.raises(ModelLoadError, match=reason) as caught:
        Llama(str(tiny_model_factory(schedule=schedule)), n_ctx=256)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_garbage_and_missing_files(tmp_path, capfd):
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"this is no model" * 100)
    with pytest.raises(ModelLoadError, match=r"garbage\.gguf"):
        Llama(str(garbage))
    with pytest.raises(ModelLoadError, match=r"missing\.gguf"):
        Llama(str(tmp_path / "missing.gguf"))
    assert capfd.readouterr().err == ""


def test_an_architecture_outside_is_refused_by_name(tiny_model_factory):
    path = tiny_model_factory(arch="llama", file_arch="refact", schedule=FA_DECODE_MODES)
    with pytest.raises(ModelLoadError, match="'refact' uses ALiBi"):
        Llama(str(path), n_ctx=256)


@pytest.mark.parametrize("wrong", [{"type_k": 99}, {"type_v": "q8_0"}])
def test_an_unknown_cache_type_is_refused_before_llama_cpp_aborts(tiny_model, wrong):
    with pytest.raises(ModelLoadError, match=r"which is no KV cache type; known are 0 \(f32\), 1 \(f16\)"):
        Llama(str(tiny_model), **wrong)


@pytest.mark.parametrize(
    ("config", "gpu", "expected"),
    [(SWAAConfig(24), True, 1024), (SWAAConfig(24), False, 512), (SWAAConfig(), True, 512)],
)
def test_ubatches_are_larger_for_windows_on_a_gpu(config, gpu, expected):
    assert default_n_ubatch(config.schedule(4), gpu=gpu) == expected


def test_ubatches_are_what_was_asked_for_and_no_larger_than_a_batch(load):
    def n_ubatch(**kwargs):
        return load(**{"n_ctx": 2048, "n_ubatch": None, **kwargs}).context_params.n_ubatch

    assert n_ubatch() == 512
    assert n_ubatch(n_batch=100) == n_ubatch(n_batch=100, n_ubatch=0) == n_ubatch(n_batch=100, n_ubatch=300) == 100
    assert n_ubatch(n_ubatch=700) == 700


@pytest.mark.parametrize("swaa", [False, FA_DECODE, RING])
def test_flash_attention_is_llama_cpp_s_choice_unless_said(load, swaa):
    def chosen(**said):
        return load(swaa=swaa, **said).context_params.flash_attn_type

    assert chosen() == llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    assert chosen(flash_attn=True) == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert chosen(flash_attn=False) == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def test_llama_cpp_chooses_flash_attention_on_a_cpu(load, capfd):
    load(swaa=FA_DECODE, verbose=True)
    assert "Flash Attention enabled" in capfd.readouterr().err


def test_a_quantized_cache_gets_the_flash_attention_it_needs(load):
    assert load(type_k=8, type_v=8).kv_bytes < load().kv_bytes
    with pytest.raises(ModelLoadError, match="quantized V cache requires flash_attn"):
        load(type_v=8, flash_attn=False)


def test_a_closed_model_says_so(load):
    llm = load()
    llm.close()
    with pytest.raises(SWAAError, match="closed"):
        llm.eval(TOKENS[:3])
    with pytest.raises(SWAAError, match="closed"):
        llm("hello")
    llm.close()


def test_no_n_ubatch_is_n_batch(load):
    llm = load(n_ubatch=0, n_batch=64)
    llm.eval(TOKENS[:100])
    assert (llm.n_tokens, llm.context_params.n_ubatch) == (100, 64)


def test_a_vocabulary_alone_tokenizes(load, tiny_model):
    vocab = load(vocab_only=True, n_ctx=0)
    assert vocab.tokenize(b"where the window is") == load().tokenize(b"where the window is")


def test_without_the_patches_the_import_says_how_to_mend_it(tmp_path):
    """A stand-in for the stock library: the same one, its new symbols hidden."""
    code = (
        "import llama_cpp.llama_cpp as c\n"
        "class Stock:\n"
        "    def __getattr__(self, name):\n"
        "        if 'swaa' in name: raise AttributeError(name)\n"
        "        return getattr(lib, name)\n"
        "lib = c._lib\n"
        "c._lib = Stock()\n"
        "from swaa_local import Llama\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "EngineMissing" in last
    assert "pip install ./patches" in last


# Interruption


def test_progress_is_reported_in_steps_and_changes_nothing(exact):
    steps = []
    watched = exact(n_batch=100, on_prefill=lambda done, total: steps.append((done, total)))
    plain = exact(n_batch=100)
    for llm in (watched, plain):
        llm.eval(TOKENS[:250])
    assert [done for done, _ in steps] == [0, 32, 64, 96, 100, 132, 164, 196, 200, 232, 250]
    assert {total for _, total in steps} == {250}
    assert np.array_equal(logits(watched), logits(plain))
    watched.eval(TOKENS[250:260], decode=True)
    assert len(steps) == 11


class Stop(Exception):
    pass


@pytest.mark.parametrize("swaa", [FA_DECODE, RING])
def test_a_prefill_that_was_stopped_goes_on_from_there(exact, swaa):
    llm = exact(swaa)

    def stop(done, total):
        if done >= 128:
            raise Stop

    llm.on_prefill = stop
    with pytest.raises(Stop):
        next(llm.generate(TOKENS[:300]))
    assert llm.n_tokens == 128
    assert math.isnan(llm.last_run.prefill_tokens_per_s)  # not 300 tokens in the time of 128
    llm.on_prefill = None
    next(llm.generate(TOKENS[:300]))
    assert llm.last_run.cached_tokens == 128
    modes = RING_MODES if swaa is RING else FA_DECODE_MODES
    assert_close(logits(llm), forward(TOKENS[:300], modes), EXACT)


@pytest.mark.parametrize("swaa", [FA_DECODE, RING])
def test_ctrl_c_while_llama_cpp_computes(exact, swaa):
    """SIGINT from another thread, at whatever moment of the prefill: tokens and cache agree afterwards."""
    llm = exact(swaa)
    started = threading.Event()
    llm.on_prefill = lambda done, total: started.set()
    # Waits for the prefill to begin, then interrupts from within llama_decode, which releases the interpreter.
    killer = threading.Thread(target=lambda: (started.wait(), os.kill(os.getpid(), signal.SIGINT)))
    killer.start()

    def prefill_over_and_over():
        while True:
            # Closed by name: Python drops what is raised while it collects a generator.
            with closing(llm.generate(TOKENS[:600])) as generation:
                next(generation)
            llm.reset()

    with pytest.raises(KeyboardInterrupt):
        prefill_over_and_over()
    killer.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    cells = llama_cpp.llama_memory_seq_pos_max(llm._ctx.memory, 0) + 1
    assert llm.n_tokens in (cells, 0)  # after reset(), upstream empties the cache only with the next eval
    next(llm.generate(TOKENS[:300]))
    modes = RING_MODES if swaa is RING else FA_DECODE_MODES
    assert_close(logits(llm), forward(TOKENS[:300], modes), EXACT)


# Standing in for llama_cpp.Llama


def test_figures_of_the_last_run(load):
    llm = load()
    assert llm.last_run is None
    assert len(list(islice(llm.generate(TOKENS[:100], temp=0.0), 5))) == 5
    run = llm.last_run
    assert (run.prompt_tokens, run.cached_tokens, run.generated_tokens) == (100, 0, 5)
    assert run.prefill_s > 0
    assert run.decode_s > 0
    assert run.prefill_tokens_per_s == pytest.approx(100 / run.prefill_s)


@pytest.mark.parametrize("swaa", [FA_DECODE, RING])
def test_state_survives_a_round_trip(exact, swaa):
    llm, other = exact(swaa), exact(swaa)
    llm.eval(TOKENS[:100])
    llm.eval(TOKENS[100:110], decode=True)
    other.load_state(pickle.loads(pickle.dumps(llm.save_state())))
    for each in (llm, other):
        each.eval(TOKENS[110:130], decode=True)
    assert_close(logits(llm)[110:], logits(other)[110:], 1e-5)


def test_a_state_of_another_schedule_is_refused(exact):
    llm, other = exact(FA_DECODE), exact(RING)
    llm.eval(TOKENS[:100])
    with pytest.raises(StateError, match="cannot restore the state"):
        other.load_state(llm.save_state())
    assert other.n_tokens == 0
    other.eval(TOKENS[:50])
    assert_close(logits(other), forward(TOKENS[:50], RING_MODES), EXACT)


def test_upstreams_cache_of_states_works(load):
    llm = load(swaa=FA_DECODE)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    first = llm(TOKENS[:100], max_tokens=8, temperature=0)["choices"][0]["text"]
    llm(TOKENS[300:400], max_tokens=8, temperature=0)
    assert llm(TOKENS[:100], max_tokens=8, temperature=0)["choices"][0]["text"] == first
    assert llm.last_run.cached_tokens >= 99


def test_pickling_makes_an_equal_model(load):
    llm = load(swaa=RING, n_ctx=512, flash_attn=None)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        assert (copy.swaa, copy.n_ctx(), copy.verbose) == (RING, 512, False)
        args = {"max_tokens": 10, "temperature": 0}
        assert copy(TOKENS[:100], **args)["choices"] == llm(TOKENS[:100], **args)["choices"]
    finally:
        copy.close()


def test_without_a_schedule_answers_are_llama_cpps_own(load, tiny_model):
    ours = load(flash_attn=False, n_batch=64)
    theirs = llama_cpp.Llama(str(tiny_model), n_ctx=1024, n_batch=64, n_ubatch=32, n_threads=1, verbose=False)
    for prompt in (TOKENS[:200], TOKENS[:150] + TOKENS[400:450]):
        answers = [llm(prompt, max_tokens=30, temperature=0.7, seed=7)["choices"][0]["text"] for llm in (ours, theirs)]
        assert answers[0] == answers[1]
    theirs.close()


def test_takes_every_keyword_of_llama_cpp(tiny_model):
    """Wrappers such as LangChain's pass all they know, defaults included."""
    import inspect

    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert len(given) > 40
    llm = Llama(model_path=str(tiny_model), **{**given, "verbose": False, "n_threads": 1})
    assert llm.n_ctx() == 512
    llm.close()


def test_every_token_of_an_embedding_is_prompt(load, tiny_model_factory):
    pooled = {"embedding": True, "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_LAST, "n_batch": 256}
    llm = load(tiny_model_factory(schedule=FA_DECODE_MODES), **pooled)
    text = "where the window is shorter than the text " * 4
    want = llm.embed(text)
    assert not np.allclose(want, load(swaa=False, **pooled).embed(text), atol=0.1)
    llm.eval(TOKENS[:10])
    assert np.allclose(want, llm.embed(text), atol=1e-3)


def test_a_long_text_is_cut_for_an_embedding_only_when_asked(load):
    llm = load(embedding=True, n_batch=16, n_ubatch=16)
    text = "a text of more than sixteen tokens, surely, as each of its letters is one"
    with pytest.raises(ValueError, match=r"text is \d+ tokens but a batch is 16; pass n_batch="):
        llm.embed(text)
    with pytest.raises(ValueError, match="a batch is 16"):
        llm.create_embedding(text)
    assert len(llm.embed(text, truncate=True)) == 16


def test_a_failed_embedding_leaves_tokens_and_cache_in_agreement(load):
    llm = load()
    llm.eval(TOKENS[:20])
    with pytest.raises(RuntimeError, match="embedding=True"):
        llm.embed("hello")
    assert llm.n_tokens == 20
    llm = load(embedding=True, n_batch=16, n_ubatch=16)
    llm.eval(TOKENS[:10])
    with pytest.raises(ValueError, match="a batch is 16"):
        llm.embed(["a short one", "one more", "and a text of more than sixteen tokens, surely"])
    assert llm.n_tokens == 0


def test_quiet_by_default(load, capfd):
    llm = load(swaa=FA_DECODE)
    llm("hello", max_tokens=3)
    assert capfd.readouterr() == ("", "")
