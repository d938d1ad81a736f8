"""Attention of one token, as decode computes it, on the device that the engine's tests use: the op against numpy.

With grouped query attention several heads share K and V, and a kernel may read them once for some of these heads. So
the groups here are of every size: smaller, larger, and no multiple of what a kernel takes.
"""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GT

from tests.support.engine import GPU_LAYERS
from tests.support.flash_op import Case, compute_on_device, expected, nmse, scattered

pytestmark = pytest.mark.usefixtures("engine")

LIMIT = 5e-4
"""Normalized mean squared error that upstream's test-backend-ops allows."""

LIMIT_Q4_0_ON_A_GPU = 2e-3
"""CUDA multiplies Q, rounded to 8 bits, with the 4 bits as they are (0 to 15), and takes off 8 times the sum of Q, not
rounded. The same arithmetic in numpy is off by 0.0017 at most in these cases, and by more than LIMIT in 52 of them."""


def ring(n_kv: int, width: int, start: int, sinks: int = 4) -> np.ndarray:
    """Cells of a ring that one token sees: the first ones, and `width` from `start` on, which may go around its end."""
    seen = np.zeros(n_kv, bool)
    seen[:sinks] = True
    seen[(start + np.arange(width)) % n_kv] = True
    return np.where(seen, 0, -np.inf)[None, None, None].astype(np.float32)


CASES = {
    f"{n_group} heads a group, {kind.name}, head size {size}, {n_kv} cells": Case(
        n_kv=n_kv, n_head=2 * n_group, n_head_kv=2, head_k=size, head_v=size, type_k=kind, type_v=kind,
        mask=ring(n_kv, n_kv // 2, 3 * n_kv // 4),
    )
    for n_group in (1, 2, 3, 4, 5, 6, 7, 8, 16)
    for kind in (GT.F16, GT.Q8_0, GT.Q4_0)
    for size in (64, 128, 256)
    for n_kv in (256, 1024, 2816)
} | {
    "attention sinks": Case(n_kv=1280, n_head=16, n_head_kv=2, sinks=True, mask=ring(1280, 900, 700)),
    "attention sinks, an odd group": Case(n_kv=1280, n_head=6, n_head_kv=2, sinks=True, mask=ring(1280, 900, 700)),
    "softcap": Case(n_kv=1024, n_head=8, n_head_kv=2, head_k=128, head_v=128, softcap=5.0, mask=ring(1024, 500, 600)),
    "softcap, q8_0": Case(
        n_kv=1024, n_head=8, n_head_kv=2, head_k=256, head_v=256, softcap=5.0, mask=ring(1024, 500, 600),
        type_k=GT.Q8_0, type_v=GT.Q8_0,
    ),
    "streams": Case(
        n_kv=1024, n_head=6, n_head_kv=2, head_k=128, head_v=128, n_stream=3, mask=scattered(1024, 1, 0.4, 3)
    ),
    "streams, q8_0": Case(
        n_kv=1024, n_head=14, n_head_kv=2, head_k=128, head_v=128, n_stream=2, mask=scattered(1024, 1, 0.4, 2),
        type_k=GT.Q8_0, type_v=GT.Q8_0,
    ),
    "no mask": Case(n_kv=1024, n_head=8, n_head_kv=2, head_k=128, head_v=128),
    "alibi": Case(n_kv=1024, n_head=8, n_head_kv=2, head_k=128, head_v=128, max_bias=8.0, mask=scattered(1024, 1, 0.5)),
    "one tile of all is seen": Case(
        n_kv=4096, n_head=8, n_head_kv=2, head_k=128, head_v=128, mask=ring(4096, 60, 2000, sinks=0)
    ),
    "two tokens, q8_0": Case(
        n_kv=1024, n_tokens=2, n_head=8, n_head_kv=2, head_k=128, head_v=128, mask=scattered(1024, 2, 0.4),
        type_k=GT.Q8_0, type_v=GT.Q8_0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_op_is_what_numpy_computes(case: Case) -> None:
    limit = LIMIT_Q4_0_ON_A_GPU if GPU_LAYERS and case.type_k == GT.Q4_0 else LIMIT
    assert nmse(compute_on_device(case), expected(case)) < limit
