"""Flash attention for more than eight tokens on the CPU: the op against numpy.

Patch 0015 lets several tiles of 64 queries, of one head or of the heads that share K and V, use a converted tile of
64 cells. So cases vary what falls into one group: tokens, heads, streams, threads, and what the mask hides of a tile.
"""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GT

from tests.support import flash_op
from tests.support.flash_op import Case, compute, expected, nmse, scattered, window

EXACT = 1e-10
SUMMED_IN_F16 = 1e-5


def sequences(n: int, n_cells: int) -> np.ndarray:
    """Each of n tokens sees n_cells of its own."""
    seen = np.eye(n, dtype=bool).repeat(n_cells, axis=1)
    return np.where(seen, 0, -np.inf)[None, None].astype(np.float32)


CASES = {
    "nine tokens": Case(n_tokens=9, mask=scattered(300, 9, 0.5)),
    "a tile less one": Case(n_tokens=63, n_head=6, n_head_kv=2, mask=window(300, 63, 100, 10)),
    "a few tokens, f32": Case(n_tokens=12, type_k=GT.F32, type_v=GT.F32, mask=scattered(300, 12, 0.5)),
    "a few tokens, alibi, softcap, sinks": Case(
        n_tokens=17, max_bias=8.0, softcap=5.0, sinks=True, mask=scattered(300, 17, 0.5), n_head=6, n_head_kv=3
    ),
    "a token of each sequence": Case(n_tokens=20, n_kv=20 * 50, mask=sequences(20, 50)),
    "some tokens of each sequence": Case(n_tokens=150, n_kv=1000, mask=sequences(10, 100).repeat(15, axis=2)),
    "a few tokens of many streams": Case(n_tokens=10, n_stream=5, mask=scattered(300, 10, 0.5, 5)),
    "one tile": Case(n_tokens=64),
    "a tile and one": Case(n_tokens=65),
    "more tiles than share K and V": Case(n_tokens=64 * 5 + 7, n_kv=400),
    "a cache of less than a tile": Case(n_tokens=64, n_kv=5),
    "a tile of the cache and one": Case(n_tokens=130, n_kv=65),
    "no gqa": Case(n_tokens=70, n_head=3, n_head_kv=3),
    "one kv head": Case(n_tokens=70, n_head=7, n_head_kv=1),
    "gqa of 3": Case(n_tokens=100, n_head=12, n_head_kv=4),
    "head size 40": Case(n_tokens=66, head_k=40, head_v=40),
    "head size 72": Case(n_tokens=66, head_k=72, head_v=72),
    "K wider than V": Case(n_tokens=66, head_k=192, head_v=128),
    "V wider than K": Case(n_tokens=66, head_k=32, head_v=96),
    "f32": Case(n_tokens=130, type_k=GT.F32, type_v=GT.F32),
    "causal": Case(n_tokens=300, mask=window(300, 300, 10**6)),
    "window": Case(n_tokens=200, n_kv=1000, mask=window(1000, 200, 100)),
    "window and sinks": Case(n_tokens=256, n_kv=1000, mask=window(1000, 256, 100, 10)),
    "scattered cells": Case(n_tokens=130, n_kv=517, mask=scattered(517, 130, 0.05)),
    "few cells": Case(n_tokens=70, n_kv=4000, mask=scattered(4000, 70, 0.0002)),
    "a mask of zeros": Case(n_tokens=70, mask=np.zeros((1, 1, 70, 300), np.float32)),
    "a mask per head": Case(n_tokens=70, mask=scattered(300, 70, 0.5, 4).reshape(1, 4, 70, 300)),
    "alibi": Case(n_tokens=70, max_bias=8.0, mask=scattered(300, 70, 0.7)),
    "alibi, odd heads": Case(n_tokens=70, max_bias=8.0, mask=scattered(300, 70, 0.7), n_head=6, n_head_kv=3),
    "softcap": Case(n_tokens=70, softcap=5.0),
    "attention sinks": Case(n_tokens=70, sinks=True, mask=scattered(300, 70, 0.5)),
    "streams": Case(n_tokens=70, n_stream=3, mask=scattered(300, 70, 0.5, 3)),
    "streams, one mask": Case(n_tokens=70, n_stream=3, mask=scattered(300, 70, 0.5)),
    "head by head": Case(n_tokens=70, head_major=True, n_kv=333, mask=scattered(333, 70, 0.6)),
    "everything": Case(
        n_kv=777, n_tokens=150, n_head=10, n_head_kv=5, head_k=96, head_v=64, n_stream=2,
        mask=scattered(777, 150, 0.3, 2), max_bias=4.0, softcap=20.0, sinks=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("n_threads", [1, 2, 3, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_op_is_what_numpy_computes(case, n_threads):
    """A build without vectors leaves less than a tile of tokens to llama.cpp's own path, which sums F16 in F16."""
    left_to_upstream = flash_op.IS_SCALAR and case.n_tokens < 64
    assert nmse(compute(case, n_threads), expected(case)) < (SUMMED_IN_F16 if left_to_upstream else EXACT)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_token_that_sees_nothing_gets_zeros(sinks):
    mask = scattered(400, 140, 0.5)
    blind = np.r_[1, 64:128, 139]  # a row of a tile, a whole tile, the last row
    mask[0, 0, blind] = -np.inf
    got = compute(Case(n_kv=400, n_tokens=140, mask=mask, sinks=sinks))
    assert (got[0, blind] == 0).all()
    assert (np.delete(got[0], blind, axis=0) != 0).all()


def test_a_tile_of_cells_that_no_token_sees_is_not_read():
    """The cache may hold anything there, NaN for one: it must not reach the result."""
    mask = window(640, 128, 100, 4)
    case = Case(n_kv=640, n_tokens=128, mask=mask)
    want = expected(case)
    data = flash_op.inputs(case)
    hidden = np.isinf(mask[0, 0]).all(axis=0).reshape(-1, 64).all(axis=1).repeat(64)
    assert hidden.any()
    data.k[:, hidden] = np.nan
    data.v[:, hidden] = np.nan
    assert nmse(compute(case, data=data), want) < EXACT


def test_one_stream_s_values_do_not_reach_another():
    """The second sees the last cells only, which are less than a tile: beside them must not be what the first left."""
    mask = scattered(100, 70, 0.5, 2)
    mask[0] = 0
    mask[1, ..., :64] = -np.inf
    mask[1, ..., 99] = 0
    case = Case(n_kv=100, n_tokens=70, n_stream=2, mask=mask)
    want = expected(case)
    data = flash_op.inputs(case)
    data.v[0] = np.nan
    assert nmse(compute(case, data=data)[1], want[1]) < EXACT


def test_threads_do_not_change_a_bit():
    case = Case(n_kv=1500, n_tokens=200, mask=scattered(1500, 200, 0.5))
    first = compute(case)
    assert all((compute(case, n_threads) == first).all() for n_threads in (2, 3, 5, 16))


@pytest.mark.parametrize(("head_k", "head_v"), [(64, 64), (128, 128), (576, 512)])
def test_the_scratch_memory_is_bounded(head_k, head_v):
    """A thread holds a tile of K and V and the queries and results of four tiles, whatever the cache's length."""
    sizes = {
        flash_op.work_bytes(Case(n_tokens=64, n_kv=n_kv, head_k=head_k, head_v=head_v), 64) for n_kv in (100, 10_000)
    }
    assert len(sizes) == 1
    assert sizes.pop() < 64 * (64 * 5 * (head_k + head_v) * 4 + 2**17)
