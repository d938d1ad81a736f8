"""Matrices of every type, in passes of one and of several tokens, against numpy with the rounded weights.

Passes of one token take kernels of their own, and on CUDA one kernel for all products with the same vector (Q, K and V
of a layer, with their biases). There a warp takes several rows where a GPU has fewer warps than the matrices have rows,
and several turns for a row of more than 2048 columns: `WIDE` is of the size of a real model's layer.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.engine import GPU_LAYERS, GPU_TOLERANCE, EngineModel, worst_ratio
from tests.support.masks import Sched
from tests.support.reference_numpy import forward
from tests.support.tiny import (
    ALWAYS,
    FULL,
    PREFILL,
    TinyShape,
    is_matrix,
    random_tokens,
    tiny_weights,
    write_tiny_gguf,
)

pytestmark = pytest.mark.usefixtures("engine")

# The worst logit, in sigma. Quantized matrices are multiplied with activations in 8 bits, and BF16 with BF16, which the
# reference does not round (on an H200 by up to 0.19); a product that goes to the wrong rows is off by whole sigmas.
LIMITS = {"F32": 1e-2, "F16": 1e-2, "BF16": 0.05, "Q8_0": 0.3, "Q4_0": 0.3, "Q4_1": 0.3, "Q5_0": 0.3, "Q5_1": 0.3}
if GPU_LAYERS:
    LIMITS = {kind: max(limit, GPU_TOLERANCE) for kind, limit in LIMITS.items()}
ARCHES = ("llama", "qwen2", "qwen3", "qwen3moe")
TOKENS = random_tokens(72)
PROMPT = 40
SCHEDULE = Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS))
WIDE: dict[str, Any] = {"n_layer": 1, "n_embd": 2560, "n_head": 40, "n_head_kv": 8, "head_dim": 128, "n_ff": 12288}


@functools.cache
def reference(arch: str, kind: str) -> np.ndarray:
    """Logits with the matrices as the file has them."""
    shape = TinyShape(arch=arch)
    return forward(TOKENS, SCHEDULE, PROMPT, shape=shape, weights=as_in_the_file(tiny_weights(shape), kind))


def as_in_the_file(weights: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    to = gguf.GGMLQuantizationType[kind]
    return {
        name: gguf.quants.dequantize(gguf.quants.quantize(array, to), to) if is_matrix(name) else array
        for name, array in weights.items()
    }


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("arch", ARCHES)
def test_logits(tmp_path: Path, arch: str, kind: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", arch=arch, weight_type=kind)
    with EngineModel(path, SCHEDULE) as model, model.context(n_batch=64, n_ubatch=32) as ctx:
        got = ctx.run(TOKENS, PROMPT)
    assert worst_ratio(got, reference(arch, kind)) < LIMITS[kind]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_passes_of_one_token_and_of_several_agree(tmp_path: Path, kind: str) -> None:
    """Within what each may be off the reference."""
    path = write_tiny_gguf(tmp_path / "model.gguf", arch="qwen2", weight_type=kind)
    runs = []
    for step in (1, 2, 5, 8):
        with EngineModel(path) as model, model.context(n_batch=64) as ctx:
            first = ctx.feed(TOKENS[:PROMPT])
            rest = [ctx.feed(TOKENS[i : i + step]) for i in range(PROMPT, len(TOKENS), step)]
            runs.append(np.concatenate([first, *rest]))
    for run in runs[1:]:
        assert worst_ratio(run, runs[0]) < LIMITS[kind]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_matrices_as_large_as_a_real_model_s(tmp_path: Path, kind: str) -> None:
    weights = tiny_weights(TinyShape(**WIDE))
    path = write_tiny_gguf(tmp_path / "model.gguf", weights=weights, weight_type=kind, **WIDE)
    schedule, tokens, prompt = Sched(8, 2, (ALWAYS,)), TOKENS[:20], 12
    with EngineModel(path, schedule) as model, model.context(n_batch=64, n_ubatch=32) as ctx:
        got = ctx.run(tokens, prompt)
    want = forward(tokens, schedule, prompt, shape=TinyShape(**WIDE), weights=as_in_the_file(weights, kind))
    assert worst_ratio(got, want) < LIMITS[kind]
