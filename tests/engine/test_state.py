"""Saved states: whole and per sequence, rings and sinks included, bound to the schedule that made them."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from tests.support.engine import EngineContext, EngineError, assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, TinyShape, random_tokens

EXACT = 1e-3
N_LAYER = 2
SCHEDULES = {
    "ring": Sched(32, 4, (ALWAYS, ALWAYS)),
    "ring beside full": Sched(32, 4, (FULL, ALWAYS)),
    "FA decode": Sched(32, 4, (PREFILL, FULL)),
    "ring beside FA decode": Sched(32, 4, (PREFILL, ALWAYS)),
}
TOKENS = random_tokens(900)
MORE = random_tokens(80, seed=7)


def continues_exactly(ctx: EngineContext, ref: NumpyModel, seq: int = 0) -> None:
    assert_close(ctx.feed(MORE, seq=seq), ref.feed(MORE), EXACT, "prefill")
    for i in range(3):
        token = TOKENS[i : i + 1]
        assert_close(ctx.feed(token, seq=seq), ref.feed(token, decode=True), EXACT, "decode")


@pytest.mark.parametrize("n", [20, 200, 900])
@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_state(new_context, name, n):
    """Before and long after the ring wrapped; the copy knows what its ring no longer holds."""
    source, ref = new_context(SCHEDULES[name]), NumpyModel(SCHEDULES[name])
    source.feed(TOKENS[:n])
    ref.feed(TOKENS[:n])
    copy = new_context(SCHEDULES[name])
    assert copy.load_state(source.state())
    assert (copy.pos_min(), copy.pos_max()) == (source.pos_min(), n - 1)
    if n == 900 and ALWAYS in SCHEDULES[name].layer_modes:
        assert not copy.rm(0, 300, -1)
    continues_exactly(copy, ref)


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
def test_drafts_behind_a_state_can_be_taken_back(new_context, seq):
    """Wherever in the ring it ended, for more than a round: `n_ubatch` tokens overwrite nothing that is still seen."""
    n_ubatch, ring, start = 32, 256, 300
    schedule = Sched(200, 4, (ALWAYS, ALWAYS))
    plain, source, copy = (new_context(schedule, n_ubatch=n_ubatch) for _ in range(3))
    want = plain.run(TOKENS, start)
    source.run(TOKENS[:start], start)
    wrong = random_tokens(n_ubatch, seed=5)
    for end in range(start, start + ring, 25):
        copy.clear()
        copy.load_state(source.state(seq), seq)
        for at in range(end, end + ring + 40):
            if at % 10 == 0:
                copy.feed(wrong, chunk=1)
                assert copy.rm(0, at, -1), f"at position {at}, behind a state of {end} tokens"
            assert_close(copy.feed(TOKENS[at : at + 1]), want[at : at + 1], EXACT, at)
        source.feed(TOKENS[end : end + 25], chunk=1)


@pytest.mark.parametrize(("kv", "flash"), [("F16", "on"), ("F16", "off"), ("Q8_0", "on")])
def test_state_of_other_caches(new_context, kv, flash):
    """f16 and quantized caches, with V transposed or not, go on as the original."""
    schedule = SCHEDULES["ring beside FA decode"]
    source = new_context(schedule, kv=kv, flash=flash)
    source.feed(TOKENS)
    copy = new_context(schedule, kv=kv, flash=flash)
    copy.load_state(source.state())
    got, want = (np.concatenate([ctx.feed(MORE), ctx.feed(MORE[:1])]) for ctx in (copy, source))
    assert_close(got, want, 1e-2)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_sequence(new_context, name, unified):
    """Into another sequence of another context, beside one that is in use there."""
    schedule = SCHEDULES[name]
    source = new_context(schedule, n_seq_max=2, unified=unified, n_ctx=2048)
    ref, busy = NumpyModel(schedule), NumpyModel(schedule)
    source.feed(TOKENS[:300], seq=1)
    source.feed(TOKENS, seq=0)
    ref.feed(TOKENS)
    target = new_context(schedule, n_seq_max=2, unified=unified, n_ctx=2048)
    target.feed(TOKENS[100:400], seq=0)
    busy.feed(TOKENS[100:400])
    assert target.load_state(source.state(0), seq=1)
    assert target.pos_max(1) == 899
    continues_exactly(target, ref, seq=1)
    continues_exactly(target, busy, seq=0)


def test_state_files(new_context, tmp_path):
    schedule = SCHEDULES["ring beside full"]
    source, ref = new_context(schedule), NumpyModel(schedule)
    source.feed(TOKENS)
    ref.feed(TOKENS)
    tokens, count = (ctypes.c_int32 * len(TOKENS))(*TOKENS), ctypes.c_size_t()
    back = (ctypes.c_int32 * len(TOKENS))()
    path = str(tmp_path / "whole.state").encode()
    assert C.llama_state_save_file(source.ptr, path, tokens, len(TOKENS))
    copy = new_context(schedule)
    assert C.llama_state_load_file(copy.ptr, path, back, len(TOKENS), ctypes.byref(count))
    assert list(back[: count.value]) == TOKENS
    continues_exactly(copy, ref)
    other = new_context(SCHEDULES["ring"])
    assert not C.llama_state_load_file(other.ptr, path, back, len(TOKENS), ctypes.byref(count))


OTHERS = {
    "another window": Sched(31, 4, (FULL, ALWAYS)),
    "other sinks": Sched(32, 5, (FULL, ALWAYS)),
    "other layers": Sched(32, 4, (ALWAYS, FULL)),
    "other modes": Sched(32, 4, (FULL, PREFILL)),
    "no schedule": None,
}


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("direction", ["into", "from"])
def test_state_of_another_schedule_is_refused(new_context, name, direction, seq):
    """In both directions; the context that refused still works from scratch."""
    here, there = SCHEDULES["ring beside full"], OTHERS[name]
    if direction == "from":
        here, there = there, here
    source, target = new_context(here), new_context(there)
    source.feed(TOKENS[:100])
    with pytest.raises(EngineError, match=r"(?i)schedule|swaa"):
        target.load_state(source.state(seq), seq=seq)
    target.clear()
    want = forward(TOKENS[:300], there, shape=TinyShape(n_layer=N_LAYER))
    assert_close(target.feed(TOKENS[:300]), want, EXACT)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
def test_truncated_state_is_refused(new_context, seq, keep):
    source, target = new_context(SCHEDULES["ring"]), new_context(SCHEDULES["ring"])
    source.feed(TOKENS[:300])
    data = source.state(seq)
    with pytest.raises(EngineError):
        target.load_state(data[: int(len(data) * keep)], seq=seq)
    target.clear()
    want = forward(TOKENS[:300], SCHEDULES["ring"], shape=TinyShape(n_layer=N_LAYER))
    assert_close(target.feed(TOKENS[:300]), want, EXACT)
