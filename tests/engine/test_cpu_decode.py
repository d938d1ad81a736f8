"""Flash attention for few query rows on the CPU: the op against numpy, then decode through the engine.

The kernel of patch 0006 keeps its sums in F32 and is exact to about 1e-13 (normalized mean squared error); upstream's
paths sum an F16 cache in F16. So the bound below also shows that it was this kernel that computed the op.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GT

from tests.support import flash_op
from tests.support.engine import assert_close
from tests.support.flash_op import Case, compute, expected, inputs, nmse, scattered, window
from tests.support.masks import Sched
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

EXACT = 1e-10
UPSTREAM = 5e-4

CASES = {
    "plain": Case(),
    "one cell": Case(n_kv=1),
    "a block less one": Case(n_kv=63),
    "a block and one": Case(n_kv=65),
    "many blocks": Case(n_kv=2049),
    "no gqa": Case(n_head=3, n_head_kv=3),
    "one kv head": Case(n_head=7, n_head_kv=1),
    "gqa of 3": Case(n_head=12, n_head_kv=4, n_tokens=3),
    "head size 40": Case(head_k=40, head_v=40),
    "head size 72": Case(head_k=72, head_v=72, n_tokens=2),
    "head size 128": Case(head_k=128, head_v=128, n_head=16, n_head_kv=8, n_kv=700),
    "K wider than V": Case(head_k=192, head_v=128),
    "V wider than K": Case(head_k=32, head_v=96, type_k=GT.Q8_0, type_v=GT.Q8_0),
    "mla": Case(head_k=576, head_v=512, n_head=16, n_head_kv=1, n_kv=90),
    "f32": Case(type_k=GT.F32, type_v=GT.F32),
    "bf16": Case(type_k=GT.BF16, type_v=GT.BF16),
    "q8_0": Case(type_k=GT.Q8_0, type_v=GT.Q8_0),
    "q4_0": Case(type_k=GT.Q4_0, type_v=GT.Q4_0),
    "q5_1": Case(type_k=GT.Q5_1, type_v=GT.Q5_1),
    "q8_0 and q4_0": Case(type_k=GT.Q8_0, type_v=GT.Q4_0),
    "f16 and q8_0": Case(type_k=GT.F16, type_v=GT.Q8_0),
    "eight tokens": Case(n_tokens=8, mask=window(300, 8, 10**6)),
    "window": Case(n_kv=1000, mask=window(1000, 1, 100)),
    "window and sinks": Case(n_kv=1000, n_tokens=4, mask=window(1000, 4, 100, 10), type_k=GT.Q8_0, type_v=GT.Q8_0),
    "scattered cells": Case(n_kv=517, n_tokens=5, mask=scattered(517, 5, 0.05)),
    "few cells": Case(n_kv=4000, n_tokens=2, mask=scattered(4000, 2, 0.001)),
    "alibi": Case(max_bias=8.0, mask=scattered(300, 2, 0.7), n_tokens=2),
    "alibi, odd heads": Case(max_bias=8.0, mask=scattered(300, 1, 0.7), n_head=6, n_head_kv=3),
    "softcap": Case(softcap=5.0),
    "attention sinks": Case(sinks=True, mask=scattered(300, 3, 0.5), n_tokens=3),
    "streams": Case(n_stream=3, n_tokens=2, mask=scattered(300, 2, 0.5, 3)),
    "streams, one mask": Case(n_stream=3, mask=scattered(300, 1, 0.5)),
    "many streams": Case(n_head=32, n_head_kv=8, n_stream=64, n_kv=40, mask=scattered(40, 1, 0.5)),
    "streams, no mask": Case(n_stream=2, n_kv=65, type_k=GT.Q4_0, type_v=GT.Q4_0),
    "head by head": Case(head_major=True, n_kv=333, mask=scattered(333, 2, 0.6), n_tokens=2),
    "head by head, q8_0": Case(head_major=True, type_k=GT.Q8_0, type_v=GT.Q8_0),
    "everything": Case(
        n_kv=777, n_tokens=6, n_head=10, n_head_kv=5, head_k=96, head_v=64, type_k=GT.Q8_0, type_v=GT.F16, n_stream=2,
        mask=scattered(777, 6, 0.3, 2), max_bias=4.0, softcap=20.0, sinks=True,
    ),
}  # fmt: skip


def shared(case: Case) -> Case:
    """With four query heads on each head of K and V, for which x86 has a way of its own."""
    return replace(case, n_head=4 * case.n_head_kv)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_op_is_what_numpy_computes(case, n_threads):
    assert nmse(compute(case, n_threads), expected(case)) < EXACT


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_several_query_heads_share_a_head_of_the_cache(case, n_threads):
    assert nmse(compute(shared(case), n_threads), expected(shared(case))) < EXACT


@pytest.mark.parametrize("kind", [GT.F16, GT.F32, GT.Q8_0, GT.Q4_0, GT.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_head", [2, 4, 6, 14], ids=lambda n: f"{n} heads on 2")
def test_a_token_is_the_same_to_the_bit_beside_others(n_head, kind):
    """Whatever they see: the cells that a token alone does not touch are computed for the others."""
    case = Case(n_kv=777, n_tokens=8, n_head=n_head, head_k=96, head_v=96, type_k=kind, type_v=kind)
    data = inputs(case)
    for mask in (scattered(777, 8, 0.5), window(777, 8, 100, 3)):
        together = compute(replace(case, mask=mask), 2, data)
        for i in range(8):
            alone = replace(case, n_tokens=1, mask=mask[:, :, i : i + 1])
            own = replace(data, q=data.q[:, i : i + 1])
            assert np.array_equal(compute(alone, 2, own)[:, 0], together[:, i]), f"token {i}"


@pytest.mark.parametrize("n_stream", [1, 2])
def test_there_may_be_more_threads_than_blocks(n_stream):
    case = Case(n_kv=70, n_stream=n_stream, n_tokens=2, mask=window(70, 2, 50))
    assert nmse(compute(case, 16), expected(case)) < EXACT


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_token_that_sees_nothing_gets_zeros(n_threads, sinks):
    mask = scattered(400, 4, 0.5)
    mask[0, 0, [1, 3]] = -np.inf
    got = compute(Case(n_kv=400, n_tokens=4, mask=mask, sinks=sinks), n_threads)
    assert (got[0, [1, 3]] == 0).all()
    assert (got[0, [0, 2]] != 0).all()


def test_cells_that_no_token_sees_are_not_read():
    """The cache may hold anything there, NaN for one: it must not reach the result."""
    mask = window(500, 2, 60, 4)
    case = Case(n_kv=500, n_tokens=2, mask=mask)
    want = expected(case)
    data = flash_op.inputs(case)
    hidden = np.isinf(mask[0, 0]).all(axis=0)
    data.k[:, hidden] = np.nan
    data.v[:, hidden] = np.inf
    assert nmse(compute(case, data=data), want) < EXACT


@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_result_is_the_same_every_time(n_threads):
    case = Case(n_kv=1500, n_tokens=2, mask=scattered(1500, 2, 0.5))
    first = compute(case, n_threads)
    assert all((compute(case, n_threads) == first).all() for _ in range(5))


UNSERVED = {
    "nine tokens": Case(n_tokens=9, mask=scattered(300, 9, 0.5), type_k=GT.Q8_0, type_v=GT.Q8_0),
    "a mask per head": Case(mask=scattered(300, 1, 0.5, 4).reshape(1, 4, 1, 300)),
    "too many streams": Case(n_head=32, n_head_kv=8, n_stream=65, n_kv=40, mask=scattered(40, 1, 0.5)),
    "too many rows": Case(n_head=68, n_head_kv=2, n_tokens=8, mask=scattered(300, 8, 0.5)),
}


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("case", UNSERVED.values(), ids=UNSERVED)
def test_other_ops_go_to_upstream_s_paths(case, n_threads):
    assert nmse(compute(case, n_threads), expected(case)) < UPSTREAM


@pytest.mark.parametrize(("n_stream", "n_tokens"), [(1, 8), (16, 1), (32, 2), (64, 1), (128, 4)])
def test_the_scratch_memory_is_bounded(n_stream, n_tokens):
    """Each thread has a result of its own for every row of every stream: 2048 of them, of 128 values, are 1 MiB."""
    case = Case(n_head=64, n_head_kv=2, head_k=128, head_v=128, n_kv=8, n_stream=n_stream, n_tokens=n_tokens)
    assert flash_op.work_bytes(case, 64) < 64 * 1.75 * 2**20


SHAPES = {
    "gqa of 2": {"n_head": 4, "n_head_kv": 2, "head_dim": 32},
    "no gqa": {"n_head": 3, "n_head_kv": 3, "head_dim": 64},
    "one kv head": {"n_head": 6, "n_head_kv": 1, "head_dim": 96},
}


def decoded(model, lengths: tuple[int, ...], **params) -> np.ndarray:
    """Prefill a sequence of each length, then decode a token of each at once, four times."""
    with model.context(n_ctx=4096, n_batch=256, n_ubatch=128, n_seq_max=len(lengths), **params) as ctx:
        for seq, n in enumerate(lengths):
            ctx.set_prompt_end(seq, n)
            ctx.feed(random_tokens(n, seed=seq), seq=seq)
        tokens = random_tokens(4, seed=99)
        steps = [ctx.decode([(t, n + i, seq) for seq, n in enumerate(lengths)]) for i, t in enumerate(tokens)]
    return np.concatenate(steps)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("n_threads", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_is_the_same_without_flash_attention(load_model, shape, n_threads):
    model = load_model(n_layer=2, **shape)
    want = decoded(model, (700,), flash="off")
    assert_close(decoded(model, (700,), flash="on", n_threads=n_threads), want, 0.02)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("schedule", [None, Sched(64, 8, (PREFILL, FULL, ALWAYS, FULL))], ids=["full", "scheduled"])
def test_decode_of_several_sequences_is_the_same_without_flash_attention(load_model, schedule, unified):
    model, lengths = load_model(schedule), (300, 40, 513)
    want = decoded(model, lengths, unified=unified, flash="off")
    assert_close(decoded(model, lengths, unified=unified, flash="on", n_threads=2), want, 0.02)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kv", ["BF16", "Q8_0", "Q4_0"])
def test_decode_from_a_quantized_cache_is_near_that_from_f16(load_model, kv):
    """How near is the type's own precision: the errors of 16, 8 and 4 bits."""
    model = load_model(n_layer=2)
    want = decoded(model, (700,), kv="F16", flash="on")
    assert_close(decoded(model, (700,), kv=kv, flash="on"), want, {"BF16": 0.1, "Q8_0": 0.1, "Q4_0": 1.5}[kv])
