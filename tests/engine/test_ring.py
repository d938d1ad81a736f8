"""The ring of ALWAYS layers: exact long after it wrapped, small, honest about what it no longer holds."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.support.engine import EngineError, assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import ALWAYS, FULL, PREFILL, TinyShape, random_tokens

EXACT = 1e-3
F16 = 1e-2
N_LAYER = 2
WINDOW, SINKS, N_UBATCH = 32, 4, 32
RING = 256  # pad(WINDOW + SINKS + N_UBATCH, 256)
N_TOKENS = 10 * RING + 70
TOKENS = random_tokens(N_TOKENS)
PROMPT = N_TOKENS - 40

RINGS = {
    "all layers": Sched(WINDOW, SINKS, (ALWAYS, ALWAYS)),
    "beside a full layer": Sched(WINDOW, SINKS, (FULL, ALWAYS)),
    "beside an FA decode layer": Sched(WINDOW, SINKS, (ALWAYS, PREFILL)),
    "without sinks": Sched(WINDOW, 0, (ALWAYS, ALWAYS)),
}
CELL_BYTES = 2 * TinyShape().n_head_kv * TinyShape().head_dim * 2  # K and V of one layer, f16


@functools.cache
def reference(name: str) -> np.ndarray:
    return NumpyModel(RINGS[name]).feed(TOKENS, decode=np.arange(N_TOKENS) >= PROMPT)


@pytest.fixture
def ring_context(new_context):
    return lambda name, **kwargs: new_context(RINGS[name], **{"n_ctx": 4096, "n_ubatch": N_UBATCH, **kwargs})


@pytest.mark.parametrize(("flash", "kv", "tolerance"), [("off", "F32", EXACT), ("on", "F16", F16)])
@pytest.mark.parametrize("name", RINGS)
def test_exact_after_ten_times_its_length(ring_context, name, flash, kv, tolerance):
    """In particular the sinks: their cells have been passed over ten times and are still there."""
    assert_close(ring_context(name, flash=flash, kv=kv).run(TOKENS, PROMPT), reference(name), tolerance)


@pytest.mark.parametrize("n_ubatch", [8, 100, 256])
def test_exact_for_every_ubatch(ring_context, n_ubatch):
    ctx = ring_context("all layers", n_ubatch=n_ubatch)
    assert_close(ctx.run(TOKENS, PROMPT), reference("all layers"), EXACT)


def test_decode_goes_round_the_ring(ring_context):
    """Token by token, from an empty ring, over its end and on."""
    ctx = ring_context("all layers")
    assert_close(ctx.run(TOKENS[: 2 * RING + 50], 1), reference("all layers")[: 2 * RING + 50], EXACT)


def test_memory_does_not_grow_with_the_context(load_model, ring_context):
    for n_ctx in (1024, 4096, 65536):
        ctx = ring_context("all layers", n_ctx=n_ctx, kv="F16")
        assert ctx.kv_bytes() == N_LAYER * RING * CELL_BYTES
        assert ctx.kv_mib_logged() == pytest.approx(ctx.kv_bytes() / 2**20, abs=0.011)


def test_memory_of_mixed_layers(load_model, ring_context):
    """FULL and PREFILL layers hold every position, ALWAYS layers a ring."""
    for name in ("beside a full layer", "beside an FA decode layer"):
        ctx = ring_context(name, kv="F16")
        assert ctx.kv_bytes() == (4096 + RING) * CELL_BYTES
        assert ctx.kv_mib_logged() == pytest.approx(ctx.kv_bytes() / 2**20, abs=0.011 * 2)


@pytest.mark.parametrize("unified", [False, True])
def test_memory_of_several_sequences(ring_context, unified):
    """Unified, one ring has room for the windows and sinks of all; else each sequence has its own."""
    n_seq = 8
    ctx = ring_context("all layers", n_ctx=8192, n_seq_max=n_seq, unified=unified, kv="F16")
    cells = 512 if unified else n_seq * RING  # pad((32 + 4) * 8 + 32, 256)
    assert ctx.kv_bytes() == N_LAYER * cells * CELL_BYTES


def test_ring_is_never_larger_than_the_context(load_model):
    schedule = Sched(4000, 100, (ALWAYS,) * 4)
    with (
        load_model(schedule).context(n_ctx=512, n_batch=64) as ctx,
        load_model().context(n_ctx=512, n_batch=64) as full,
    ):
        assert ctx.kv_bytes() == full.kv_bytes() == 4 * 512 * CELL_BYTES


def test_the_context_length_still_bounds_positions(ring_context):
    """A ring would go on for ever; positions past n_ctx are refused as they are for full attention."""
    ctx = ring_context("all layers", n_ctx=512)
    ctx.feed(TOKENS[:512])
    with pytest.raises(EngineError):
        ctx.feed(TOKENS[512:513])


def test_pos_min_is_the_start_of_the_contiguous_past(ring_context):
    """Not 0, though sink 0 is held: callers take pos_min for the start of an unbroken past."""
    ctx = ring_context("all layers")
    ctx.feed(TOKENS[:100])
    assert (ctx.pos_min(), ctx.pos_max()) == (0, 99)
    ctx.feed(TOKENS[100:1000])
    assert SINKS < ctx.pos_min() <= 1000 - WINDOW
    assert ctx.pos_min() >= 1000 - RING
    assert ctx.pos_max() == 999


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("seq", [0, -1])
def test_removing_a_tail_whose_window_is_held(ring_context, name, seq):
    ctx, ref = ring_context(name), NumpyModel(RINGS[name])
    ctx.feed(TOKENS[:1000])
    ref.feed(TOKENS[:1000])
    assert ctx.rm(seq, 990, -1)
    ref.remove(990, 1000)
    assert ctx.pos_max() == 989
    other = random_tokens(100, seed=2)
    assert_close(ctx.feed(other), ref.feed(other), EXACT)


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("seq", [0, -1])
def test_removing_a_tail_whose_window_is_gone(ring_context, name, seq):
    """Refused, and nothing is lost by asking."""
    ctx = ring_context(name)
    got = [ctx.feed(TOKENS[:1000])]
    for p0 in (20, 300, 1000 - RING):
        assert not ctx.rm(seq, p0, -1)
        assert ctx.pos_max() == 999
    ctx.set_prompt_end(0, PROMPT)
    got += [ctx.feed(TOKENS[1000:1300])]
    assert_close(np.concatenate(got), reference(name)[:1300], EXACT)


@pytest.mark.parametrize(("flash", "kv"), [("off", "F32"), ("on", "F16"), ("on", "Q8_0")])
@pytest.mark.parametrize("name", RINGS)
def test_removed_drafts_leave_no_bit_behind(ring_context, name, flash, kv):
    """Before each token come others that are taken back, in one batch or in several, twice around the ring. It goes
    on as one that has never held them: what comes next gets the cells, and so the order of sums, of that one."""
    drafting, plain = (ring_context(name, flash=flash, kv=kv) for _ in range(2))
    for ctx in (drafting, plain):
        ctx.run(TOKENS[:300], 300)
    wrong = random_tokens(2 * RING + 50, seed=5)
    for i, at in enumerate(range(300, 300 + 2 * RING)):
        n = 1 + i % 8
        drafting.feed(wrong[i : i + n], chunk=1 if i % 3 else n)
        assert drafting.rm(0, at, -1)
        token = TOKENS[at : at + 1]
        assert np.array_equal(drafting.feed(token), plain.feed(token)), f"position {at}"


def test_everything_can_always_be_removed(ring_context):
    for p0, p1 in ((0, -1), (-1, -1)):
        for seq in (0, -1):
            ctx = ring_context("beside a full layer")
            ctx.feed(TOKENS[:1000])
            assert ctx.rm(seq, p0, p1)
            assert ctx.pos_max() == -1
            assert_close(ctx.feed(TOKENS[:600]), reference("beside a full layer")[:600], EXACT)


def test_clear(ring_context):
    ctx = ring_context("all layers")
    ctx.feed(TOKENS[:1000])
    ctx.clear()
    assert_close(ctx.feed(TOKENS[:600]), reference("all layers")[:600], EXACT)


@pytest.mark.parametrize("modes", [(FULL, PREFILL), (PREFILL, PREFILL)])
def test_context_shift(new_context, modes):
    """Drop the middle and close the gap, as llama.cpp's programs do when the context is full.

    The window then reaches over the seam; the remaining keys keep their contents and get their new positions.
    """
    schedule, keep, discard = Sched(WINDOW, SINKS, modes), 8, 300
    ctx, ref = new_context(schedule, n_ubatch=N_UBATCH), NumpyModel(schedule)
    assert ctx.can_shift()
    ctx.feed(TOKENS[:600])
    ref.feed(TOKENS[:600])
    assert ctx.rm(0, keep, keep + discard)
    ctx.shift(0, keep + discard, -1, -discard)
    ref.remove(keep, keep + discard)
    ref.shift(keep + discard, -discard)
    assert ctx.pos_max() == 299
    other = random_tokens(300, seed=3)
    assert_close(ctx.feed(other), ref.feed(other), EXACT)
    assert_close(ctx.feed(other[:1]), ref.feed(other[:1], decode=True), EXACT, "decode")


@pytest.mark.parametrize("name", RINGS)
def test_rings_say_that_they_cannot_shift(ring_context, name):
    """As upstream's own sliding-window caches do: programs ask first and then re-evaluate."""
    assert not ring_context(name).can_shift()
