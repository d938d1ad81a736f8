"""Schedules of hybrid models: some layers attend, the others keep a state, which a schedule does nothing to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.support.engine import GPU_LAYERS, EngineContext, EngineError, EngineModel, assert_close
from tests.support.masks import Sched
from tests.support.program import ROOT
from tests.support.reference_numpy import forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens, tiny_weights, write_tiny_gguf
from tests.support.tiny_hybrid import (
    ATTENDING,
    N_LAYER,
    SHAPE,
    NumpyHybrid,
    forward_hybrid,
    hybrid,
    write_tiny_hybrid,
)

pytestmark = pytest.mark.usefixtures("engine")

EXACT = 1e-3
TOKENS = random_tokens(1700)
SCHEDULES = {
    "FA decode": hybrid(24, 4, (PREFILL, FULL, PREFILL, PREFILL)),
    "all modes": hybrid(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS)),
    "ring": hybrid(24, 4, (ALWAYS,) * 4),
    "ring beside full": hybrid(24, 4, (FULL, ALWAYS, FULL, ALWAYS)),
}

MakeContext = Callable[..., EngineContext]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hybrid(tmp_path_factory.mktemp("hybrid") / "model.gguf")


@pytest.fixture
def model(path: Path) -> Iterator[EngineModel]:
    with EngineModel(path) as model:
        yield model


@pytest.fixture
def new_context(path: Path) -> Iterator[MakeContext]:
    """`new_context(schedule, **EngineContext's keywords)`; exact by default."""
    with ExitStack() as stack:

        def make(schedule: Sched | None, **kwargs: object) -> EngineContext:
            model = stack.enter_context(EngineModel(path, schedule))
            defaults = {"n_ctx": 2048, "n_batch": 256, "n_ubatch": 32, "flash": "off", "kv": "F32"}
            return stack.enter_context(model.context(**{**defaults, **kwargs}))

        yield make


@pytest.mark.parametrize(("flash", "kv", "tolerance"), [("off", "F32", EXACT), ("on", "F16", 1e-2)])
@pytest.mark.parametrize("n_ubatch", [7, 32, 256])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_mode(new_context, name, n_ubatch, flash, kv, tolerance):
    schedule = SCHEDULES[name]
    ctx = new_context(schedule, n_ubatch=n_ubatch, flash=flash, kv=kv)
    got, want = ctx.run(TOKENS[:260], 230), forward_hybrid(TOKENS[:260], schedule, 230)
    assert_close(got, want, tolerance)
    assert np.abs(want - forward_hybrid(TOKENS[:260])).max() > 0.3 * want.std()  # the masks matter


def test_without_a_schedule_nothing_changes(new_context):
    assert_close(new_context(None).feed(TOKENS[:200]), forward_hybrid(TOKENS[:200]), EXACT)


@pytest.mark.parametrize("end", [0, 1, 97, 128, 199, 200])
def test_a_prompt_end_inside_a_call(new_context, end):
    """The batch is split where the phase changes: a tail is decoded."""
    schedule = SCHEDULES["all modes"]
    ctx = new_context(schedule, n_ubatch=64)
    ctx.set_prompt_end(0, end)
    assert_close(ctx.feed(TOKENS[:200]), forward_hybrid(TOKENS[:200], schedule, end), EXACT)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_prefill_beside_decode(new_context, name, unified):
    """Sequence 0 decodes while 1 and 2 prefill in the same calls."""
    schedule = SCHEDULES[name]
    ctx = new_context(schedule, n_seq_max=3, unified=unified, n_ctx=3 * 1024)
    tokens = [random_tokens(n, seed=s) for s, n in ((1, 120), (2, 200), (3, 150))]
    ends, at, step = [100, 200, 110], [100, 0, 0], [1, 37, 30]
    for seq, end in enumerate(ends):
        ctx.set_prompt_end(seq, end)
    got: list[list[np.ndarray]] = [[ctx.feed(tokens[0][:100], seq=0)], [], []]
    while any(a < len(t) for a, t in zip(at, tokens, strict=True)):
        entries, owner = [], []
        for offset in range(max(step)):  # interleaved, as a server may send them
            for seq in (1, 0, 2):
                if offset < step[seq] and at[seq] + offset < len(tokens[seq]):
                    entries.append((tokens[seq][at[seq] + offset], at[seq] + offset, seq))
                    owner.append(seq)
        logits = ctx.decode(entries)
        for seq in range(3):
            got[seq].append(logits[np.array(owner) == seq])
            at[seq] = min(at[seq] + step[seq], len(tokens[seq]))
    for seq in range(3):
        assert_close(np.concatenate(got[seq]), forward_hybrid(tokens[seq], schedule, ends[seq]), EXACT, seq)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_copied_sequences_go_their_own_ways(new_context, name, unified):
    schedule = SCHEDULES[name]
    ctx = new_context(schedule, n_seq_max=2, unified=unified)
    ref = NumpyHybrid(schedule)
    assert_close(ctx.feed(TOKENS[:120]), ref.feed(TOKENS[:120]), EXACT)
    ctx.cp(0, 1)
    other = ref.copy()
    for seq, each in ((0, ref), (1, other), (0, ref)):
        more = random_tokens(40, seed=seq + 5)
        assert_close(ctx.feed(more, seq=seq), each.feed(more), EXACT, seq)


def test_a_part_of_a_sequence_is_not_copied(new_context):
    ctx = new_context(SCHEDULES["FA decode"], n_seq_max=2)
    ctx.feed(TOKENS[:100])
    ctx.cp(0, 1, 0, 50)
    assert ctx.pos_max(1) == -1


@pytest.mark.parametrize("seq", [0, -1])
@pytest.mark.parametrize("name", [*SCHEDULES, None])
def test_what_can_be_removed(new_context, name, seq):
    """Nothing behind the end, or all; a part of what a state holds is refused, and then nothing has changed."""
    schedule = SCHEDULES[name] if name else None
    ctx, ref = new_context(schedule), NumpyHybrid(schedule)
    ctx.feed(TOKENS[:100])
    ref.feed(TOKENS[:100])
    assert not ctx.rm(seq, 90, -1)
    assert ctx.rm(seq, 100, -1)
    assert ctx.pos_max() == 99
    assert_close(ctx.feed(TOKENS[100:150]), ref.feed(TOKENS[100:150]), EXACT)
    assert ctx.rm(seq, 0, -1)
    assert ctx.pos_max() == -1
    assert_close(ctx.feed(TOKENS[:100]), forward_hybrid(TOKENS[:100], schedule), EXACT)


def test_all_sequences_keep_what_one_cannot_give(new_context):
    ctx = new_context(SCHEDULES["FA decode"], n_seq_max=2)
    ctx.feed(TOKENS[:100], seq=0)
    ctx.feed(TOKENS[:50], seq=1)
    assert not ctx.rm(-1, 60, -1)
    assert (ctx.pos_max(0), ctx.pos_max(1)) == (99, 49)
    assert ctx.rm(-1, 0, -1)
    assert (ctx.pos_max(0), ctx.pos_max(1)) == (-1, -1)


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_states(new_context, name, seq):
    """They hold states, caches and rings, and are bound to the schedule."""
    schedule = SCHEDULES[name]
    source, ref = new_context(schedule), NumpyHybrid(schedule)
    source.feed(TOKENS[:300])
    ref.feed(TOKENS[:300])
    data = source.state(seq)
    copy = new_context(schedule)
    assert copy.load_state(data, seq)
    assert copy.pos_max() == 299
    assert_close(copy.feed(TOKENS[300:350]), ref.feed(TOKENS[300:350]), EXACT)
    for other in (None, hybrid(25, 4, (PREFILL,) * 4)):
        target = new_context(other)
        with pytest.raises(EngineError, match="schedule"):
            target.load_state(data, seq)
        assert_close(target.feed(TOKENS[:50]), forward_hybrid(TOKENS[:50], other), EXACT)


def pad(n: int) -> int:
    return -(-n // 256) * 256


@pytest.mark.parametrize("n_ubatch", [32, 512])
def test_attention_width(path, n_ubatch):
    """Prefill reads sinks, window and ubatch in windowed layers, decode everything except in rings."""
    narrow = pad(8 + 64 + n_ubatch)
    schedule = hybrid(64, 8, (PREFILL, FULL, ALWAYS, PREFILL))
    with (
        EngineModel(path, schedule) as model,
        model.context(n_ctx=2048, n_batch=512, n_ubatch=n_ubatch, record=True) as ctx,
    ):

        def widths() -> dict[int, set[int]]:
            found = {i: {op.n_kv for op in ctx.attention if op.layer == i} for i in range(N_LAYER)}
            ctx.attention.clear()
            return {i: seen for i, seen in found.items() if seen}

        ctx.set_prompt_end(0, 1536)
        ctx.feed(TOKENS[:1024])
        widths()
        ctx.feed(TOKENS[1024:1536])
        prefill = widths()
        ctx.feed(TOKENS[1536:1540], chunk=1)
        decode = widths()
    assert tuple(prefill) == tuple(decode) == ATTENDING
    a, b, c, d = ATTENDING
    assert max(prefill[a] | prefill[c] | prefill[d]) <= narrow
    assert min(prefill[b]) >= 1024
    assert min(decode[a] & decode[b] & decode[d]) >= 1536
    assert max(decode[c]) <= narrow


def test_layers_with_attention_alone_have_a_cache(model):
    """And a ring is no larger than sinks, window and ubatch, beside states that do not grow."""
    row = 2 * 2 * SHAPE.n_head_kv * SHAPE.head_dim  # K and V of a token in F16
    states = (N_LAYER - len(ATTENDING)) * 2 * SHAPE.n_embd * 4
    for schedule, cells in (
        (None, 4 * 2048),
        (hybrid(64, 8, (PREFILL,) * 4), 4 * 2048),
        (hybrid(64, 8, (PREFILL, ALWAYS, ALWAYS, FULL)), 2 * 2048 + 2 * 256),
        (hybrid(64, 8, (ALWAYS,) * 4), 4 * 256),
    ):
        model.set_schedule(schedule or hybrid(1, 0, (FULL,) * 4))
        with model.context(n_ctx=2048, n_ubatch=64) as ctx:
            assert ctx.kv_bytes() == cells * row + states


def test_graph_reuse_changes_nothing(path, monkeypatch):
    """Same logits, bit by bit, with graphs reused (as they are, in prefill and decode) and never reused."""
    results, reused = [], []
    for disable in ("0", "1"):
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", disable)
        with (
            EngineModel(path, SCHEDULES["all modes"]) as model,
            model.context(n_ctx=1024, n_batch=64, n_ubatch=32) as ctx,
        ):
            ctx.set_prompt_end(0, 640)
            results.append(np.concatenate([ctx.feed(TOKENS[:640]), ctx.feed(TOKENS[640:700], chunk=1)]))
            reused.append(ctx.n_reused())
    assert np.array_equal(*results)
    assert reused[1] == 0
    assert reused[0] >= 60


@pytest.mark.parametrize("modes", [(PREFILL, FULL, ALWAYS, PREFILL), (ALWAYS,) * 4, (PREFILL,) * 4])
def test_no_reallocation_at_run_time(path, modes):
    """The compute buffers reserved at creation hold every graph."""
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from tests.support.engine import EngineModel
from tests.support.tiny import random_tokens
from tests.support.tiny_hybrid import hybrid
with EngineModel(sys.argv[2], hybrid(512, 100, tuple(map(int, sys.argv[3])))) as model:
    for n_ubatch, n_seq_max in ((512, 1), (128, 4)):
        with model.context(
            n_ctx=2304, n_batch=512, n_ubatch=n_ubatch, n_seq_max=n_seq_max, unified=n_seq_max > 1
        ) as ctx:
            ctx.run(random_tokens(1700), 1690)
            if n_seq_max > 1:
                ctx.set_prompt_end(1, 0)
                ctx.feed(random_tokens(512), seq=1)
print("done")
"""
    strict = {} if GPU_LAYERS else {"GGML_SCHED_DEBUG_REALLOC": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(path), "".join(map(str, modes))],
        env=os.environ | strict,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done" in done.stdout
    n_buffers = 2 if GPU_LAYERS else 1
    assert done.stderr.count(", matches expectation") == 2 * n_buffers, done.stderr[-2000:]


@pytest.mark.parametrize("mode", [PREFILL, ALWAYS])
def test_a_recurrent_layer_has_no_mode(tmp_path, model, mode):
    """By the C interface and in the file; the error names the layer."""
    schedule = Sched(24, 4, (FULL, PREFILL, mode, FULL, FULL, FULL, FULL))
    said = rf"swaa.layer_modes\[2\] = {mode}, but layer 2 is recurrent and cannot slide: expected 0"
    with pytest.raises(EngineError, match=said):
        model.set_schedule(schedule)
    assert model.get_schedule() is None
    with pytest.raises(EngineError, match=said):
        EngineModel(write_tiny_hybrid(tmp_path / "bad.gguf", schedule=schedule)).close()


def test_the_schedule_of_a_file(tmp_path):
    schedule = SCHEDULES["all modes"]
    with EngineModel(write_tiny_hybrid(tmp_path / "m.gguf", schedule=schedule)) as model:
        assert model.get_schedule() == schedule


def test_drafts_are_refused(model):
    for schedule in (None, SCHEDULES["FA decode"]):
        if schedule:
            model.set_schedule(schedule)
        with pytest.raises(EngineError, match="'lfm2' has recurrent layers, whose state cannot take drafts back"):
            model.set_draft(16, 4)
        model.set_draft(0, 0)


def test_a_hybrid_with_a_window_of_its_own_is_refused(tmp_path):
    path = write_tiny_hybrid(tmp_path / "m.gguf", extra={"lfm2.attention.sliding_window": 128})
    own_window = r"layer 1 has a window of its own \(128 tokens\)"
    with EngineModel(path) as model, pytest.raises(EngineError, match=own_window):
        model.set_schedule(SCHEDULES["FA decode"])


# Beside hybrids: what else their families have


def test_m_rope_with_positions_of_text_is_rope(tmp_path):
    schedule = Sched(24, 4, (PREFILL, ALWAYS, FULL, PREFILL))
    extra = {"qwen2vl.rope.dimension_sections": [4, 6, 6, 0]}
    path = write_tiny_gguf(tmp_path / "m.gguf", arch="qwen2", file_arch="qwen2vl", extra=extra, schedule=schedule)
    with (
        EngineModel(path) as model,
        model.context(n_ctx=512, n_batch=256, n_ubatch=32, flash="off", kv="F32") as ctx,
    ):
        shape = SHAPE.__class__(arch="qwen2")
        assert_close(ctx.run(TOKENS[:200], 170), forward(TOKENS[:200], schedule, 170, shape=shape), EXACT)
        assert not ctx.can_shift()


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    """The schedule has an entry for each layer that runs, and these alone have a cache."""
    schedule = Sched(24, 4, (PREFILL, ALWAYS, FULL, PREFILL))
    extra = {"qwen3.block_count": 5, "qwen3.nextn_predict_layers": 1}
    path = write_tiny_gguf(tmp_path / "m.gguf", extra=extra, schedule=schedule, weights=tiny_weights(SHAPE.__class__()))
    plain = write_tiny_gguf(tmp_path / "plain.gguf", schedule=schedule)
    settings = {"n_ctx": 512, "n_batch": 256, "n_ubatch": 32, "flash": "off", "kv": "F32"}
    with EngineModel(path) as model, EngineModel(plain) as without:
        assert model.get_schedule() == schedule
        with model.context(**settings) as ctx, without.context(**settings) as other:
            assert_close(ctx.run(TOKENS[:200], 170), forward(TOKENS[:200], schedule, 170), EXACT)
            assert ctx.kv_bytes() == other.kv_bytes()
