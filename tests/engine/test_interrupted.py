"""After what goes wrong in the middle: aborted calls, a full context, holes in the past. Nothing wrong stays."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from tests.support.engine import GPU_LAYERS, EngineError, assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

EXACT = 1e-3
SCHEDULES = {
    "FA decode": Sched(32, 4, (PREFILL, PREFILL)),
    "ring": Sched(32, 4, (ALWAYS, ALWAYS)),
    "ring beside full": Sched(32, 4, (FULL, ALWAYS)),
    "ring beside FA decode": Sched(32, 4, (ALWAYS, PREFILL)),
}
TOKENS = random_tokens(1200)


@pytest.fixture(params=SCHEDULES)
def schedule(request) -> Sched:
    return SCHEDULES[request.param]


@pytest.fixture
def ref(schedule) -> NumpyModel:
    return NumpyModel(schedule)


@pytest.mark.skipif(GPU_LAYERS > 0, reason="only the CPU backend asks whether to abort")
@pytest.mark.parametrize("past", [0, 100, 700])
def test_aborted_call(new_context, schedule, ref, past):
    """The ubatches that were done stay, the one that was not leaves nothing; going on from there is exact."""
    ctx = new_context(schedule, n_ubatch=16)
    if past:
        assert_close(ctx.feed(TOKENS[:past]), ref.feed(TOKENS[:past]), EXACT, "past")
    asked = 0

    @C.ggml_abort_callback
    def abort(_data: int) -> bool:
        nonlocal asked
        asked += 1
        return asked > 300

    C.llama_set_abort_callback(ctx.ptr, abort, ctypes.c_void_p(0))
    with pytest.raises(EngineError, match="llama_decode: 2"):
        ctx.feed(TOKENS[past : past + 256])
    C.llama_set_abort_callback(ctx.ptr, C.ggml_abort_callback(0), ctypes.c_void_p(0))
    done = ctx.pos_max() + 1
    assert past < done < past + 256
    assert done % 16 == past % 16
    ref.feed(TOKENS[past:done])
    assert_close(ctx.feed(TOKENS[done : done + 300]), ref.feed(TOKENS[done : done + 300]), EXACT, "after")


def test_full_context(new_context, schedule, ref):
    """A call that finds no room changes nothing; a shorter one still fits."""
    ctx = new_context(schedule, n_ctx=512)
    ctx.feed(TOKENS[:450])
    ref.feed(TOKENS[:450])
    with pytest.raises(EngineError):
        ctx.feed(TOKENS[450:550])
    assert ctx.pos_max() == 449
    assert_close(ctx.feed(TOKENS[450:512]), ref.feed(TOKENS[450:512]), EXACT)


@pytest.mark.parametrize(("p0", "p1"), [(0, 2), (2, 3), (100, 130), (560, 570), (595, 599)])
def test_a_hole_in_the_past(new_context, schedule, ref, p0, p1):
    """Removed positions are seen by nobody. A ring may refuse a hole in what it holds; then nothing changes."""
    ctx = new_context(schedule)
    ctx.feed(TOKENS[:600])
    ref.feed(TOKENS[:600])
    if ctx.rm(0, p0, p1):
        ref.remove(p0, p1)
    else:
        assert ALWAYS in schedule.layer_modes
    assert_close(ctx.feed(TOKENS[600:700]), ref.feed(TOKENS[600:700]), EXACT)


def test_swa_full_has_no_say(new_context, schedule):
    """Upstream's switch for its own sliding-window caches neither widens nor narrows ours."""
    a, b = new_context(schedule, swa_full=True), new_context(schedule, swa_full=False)
    assert a.kv_bytes() == b.kv_bytes()
    assert np.array_equal(a.feed(TOKENS[:600]), b.feed(TOKENS[:600]))


@pytest.mark.parametrize("flash", ["off", "on"])
def test_keys_and_values_of_two_types(new_context, schedule, ref, flash):
    ctx = new_context(schedule, type_k=C.GGML_TYPE_Q8_0, type_v=C.GGML_TYPE_F16, flash=flash)
    assert_close(ctx.feed(TOKENS[:600]), ref.feed(TOKENS[:600]), 0.1)
