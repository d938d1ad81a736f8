"""The tail: the last tokens of a prompt, decoded. Its key, and what the engine makes of a prompt end inside the prompt.

The engine applies no tail of itself: a program sets the prompt end to the prompt's length less the tail.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from llama_cpp import llama_cpp as C

from tests.support.engine import EngineContext, EngineError, EngineModel, assert_close, quantize
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

EXACT = 1e-3
WINDOW, SINKS = 24, 4
MODES = (PREFILL, FULL, ALWAYS, PREFILL)
SCHEDULE = Sched(WINDOW, SINKS, MODES)
SCHEDULES = {"all modes": SCHEDULE, "FA decode": Sched(WINDOW, SINKS, (PREFILL,) * 4)}
N_PROMPT = 230
TOKENS = random_tokens(N_PROMPT + 12)
PROMPT, ANSWER = TOKENS[:N_PROMPT], TOKENS[N_PROMPT:]
LARGEST = 1 << 30


def read_with_tail(ctx: EngineContext, n_tail: int, *, chunk: int | None = None) -> np.ndarray:
    """The logits of prompt and answer, as a program evaluates them."""
    ctx.set_prompt_end(0, max(0, N_PROMPT - n_tail))
    return np.concatenate([ctx.feed(PROMPT, chunk=chunk), ctx.feed(ANSWER, chunk=1)])


# what a prompt end inside the prompt does


@pytest.mark.parametrize(("n_ubatch", "chunk"), [(7, None), (32, 50), (256, None), (32, 1)])
@pytest.mark.parametrize("n_tail", [1, 5, 40, N_PROMPT - 1, N_PROMPT, N_PROMPT + 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tail_reads_everything(new_context, name, n_tail, n_ubatch, chunk):
    """Every logit, of a tail of one token, a longer one, and one that is longer than the prompt."""
    ctx = new_context(SCHEDULES[name], n_ubatch=n_ubatch)
    want = forward(TOKENS, SCHEDULES[name], max(0, N_PROMPT - n_tail))
    assert_close(read_with_tail(ctx, n_tail, chunk=chunk), want, EXACT)


@pytest.mark.parametrize(("flash", "kv", "tolerance"), [("on", "F16", 1e-2), ("on", "F32", 1e-2), ("off", "F16", 1e-2)])
@pytest.mark.parametrize("n_tail", [1, 40])
def test_with_flash_attention_too(new_context, n_tail, flash, kv, tolerance):
    ctx = new_context(SCHEDULE, flash=flash, kv=kv)
    assert_close(read_with_tail(ctx, n_tail), forward(TOKENS, SCHEDULE, N_PROMPT - n_tail), tolerance)


def test_a_tail_shows_in_the_first_answer(new_context):
    """The premise of these tests: the logits after the prompt are others without it."""
    last = N_PROMPT - 1
    with_tail, without = (read_with_tail(new_context(SCHEDULE), n)[last] for n in (5, 0))
    assert np.abs(with_tail - without).max() > 0.1 * without.std()


@pytest.mark.parametrize("modes", [(FULL, ALWAYS, FULL, ALWAYS), (ALWAYS,) * 4], ids=["full and always", "always"])
@pytest.mark.parametrize("n_tail", [1, 40, N_PROMPT + 1])
def test_layers_without_phases_have_no_tail(new_context, modes, n_tail):
    schedule = Sched(WINDOW, SINKS, modes)
    got = read_with_tail(new_context(schedule), n_tail)
    assert_close(got, forward(TOKENS, schedule, N_PROMPT), EXACT)
    assert_close(got, read_with_tail(new_context(schedule), 0), EXACT)


@pytest.mark.parametrize("sinks", [64, N_PROMPT, N_PROMPT + 100])
@pytest.mark.parametrize("n_tail", [N_PROMPT - 64, N_PROMPT - 40, N_PROMPT - 1])
def test_a_tail_that_reaches_into_the_sinks(new_context, n_tail, sinks):
    schedule = Sched(WINDOW, sinks, MODES)
    assert_close(read_with_tail(new_context(schedule), n_tail), forward(TOKENS, schedule, N_PROMPT - n_tail), EXACT)


@pytest.mark.parametrize("n_tail", [7, 64, 150])
def test_only_the_tail_is_read_in_full_width(load_model, n_tail):
    """It costs as many tokens of full attention as it has: the tokens before it gather what they see."""
    n_prompt = 1600
    tokens = random_tokens(n_prompt)
    with load_model(SCHEDULE).context(n_ctx=2048, n_batch=256, n_ubatch=64, record=True) as ctx:
        ctx.set_prompt_end(0, n_prompt - n_tail)
        ctx.feed(tokens)
        windowed = [op for op in ctx.attention if op.layer == 0 and op.n_kv > 256]
        narrow = [op for op in ctx.attention if op.layer == 0 and op.n_kv <= 256]
    late = [op.n_tokens for op in windowed if op.n_kv >= n_prompt - n_tail]
    assert sum(late) == n_tail
    assert len(windowed) == len(late)
    assert sum(op.n_tokens for op in narrow) == n_prompt - n_tail


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sequences_with_tails_of_their_own_in_one_batch(new_context, name, unified):
    """Interleaved, so that ubatches have to be put together from several; one has no tail, one nothing but tail."""
    schedule = SCHEDULES[name]
    lengths, tails, answers = (150, 101, 60, 130), (40, 1, 60, 0), (10, 10, 10, 10)
    ctx = new_context(schedule, n_seq_max=4, unified=unified, n_ctx=4 * 512, n_batch=64, n_ubatch=16)
    texts = [random_tokens(n + more, seed=s) for s, (n, more) in enumerate(zip(lengths, answers, strict=True))]
    ends = [n - tail for n, tail in zip(lengths, tails, strict=True)]
    for seq, end in enumerate(ends):
        ctx.set_prompt_end(seq, end)
    at, got = [0] * 4, [[] for _ in range(4)]
    while any(a < len(text) for a, text in zip(at, texts, strict=True)):
        # prompts 16 tokens at a time, answers one
        steps = [
            min(16, n - a) if a < n else min(1, len(text) - a) for a, n, text in zip(at, lengths, texts, strict=True)
        ]
        entries = [(texts[s][at[s] + i], at[s] + i, s) for i in range(16) for s in range(4) if i < steps[s]]
        logits = ctx.decode(entries)
        owner = np.array([seq for _, _, seq in entries])
        for seq in range(4):
            got[seq].append(logits[owner == seq])
            at[seq] += steps[seq]
    for seq in range(4):
        assert_close(np.concatenate(got[seq]), forward(texts[seq], schedule, ends[seq]), EXACT, f"sequence {seq}")


def test_a_turn_that_is_shorter_than_the_tail_is_read_whole(new_context):
    """A conversation: what is in the cache stays as it was read."""
    ctx, ref = new_context(SCHEDULE), NumpyModel(SCHEDULE)
    n_tail, at = 30, 0
    for n_prompt, n_answer in ((100, 10), (12, 10), (80, 5)):
        end = max(at, at + n_prompt - n_tail)
        ctx.set_prompt_end(0, end)
        prompt, answer = TOKENS[at : at + n_prompt], TOKENS[at + n_prompt : at + n_prompt + n_answer]
        assert_close(ctx.feed(prompt), ref.feed(prompt, decode=np.arange(at, at + n_prompt) >= end), EXACT, at)
        assert_close(ctx.feed(answer, chunk=1), ref.feed(answer, decode=True), EXACT, at)
        at += n_prompt + n_answer


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize("at", [N_PROMPT - 40, N_PROMPT - 15], ids=["before the tail", "in the tail"])
def test_a_state_goes_on_with_its_tail(new_context, at, seq):
    """The prompt end is the program's and not the state's."""
    source, copy = new_context(SCHEDULE), new_context(SCHEDULE)
    end = N_PROMPT - 40
    source.set_prompt_end(0, end)
    got = [source.feed(TOKENS[:at])]
    copy.load_state(source.state(seq), seq=seq)
    copy.set_prompt_end(0, end)
    got += [copy.feed(TOKENS[at:N_PROMPT]), copy.feed(ANSWER, chunk=1)]
    assert_close(np.concatenate(got), forward(TOKENS, SCHEDULE, end), EXACT)


# the key


def test_the_file_s_tail(tiny_model_factory):
    with EngineModel(tiny_model_factory(schedule=ScheduleKeys(WINDOW, SINKS, MODES, tail=128))) as model:
        assert model.tail == 128
        assert model.get_schedule() == SCHEDULE
        assert f"window = {WINDOW}, sinks = {SINKS}" in model.log
        assert "tail = 128" in model.log


@pytest.mark.parametrize("schedule", [SCHEDULE, None], ids=["a schedule", "none"])
def test_without_the_key_there_is_none(tiny_model_factory, schedule):
    with EngineModel(tiny_model_factory(schedule=schedule)) as model:
        assert model.tail == 0


@pytest.mark.parametrize("n_tail", [0, 1, LARGEST])
def test_set_and_get(tiny_model, n_tail):
    with EngineModel(tiny_model, SCHEDULE) as model:
        assert model.tail == 0
        model.set_tail(n_tail)
        assert model.tail == n_tail
        assert model.get_schedule() == SCHEDULE


def test_another_schedule_has_no_tail(tiny_model_factory):
    with EngineModel(tiny_model_factory(schedule=ScheduleKeys(WINDOW, SINKS, MODES, tail=128))) as model:
        model.set_schedule(SCHEDULES["FA decode"])
        assert model.tail == 0
        model.set_tail(5)
        model.set_schedule(Sched(WINDOW, SINKS, (FULL,) * 4))
        assert model.tail == 0


def test_what_no_tail_can_be(tiny_model):
    with EngineModel(tiny_model, SCHEDULE) as model:
        model.set_tail(7)
        with pytest.raises(EngineError, match=rf"swaa\.tail = {LARGEST + 1}, expected 0 to {LARGEST}"):
            model.set_tail(LARGEST + 1)
        assert model.tail == 7
    with EngineModel(tiny_model) as model:
        model.set_tail(0)
        with pytest.raises(EngineError, match="a tail of 7 tokens is part of a swaa schedule, but the model has none"):
            model.set_tail(7)


@pytest.mark.parametrize("of_file", [None, 128])
def test_an_override_of_the_key(tiny_model_factory, of_file):
    path = tiny_model_factory(schedule=ScheduleKeys(WINDOW, SINKS, MODES, tail=of_file))
    with EngineModel(path, tail=9) as model:
        assert model.tail == 9
    with EngineModel(path, tail=0) as model:
        assert model.tail == 0
    for bad, said in ((-1, "swaa.tail is not an int of 32 bits"), (LARGEST + 1, f"swaa.tail = {LARGEST + 1}")):
        with pytest.raises(EngineError, match=said):
            EngineModel(path, tail=bad)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_context_applies_no_tail(tiny_model, automatic):
    """Neither with the automatic phase nor with a prompt end: bit by bit as without it."""
    logits = []
    for n_tail in (0, 40):
        with EngineModel(tiny_model, SCHEDULE) as model:
            model.set_tail(n_tail)
            with model.context(flash="off", kv="F32", n_ubatch=32) as ctx:
                if not automatic:
                    ctx.set_prompt_end(0, N_PROMPT)
                logits.append(np.concatenate([ctx.feed(PROMPT), ctx.feed(ANSWER, chunk=1)]))
    assert np.array_equal(*logits)
    assert_close(logits[1], forward(TOKENS, SCHEDULE, N_PROMPT), EXACT)


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize(("before", "after"), [(0, 40), (40, 0), (40, 9)])
def test_a_state_of_another_tail_is_as_good(tiny_model, before, after, seq):
    """The cells are of the same kind."""
    end = N_PROMPT - after
    with EngineModel(tiny_model, SCHEDULE) as there, EngineModel(tiny_model, SCHEDULE) as here:
        there.set_tail(before)
        here.set_tail(after)
        options = {"flash": "off", "kv": "F32", "n_ubatch": 32}
        with there.context(**options) as source, here.context(**options) as copy:
            source.set_prompt_end(0, N_PROMPT - before)
            got = [source.feed(TOKENS[:150])]
            copy.load_state(source.state(seq), seq=seq)
            copy.set_prompt_end(0, end)
            got += [copy.feed(TOKENS[150:N_PROMPT]), copy.feed(ANSWER, chunk=1)]
    assert_close(np.concatenate(got), forward(TOKENS, SCHEDULE, end), EXACT)


def save(path: Path, out: Path) -> None:
    with EngineModel(path) as model:
        function = C._lib.llama_model_save_to_file
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_char_p], None
        function(model.ptr, str(out).encode())


def to_q8_0(path: Path, out: Path) -> None:
    quantize(path, out, C.LLAMA_FTYPE_MOSTLY_Q8_0)


@pytest.mark.parametrize("n_tail", [None, 128])
@pytest.mark.parametrize("copy", [save, to_q8_0])
def test_a_copy_of_the_model_keeps_its_tail(tiny_model_factory, tmp_path, copy, n_tail):
    out = tmp_path / "copy.gguf"
    copy(tiny_model_factory(schedule=ScheduleKeys(WINDOW, SINKS, MODES, tail=n_tail)), out)
    with EngineModel(out) as model:
        assert model.get_schedule() == SCHEDULE
        assert model.tail == (n_tail or 0)
    assert ("swaa.tail" in GGUFReader(out).fields) == (n_tail is not None)
