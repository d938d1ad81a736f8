"""What the graph computes: the width of attention by layer and phase, reuse, and upstream's graph if no schedule."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from tests.support import stock_graph
from tests.support.engine import GPU_LAYERS, EngineContext
from tests.support.masks import Sched
from tests.support.program import ROOT
from tests.support.reference_numpy import forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

DATA = Path(__file__).parents[1] / "data"
WINDOW, SINKS = 64, 8
SCHEDULE = Sched(WINDOW, SINKS, (PREFILL, FULL, ALWAYS, PREFILL))
TOKENS = random_tokens(1700)


def pad(n: int) -> int:
    return -(-n // 256) * 256


def widths(ctx: EngineContext) -> list[set[int]]:
    """Per layer, the numbers of keys that attention read since the last call."""
    found = [{op.n_kv for op in ctx.attention if op.layer == i} for i in range(4)]
    ctx.attention.clear()
    return found


@pytest.mark.parametrize("kv", ["F16", "Q8_0"])
@pytest.mark.parametrize("n_ubatch", [32, 100, 512])
def test_attention_width(load_model, n_ubatch, kv):
    """Prefill reads sinks, window and ubatch in windowed layers, decode everything except in rings."""
    narrow = pad(SINKS + WINDOW + n_ubatch)
    with load_model(SCHEDULE).context(n_ctx=2048, n_batch=512, n_ubatch=n_ubatch, kv=kv, record=True) as ctx:
        ctx.set_prompt_end(0, 1536)
        ctx.feed(TOKENS[:1024])
        widths(ctx)
        ctx.feed(TOKENS[1024:1536])
        prefill = widths(ctx)
        ctx.feed(TOKENS[1536:1540], chunk=1)
        decode = widths(ctx)
    assert prefill[0] == prefill[3]
    assert max(prefill[0]) <= narrow
    assert min(prefill[1]) >= 1024
    assert max(prefill[2]) <= narrow
    assert min(decode[0] & decode[1] & decode[3]) >= 1536
    assert max(decode[2]) <= narrow
    assert all(n % 256 == 0 for layer in prefill + decode for n in layer)


def test_attention_width_does_not_grow_with_the_prompt(load_model):
    with load_model(SCHEDULE).context(n_ctx=2048, n_batch=64, n_ubatch=64, record=True) as ctx:
        ctx.feed(TOKENS[:1600])
        seen = widths(ctx)
    assert seen[0] == seen[2] == seen[3] == {256}
    assert max(seen[1]) >= 1600


def test_attention_is_never_wider_than_without_a_schedule(load_model):
    wide = Sched(900, 100, (PREFILL, FULL, PREFILL, PREFILL))
    with load_model(wide).context(n_ctx=2048, n_batch=64, n_ubatch=64, record=True) as ctx:
        for i in range(0, 1600, 64):
            ctx.feed(TOKENS[i : i + 64])
            seen = widths(ctx)
            assert max(seen[0]) <= max(seen[1])


@pytest.mark.parametrize("unified", [True, False])
def test_prefill_stays_narrow_beside_a_decoding_sequence(load_model, unified):
    with load_model(SCHEDULE).context(
        n_ctx=4096, n_batch=128, n_ubatch=64, n_seq_max=2, unified=unified, record=True
    ) as ctx:
        ctx.set_prompt_end(0, 1000)
        ctx.set_prompt_end(1, 500)
        ctx.feed(TOKENS[:1000], seq=0)
        ctx.feed(TOKENS[:200], seq=1)
        ctx.attention.clear()
        ctx.decode([(TOKENS[1000], 1000, 0)] + [(t, 200 + i, 1) for i, t in enumerate(TOKENS[200:300])])
        layer = [(op.n_tokens, op.n_kv) for op in ctx.attention if op.layer == 0]
        assert sum(n for n, _ in layer) == 101
        assert [n for n, n_kv in layer if n_kv >= 1000] == [1], layer
        assert all(n_kv <= pad(SINKS + WINDOW + 64) for n, n_kv in layer if n > 1), layer


def test_window_is_skipped_by_the_ring_without_flash_attention_too(load_model):
    with load_model(SCHEDULE).context(n_ctx=2048, n_batch=64, flash="off", record=True) as ctx:
        ctx.feed(TOKENS[:1600])
        assert widths(ctx)[2] == {256}


def n_reused(ctx: EngineContext) -> int:
    return C.llama_perf_context(ctx.ptr).n_reused


@pytest.mark.parametrize("flash", ["on", "off"])
def test_graph_reuse_changes_nothing(load_model, monkeypatch, flash):
    """Same logits, bit by bit, with graphs reused (as they are, in prefill and decode) and never reused."""
    tokens, results, reused = TOKENS[:700], [], []
    for disable in ("0", "1"):
        monkeypatch.setenv("LLAMA_GRAPH_REUSE_DISABLE", disable)
        with load_model(SCHEDULE).context(n_ctx=1024, n_batch=64, n_ubatch=32, flash=flash) as ctx:
            ctx.set_prompt_end(0, 640)
            results.append([ctx.feed(tokens[:640])])
            reused.append([n_reused(ctx)])
            results[-1].append(ctx.feed(tokens[640:], chunk=1))
            reused[-1].append(n_reused(ctx) - reused[-1][0])
    assert np.array_equal(np.concatenate(results[0]), np.concatenate(results[1]))
    assert reused[1] == [0, 0]
    assert reused[0][0] >= 10
    assert reused[0][1] >= 50


def test_reuse_across_phases(load_model):
    """Prefill and decode ubatches of one shape in turns: none takes the graph of the other phase."""
    schedule = Sched(24, 4, (PREFILL, FULL, ALWAYS, PREFILL))
    with load_model(schedule).context(n_ctx=1024, n_batch=1, flash="off", kv="F32") as ctx:
        ctx.set_prompt_end(0, 100)
        got = [ctx.feed(TOKENS[:120])]
        assert np.abs(got[0] - forward(TOKENS[:120], schedule, 100)).max() < 1e-3
        at = 120
        for _ in range(5):
            ctx.set_prompt_end(0, at + 1)
            ctx.feed(TOKENS[at : at + 2])
            at += 2
    phases = [p >= 100 if p < 120 else p % 2 == 1 for p in range(130)]
    from tests.support.reference_numpy import NumpyModel

    want = NumpyModel(schedule).feed(TOKENS[:130], decode=phases)
    with load_model(schedule).context(n_ctx=1024, n_batch=1, flash="off", kv="F32") as ctx:
        got = []
        for p in range(130):
            ctx.set_prompt_end(0, p if phases[p] else p + 1)
            got.append(ctx.feed(TOKENS[p : p + 1]))
    assert np.abs(np.concatenate(got) - want).max() < 1e-3


@pytest.mark.parametrize("modes", ["1021", "2020", "1010", "1111"])
def test_no_reallocation_at_run_time(tmp_path, modes):
    """The compute buffers reserved at creation hold every graph: they have their size still when a context ends."""
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from tests.support.engine import EngineModel; from tests.support.masks import Sched
from tests.support.tiny import random_tokens, write_tiny_gguf
with EngineModel(write_tiny_gguf(sys.argv[2]), Sched(512, 100, tuple(map(int, sys.argv[3])))) as model:
    for flash, n_ubatch, n_seq_max in (("on", 512, 1), ("on", 128, 4), ("off", 128, 4)):
        with model.context(
            n_ctx=2304, n_batch=512, n_ubatch=n_ubatch, flash=flash, n_seq_max=n_seq_max, unified=n_seq_max > 1
        ) as ctx:
            ctx.run(random_tokens(1700), 1690)
            if n_seq_max > 1:
                ctx.set_prompt_end(1, 0)
                ctx.feed(random_tokens(512), seq=1)
print("done")
"""
    # With a device's buffer beside the host's, a graph of other nodes than the last is planned anew by the scheduler
    # (ggml_gallocr_alloc_graph), into the same buffers. This variable takes that for a reallocation.
    strict = {} if GPU_LAYERS else {"GGML_SCHED_DEBUG_REALLOC": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path / "m.gguf"), modes],
        env=os.environ | strict,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done" in done.stdout
    n_buffers = 2 if GPU_LAYERS else 1
    assert done.stderr.count(", matches expectation") == 3 * n_buffers, done.stderr[-2000:]
    assert done.stderr.count("compute buffer size is") == 3 * n_buffers, done.stderr[-2000:]


@pytest.mark.parametrize("n_ubatch", [64, 600])
@pytest.mark.parametrize("modes", [(PREFILL, FULL, PREFILL, FULL), (PREFILL, FULL, ALWAYS, PREFILL)])
def test_a_graph_that_grows_is_planned_once(load_model, modes, n_ubatch):
    """Planning waits for the device. What is planned anew for a longer cache has its outputs elsewhere."""
    n_ubatches = 24
    with load_model(Sched(WINDOW, SINKS, modes)).context(
        n_ctx=n_ubatches * n_ubatch, n_batch=n_ubatch, n_ubatch=n_ubatch, record=True
    ) as ctx:
        ctx.set_prompt_end(0, n_ubatches * n_ubatch)
        places = []
        for tokens in np.split(np.array(random_tokens(n_ubatches * n_ubatch)), n_ubatches):
            ctx.attention.clear()
            ctx.feed(tokens.tolist())
            places.append([op.out for op in ctx.attention])
    # the first ones have other graphs: no window yet, a short mask that is made on the host
    assert len({tuple(p) for p in places[16:]}) == 1


@pytest.mark.skipif(GPU_LAYERS > 0, reason="the digests are of nodes that all run on the CPU")
@pytest.mark.parametrize("name", stock_graph.MODELS)
def test_without_a_schedule_the_graph_is_upstream_s(tiny_model_factory, name):
    """Node by node, against digests taken from the unpatched build of the pinned version (`stock_graph.py`)."""
    want = json.loads((DATA / "stock_graphs.json").read_text())
    got = stock_graph.digests(tiny_model_factory(**stock_graph.MODELS[name]))
    assert got == want[name]


@pytest.mark.parametrize("name", stock_graph.MODELS)
def test_without_a_schedule_everything_is_bit_identical_to_the_unpatched_build(tiny_model_factory, name):
    """Logits and state files, in a process of its own on the unpatched libraries (SWAA_STOCK_LIB=DIR).

    All but flash attention with fewer than 64 tokens, which our kernels compute in F32 where upstream sums an
    F16 cache in F16: there the logits (of standard deviation 0.5) are near upstream's, and what is written to the cache
    with them.
    """
    stock = os.environ.get("SWAA_STOCK_LIB")
    if not stock:
        pytest.skip("SWAA_STOCK_LIB names no unpatched build of llama.cpp to compare with")
    path = tiny_model_factory(**stock_graph.MODELS[name])
    done = subprocess.run(
        [sys.executable, "-m", stock_graph.__name__, "outputs", str(path)],
        cwd=ROOT,
        env=os.environ | {"LLAMA_CPP_LIB_PATH": stock},
        capture_output=True,
        text=True,
        check=True,
    )
    want, got = json.loads(done.stdout), stock_graph.outputs(path)
    assert want.keys() == got.keys()
    for case, params in stock_graph.CASES.items():
        if params["flash"] == "on":
            np.testing.assert_allclose(got[case]["decode logits"], want[case]["decode logits"], atol=0.01)
            for rounded in ("decode logits", "decode", "state", "sequence state"):
                del got[case][rounded], want[case][rounded]
        assert got[case] == want[case], case
    assert hashlib.sha256(b"").hexdigest() not in done.stdout
