"""The engine at its edges: a window of 1, shifted prompt ends, partial copies, spare sequence ids, reserved buffers."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from tests.support.engine import EngineError, EngineModel, assert_close, captured_log
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

N_LAYER = 2
EXACT = 1e-3
TOKENS = random_tokens(700)
LAST_POS = (1 << 31) - 1  # of a llama_pos


@pytest.mark.parametrize("sinks", [0, 4])
def test_window_of_1_keeps_the_last_token_of_an_idle_sequence(new_context, sinks):
    schedule = Sched(1, sinks, (ALWAYS, ALWAYS))
    ctx, ref = new_context(schedule, n_seq_max=2, unified=True), NumpyModel(schedule)
    assert_close(ctx.feed(TOKENS[:50], seq=0), ref.feed(TOKENS[:50]), EXACT)
    ctx.feed(TOKENS[:600], seq=1)
    assert ctx.pos_max(0) == 49
    assert_close(ctx.feed(TOKENS[50:60], seq=0), ref.feed(TOKENS[50:60]), EXACT)


def test_window_of_1_does_not_go_back_to_a_position_that_is_gone(new_context):
    ctx = new_context(Sched(1, 40, (ALWAYS, ALWAYS)), n_ubatch=8)
    ctx.feed(TOKENS[:600])
    assert not ctx.rm(0, 100, -1)
    assert ctx.pos_max(0) == 599


@pytest.mark.parametrize("p1", [-1, 300], ids=["to the end", "to the last token"])
@pytest.mark.parametrize("end", [300, 250, 120])
def test_the_prompt_end_moves_with_a_context_shift(new_context, end, p1):
    """After 50..149 are dropped and the rest moves down, what was past the prompt's end still is."""
    schedule = Sched(32, 4, (PREFILL, PREFILL))
    ctx, ref = new_context(schedule), NumpyModel(schedule)
    ctx.set_prompt_end(0, end)
    decode = np.arange(300) >= end
    assert_close(ctx.feed(TOKENS[:300]), ref.feed(TOKENS[:300], decode=decode), EXACT)
    assert ctx.rm(0, 50, 150)
    ctx.shift(0, 150, p1, -100)
    ref.remove(50, 150)
    ref.shift(150, -100)
    assert_close(ctx.feed(TOKENS[300:340]), ref.feed(TOKENS[300:340], decode=True), EXACT)


@pytest.mark.parametrize("modes", [(ALWAYS, ALWAYS), (FULL, ALWAYS), (PREFILL, ALWAYS)], ids=str)
def test_a_partial_copy_of_what_a_ring_dropped_is_not_made(new_context, modes):
    ctx = new_context(Sched(32, 4, modes), n_seq_max=2, unified=True)
    ctx.feed(TOKENS[:600], seq=0)
    with captured_log() as log:
        ctx.cp(0, 1, 0, 100)
    assert "does not hold what position 100 of sequence 0 would see" in "".join(log)
    assert ctx.pos_max(1) == -1
    with pytest.raises(EngineError, match="evaluate the sequence again from its start"):
        ctx.decode([(1, 100, 1)])


def test_a_ring_s_checkpoint_needs_the_rest_of_the_sequence(new_context):
    """A partial state holds the ring alone: without the positions of the full layers it is no place to go on from."""
    schedule = Sched(32, 4, (FULL, ALWAYS))
    source, other = new_context(schedule), new_context(schedule)
    source.feed(TOKENS[:200])
    partial = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    size = C.llama_state_seq_get_size_ext(source.ptr, 0, partial)
    data = (ctypes.c_uint8 * size)()
    assert C.llama_state_seq_get_data_ext(source.ptr, data, size, 0, partial) == size
    assert C.llama_state_seq_set_data_ext(other.ptr, data, size, 0, partial) == size
    with pytest.raises(EngineError, match="ends at position -1 in one cache, but at 199 in the ring"):
        other.decode([(1, 200, 0)])


def test_a_copy_may_be_kept_under_an_id_that_is_never_decoded(new_context):
    """llama.cpp holds more sequences than it decodes; programs stash a prefix that way."""
    schedule = Sched(32, 4, (PREFILL, ALWAYS))
    ctx, ref = new_context(schedule), NumpyModel(schedule)
    ctx.feed(TOKENS[:100])
    ref.feed(TOKENS[:100])
    ctx.cp(0, 1)
    assert ctx.pos_max(1) == 99
    assert_close(ctx.feed(TOKENS[100:300]), ref.feed(TOKENS[100:300]), EXACT)


@pytest.mark.parametrize("shape", [{"n_seq_max": 1}, {"n_seq_max": 4, "unified": True}], ids=["one", "four, unified"])
@pytest.mark.parametrize("flash", ["on", "off"])
def test_compute_buffers_do_not_grow_where_only_short_ubatches_gather(load_model, flash, shape):
    """With W + k + n_ubatch near n_ctx, the largest ubatch attends to the cache as it is, but the last one gathers."""
    ctx = load_model(Sched(1700, 8, (PREFILL, PREFILL)), n_layer=N_LAYER).context(
        n_ctx=2048, n_batch=512, n_ubatch=128, flash=flash, **shape
    )
    ctx.set_prompt_end(0, 2000)
    ctx.feed(random_tokens(1920), chunk=128)
    ctx.feed(random_tokens(10))
    with captured_log() as log:  # llama.cpp compares what it reserved with what it used when a context is freed
        ctx.close()
    assert "matches expectation" in "".join(log)
    assert "does not match" not in "".join(log)


def test_overrides_of_the_keys(tiny_model_factory):
    """As for any other key of a file: `--override-kv swaa.window=int:32`."""
    path = tiny_model_factory(schedule=Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS)))
    with EngineModel(path, window=32, sinks=0) as model:
        assert model.get_schedule() == Sched(32, 0, (ALWAYS, FULL, PREFILL, ALWAYS))
    for bad, said in (
        ({"window": 0}, "swaa.window = 0"),
        ({"version": 9}, "swaa.version = 9"),
        ({"sinks": -1}, "swaa.sinks"),
    ):
        with pytest.raises(EngineError, match=said):
            EngineModel(path, **bad)


def test_a_saved_model_keeps_its_schedule(tiny_model_factory, tmp_path):
    schedule = Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS))
    out = tmp_path / "saved.gguf"
    with EngineModel(tiny_model_factory(schedule=schedule)) as model:
        save = C._lib.llama_model_save_to_file
        save.argtypes, save.restype = [ctypes.c_void_p, ctypes.c_char_p], None
        save(model.ptr, str(out).encode())
    with EngineModel(out) as saved:
        assert saved.get_schedule() == schedule


@pytest.mark.parametrize("n", [20, 32])
def test_the_last_positions_of_all_see_what_they_should(new_context, n):
    """RoPE turns by the position as a float, which cannot tell the last 64 apart: there the same tokens give the same
    logits, whatever a GPU takes for the sine of such an angle. (Upstream's own full attention overflows in the last
    32.)"""
    windowed = new_context(Sched(64, 4, (PREFILL, PREFILL)), n_ubatch=64)
    full = new_context(None, n_ubatch=64)
    first = LAST_POS - n + 1
    want = full.feed(TOKENS[:n], pos=LAST_POS - 63)
    assert_close(windowed.feed(TOKENS[:n], pos=first), want, EXACT)
    assert windowed.rm(0, first, -1)


def test_a_ring_that_ends_at_the_last_position_of_all(new_context):
    """It still refuses a hole in its window, and gives the rest to others. No text gets there, but a state file can."""
    n, window = 64, 16
    kwargs = {"n_seq_max": 2, "unified": True, "n_ctx": 1024, "n_ubatch": 8}
    source, ring = (new_context(Sched(window, 0, (ALWAYS, ALWAYS)), **kwargs) for _ in range(2))
    source.feed(TOKENS[:n])
    held = range(n - window, n)  # a sequence's state leaves out what its last token does not see
    cells = b"".join(struct.pack("<iIi", pos, 1, 0) for pos in held)
    moved = b"".join(struct.pack("<iIi", pos + LAST_POS - n + 1, 1, 0) for pos in held)
    state = source.state(seq=0)
    assert state.count(cells) == 1
    ring.load_state(state.replace(cells, moved), seq=0)
    assert ring.pos_max(0) == LAST_POS
    assert not ring.rm(0, LAST_POS - window + 2, LAST_POS - 3)
    assert ring.rm(0, LAST_POS - window + 1, LAST_POS - window + 2)
    assert (ring.pos_min(0), ring.pos_max(0)) == (LAST_POS - window + 2, LAST_POS)
    reference = NumpyModel(Sched(window, 0, (ALWAYS, ALWAYS)))
    assert_close(ring.feed(TOKENS[:600], seq=1), reference.feed(TOKENS[:600]), EXACT)


def test_a_window_and_sinks_that_together_pass_the_last_position(new_context):
    largest = 1 << 30
    schedule = Sched(largest, largest, (PREFILL, FULL))
    assert_close(new_context(schedule).feed(TOKENS[:100]), NumpyModel(schedule).feed(TOKENS[:100]), EXACT)
