"""Large ubatches: the window in blocks of queries, the full mask made from parts. The oracle is the numpy reference."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from tests.support.engine import assert_close, captured_log, worst_ratio
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

TOKENS = random_tokens(1500)
PROMPT = 1480
WINDOW, SINKS = 100, 8
F16 = 1e-2  # of sigma

SCHEDULES = {
    "FA decode": Sched(WINDOW, SINKS, (PREFILL,) * 4),
    "window with sinks": Sched(WINDOW, SINKS, (ALWAYS,) * 4),
    "all modes": Sched(WINDOW, SINKS, (ALWAYS, FULL, PREFILL, FULL)),
    "no sinks": Sched(WINDOW, 0, (PREFILL, FULL, ALWAYS, PREFILL)),
}


@functools.cache
def reference(name: str) -> np.ndarray:
    return forward(TOKENS, SCHEDULES[name], PROMPT)


@pytest.mark.parametrize("n_ubatch", [1480, 1024, 700, 512])
@pytest.mark.parametrize("name", SCHEDULES)
def test_logits(load_model, name, n_ubatch):
    with load_model(SCHEDULES[name]).context(n_ctx=2048, n_batch=1480, n_ubatch=n_ubatch) as ctx:
        assert_close(ctx.run(TOKENS, PROMPT), reference(name), F16, n_ubatch)


@pytest.mark.parametrize("flash", ["on", "off"])
def test_logits_of_a_large_ubatch_with_an_f32_cache(load_model, flash):
    with load_model(SCHEDULES["all modes"]).context(n_ctx=2048, n_batch=1480, flash=flash, kv="F32") as ctx:
        assert_close(ctx.run(TOKENS, PROMPT), reference("all modes"), 1e-3 if flash == "off" else F16)


@pytest.mark.parametrize("kv", ["BF16", "Q8_0", "Q4_0"])
def test_other_cache_types_err_as_full_attention_does(load_model, kv):
    def rms_error(schedule: Sched, want: np.ndarray) -> float:
        with load_model(schedule).context(n_ctx=2048, n_batch=1480, kv=kv) as ctx:
            return float(np.sqrt(((ctx.run(TOKENS, PROMPT) - want) ** 2).mean()))

    full = Sched(WINDOW, SINKS, (FULL,) * 4)
    assert 0 < rms_error(SCHEDULES["all modes"], reference("all modes")) < 3 * rms_error(full, forward(TOKENS, full))


@pytest.mark.parametrize(
    ("n_ubatch", "n_block", "n_kv"), [(1024, 2, 768), (1480, 4, 512), (700, 2, 512), (512, 1, 768), (521, 1, 768)]
)
def test_a_window_is_read_in_blocks_of_at_most_512_queries(load_model, n_ubatch, n_block, n_kv):
    """A block reads sinks, window and itself, padded to 256; a number of tokens without such a divisor is one block."""
    with load_model(SCHEDULES["all modes"]).context(n_ctx=8192, n_batch=n_ubatch, record=True) as ctx:
        ctx.feed(random_tokens(2 * n_ubatch))
        ctx.attention.clear()
        ctx.feed(random_tokens(n_ubatch))
    for layer in (0, 2):
        assert [op[:4] for op in ctx.attention if op.layer == layer] == [(layer, n_kv, n_ubatch, n_block)]
    assert {op.n_block for op in ctx.attention if op.layer in (1, 3)} == {1}


@pytest.mark.parametrize(("n_ubatch", "parts"), [(1024, [512, 512]), (700, [512, 188]), (512, [512])])
def test_a_full_layer_reads_the_cache_in_parts_of_512_queries(load_model, n_ubatch, parts):
    with load_model(SCHEDULES["all modes"]).context(n_ctx=2048, n_batch=n_ubatch, record=True) as ctx:
        ctx.feed(random_tokens(n_ubatch))
        assert [op.n_tokens for op in ctx.attention if op.layer == 1] == parts


def test_full_layers_share_their_masks(load_model):
    """A GPU holds a copy of every tensor that it takes from the host: one of a mask of each layer would be too much."""
    with load_model(SCHEDULES["all modes"]).context(n_ctx=2048, n_batch=1024, record=True) as ctx:
        ctx.feed(TOKENS[:1024])
        masks = [[op.mask for op in ctx.attention if op.layer == layer] for layer in (1, 3)]
    assert masks[0] == masks[1]
    assert len(set(masks[0])) == 2


@pytest.mark.parametrize("kv", ["F16", "F32", "Q8_0"])
def test_a_graph_with_many_parts_has_room(load_model, kv):
    """llama.cpp aborts where a graph has more nodes than were reckoned with; few tensors a layer make it narrowest."""
    schedule = Sched(WINDOW, SINKS, (FULL,) * 39 + (PREFILL,))
    with load_model(schedule, arch="llama", n_layer=40).context(n_ctx=8192, n_batch=4096, kv=kv) as ctx:
        ctx.feed(TOKENS[:10])


def mask_inputs(ctx) -> set[str]:
    return {name for node in ctx.nodes for name in re.findall(r"attn_inp_kq_mask\w*", node)}


def test_the_full_mask_of_a_large_ubatch_is_not_an_input(load_model):
    with load_model(SCHEDULES["all modes"]).context(n_ctx=2048, n_batch=256, record_nodes=True) as ctx:
        ctx.feed(TOKENS[:1024])
        ctx.nodes.clear()
        ctx.feed(TOKENS[1024:1280])
        assert mask_inputs(ctx) == {"attn_inp_kq_mask_shared", "attn_inp_kq_mask_tail", "attn_inp_kq_mask_ring"}
        ctx.nodes.clear()
        ctx.set_prompt_end(0, 1280)
        ctx.feed(TOKENS[1280:1281])
        assert mask_inputs(ctx) == {"attn_inp_kq_mask", "attn_inp_kq_mask_ring"}


@pytest.mark.parametrize("unified", [True, False])
def test_two_sequences_in_one_ubatch(load_model, unified):
    """In turns, so that blocks and masks are of both; each as if alone."""
    schedule = Sched(WINDOW, SINKS, (PREFILL, FULL, PREFILL, FULL))
    a, b = TOKENS[:900], random_tokens(900, seed=1)
    with load_model(schedule).context(n_ctx=4096, n_batch=600, n_ubatch=600, n_seq_max=2, unified=unified) as ctx:
        for seq in (0, 1):
            ctx.set_prompt_end(seq, 900)
        got = [
            ctx.decode([(t[p], p, seq) for p in range(i, i + 300) for seq, t in ((0, a), (1, b))])
            for i in range(0, 900, 300)
        ]
    got = np.concatenate(got)
    for seq, tokens in ((0, a), (1, b)):
        assert_close(got[seq::2], forward(tokens, schedule, 900), F16, seq)


def test_cells_that_are_used_again_out_of_order(load_model):
    """Positions removed from the middle of the cache leave cells to later ones: the mask cannot be made from parts."""
    schedule = Sched(WINDOW, SINKS, (PREFILL, FULL, PREFILL, FULL))
    other = random_tokens(300, seed=2)
    with load_model(schedule).context(n_ctx=2048, n_batch=512, n_seq_max=2, unified=True, record_nodes=True) as ctx:
        ctx.set_prompt_end(0, 2000)
        ctx.set_prompt_end(1, 2000)
        ctx.feed(other, seq=1)
        got = [ctx.feed(TOKENS[:900])]
        assert ctx.rm(1, -1, -1)
        ctx.nodes.clear()
        got.append(ctx.feed(TOKENS[900:1400]))
        assert "attn_inp_kq_mask" in mask_inputs(ctx)
    assert_close(np.concatenate(got), forward(TOKENS[:1400], schedule, 1400), F16)


def test_a_window_that_hides_nothing_is_full_attention(load_model):
    """Up to W + k tokens a windowed prefill is the graph of full attention, to the bit."""
    schedule = Sched(500, 100, (PREFILL,) * 4)
    tokens = TOKENS[:600]
    with (
        load_model(schedule).context(n_batch=150) as windowed,
        load_model(Sched(1, 0, (FULL,) * 4)).context(n_batch=150) as full,
    ):
        assert np.array_equal(windowed.feed(tokens), full.feed(tokens))
    with load_model(schedule).context(n_ctx=1024, n_batch=700) as ctx:
        got = ctx.feed(TOKENS[:700])
    want = NumpyModel(schedule).feed(TOKENS[:700])
    assert worst_ratio(want, NumpyModel(Sched(1, 0, (FULL,) * 4)).feed(TOKENS[:700])) > 20 * F16
    assert_close(got, want, F16)


@pytest.mark.parametrize(("n_tokens", "kv"), [(1023, "Q8_0"), (777, "F32"), (1024, "F16")])
def test_compute_buffers_do_not_grow_with_the_number_of_blocks(load_model, n_tokens, kv):
    """1023 tokens are 3 blocks, which read more cells than the 2 of the largest ubatch of 1024."""
    model = load_model(Sched(1500, SINKS, (PREFILL,)), n_layer=1, n_head=8, n_head_kv=8, head_dim=64)
    ctx = model.context(n_ctx=4096, n_batch=1024, kv=kv)
    ctx.feed(random_tokens(2048 + n_tokens))
    with captured_log() as log:  # llama.cpp compares what it reserved with what it used when a context is freed
        ctx.close()
    assert "matches expectation" in "".join(log)
    assert "does not match" not in "".join(log)


def test_two_prompts_in_one_ubatch_find_their_buffers_reserved(load_model):
    """A unified cache cannot share a mask between sequences: windowed, with the whole mask as an input."""
    model = load_model(Sched(WINDOW, SINKS, (PREFILL, FULL, ALWAYS, FULL)))
    ctx = model.context(n_ctx=4096, n_batch=512, n_seq_max=2, unified=True)
    for i in range(0, 1500, 256):
        ctx.decode([(TOKENS[p], p, seq) for p in range(i, min(i + 256, 1500)) for seq in (0, 1)])
    with captured_log() as log:
        ctx.close()
    assert "does not match" not in "".join(log)
