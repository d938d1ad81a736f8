"""What a GPU leaves to the CPU: nothing of a layer, with a schedule or without, by the scheduler's own account.

An operation that a backend does not declare is computed on the CPU, and what it needs is copied there and back, in
every layer. So the number of such operations is the test, and not a speed.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.engine import GPU_LAYERS, EngineContext, EngineModel, PlacedOp
from tests.support.masks import Sched
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

N_LAYER = 4
pytestmark = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.skipif(GPU_LAYERS == 0, reason="SWAA_TEST_GPU_LAYERS puts no layers on a GPU"),
    pytest.mark.skipif(0 < GPU_LAYERS <= N_LAYER, reason="SWAA_TEST_GPU_LAYERS leaves layers on the CPU"),
]

TOKENS = random_tokens(1100)
SCHEDULES = {
    "no schedule": None,
    "full": Sched(100, 8, (FULL,) * N_LAYER),
    "FA decode": Sched(100, 8, (PREFILL,) * N_LAYER),
    "rings": Sched(100, 8, (ALWAYS,) * N_LAYER),
    "all modes": Sched(100, 8, (ALWAYS, FULL, PREFILL, FULL)),
}


def run(ctx: EngineContext, n_prompt: int) -> list[PlacedOp]:
    """A prompt, and some tokens that are generated; the operations of all graphs of it."""
    ctx.set_prompt_end(0, n_prompt)
    ctx.feed(TOKENS[:n_prompt])
    ctx.feed(TOKENS[n_prompt : n_prompt + 3], chunk=1)
    return [op for graph in ctx.places for op in graph]


def on_the_cpu(ops: list[PlacedOp]) -> Counter[str]:
    """Of what is in the layers; the model's input is read on the CPU, by llama.cpp's own choice."""
    return Counter(f"{op.op} {op.name}" for op in ops if op.device == "CPU" and op.name not in ("embd", "inp_embd"))


@pytest.mark.parametrize("kv", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("n_ubatch", [64, 600])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_of_a_layer_is_on_the_cpu(load_model, name, n_ubatch, kv):
    """Short ubatches, windows in blocks, full layers in parts; while reading and while writing."""
    model = load_model(SCHEDULES[name])
    with model.context(n_ctx=2048, n_batch=n_ubatch, n_ubatch=n_ubatch, kv=kv, record_places=True) as ctx:
        ops = run(ctx, n_ubatch + 300)
        graphs = ctx.places
    kinds = {op.op for op in ops}
    assert "FLASH_ATTN" in kinds
    assert not on_the_cpu(ops)
    # one part for the input, one for all that follows
    assert {max(op.split for op in graph) for graph in graphs} == {1}
    if SCHEDULES[name] is not None and name != "full":
        assert sum(op.op == "GET_ROWS" and op.device != "CPU" for op in ops) >= 2 * 2


@pytest.mark.parametrize("kv", ["F32", "F16"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_of_a_layer_is_on_the_cpu_without_flash_attention(load_model, name, kv):
    with load_model(SCHEDULES[name]).context(
        n_ctx=2048, n_batch=600, n_ubatch=600, flash="off", kv=kv, record_places=True
    ) as ctx:
        ops = run(ctx, 900)
    assert "SOFT_MAX" in {op.op for op in ops}
    assert not on_the_cpu(ops)


@pytest.mark.parametrize("unified", [True, False])
def test_nothing_of_a_layer_is_on_the_cpu_with_several_sequences(load_model, unified):
    with load_model(SCHEDULES["all modes"]).context(
        n_ctx=4096, n_batch=600, n_ubatch=600, n_seq_max=2, unified=unified, record_places=True
    ) as ctx:
        for seq in (0, 1):
            ctx.set_prompt_end(seq, 900)
        for start in range(0, 900, 300):
            ctx.decode([(TOKENS[p], p, seq) for p in range(start, start + 300) for seq in (0, 1)])
        ctx.decode([(TOKENS[900], 900, seq) for seq in (0, 1)])
        ops = [op for graph in ctx.places for op in graph]
    assert not on_the_cpu(ops)


def test_a_draft_is_not_on_the_cpu(tiny_model_factory):
    with EngineModel(tiny_model_factory(), SCHEDULES["all modes"]) as model:
        model.set_draft(64, 4)
        with model.context(n_ctx=2048, n_batch=256, n_ubatch=64, record_places=True) as ctx:
            ctx.set_prompt_end(0, 500)
            ctx.feed(TOKENS[:500])
            ctx.places.clear()
            ctx.set_draft_start(0, 500)
            ctx.feed(TOKENS[500:503], chunk=1)
            ops = [op for graph in ctx.places for op in graph]
    assert ops
    assert not on_the_cpu(ops)


def test_an_operation_that_is_left_to_the_cpu_would_be_seen(load_model):
    """The count itself: with the cache left on the host, what stores into it and what gathers from it is there."""
    with load_model(SCHEDULES["FA decode"]).context(
        n_ctx=1024, n_batch=64, n_ubatch=64, offload_kqv=False, record_places=True
    ) as ctx:
        found = on_the_cpu(run(ctx, 300))
    for kind in ("SET_ROWS", "GET_ROWS"):
        assert sum(n for what, n in found.items() if what.startswith(kind)) >= 2 * N_LAYER, found
