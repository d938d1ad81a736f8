"""A tiny hybrid model, LFM2: layers with attention, as those of the tiny Qwen3, among layers with a short convolution.

`write_tiny_hybrid` makes the file, `NumpyHybrid` is its oracle, written from the definition of the architecture: a
recurrent layer multiplies two projections of its input, runs a causal convolution of `L_CACHE` tokens over each channel
of the product, and multiplies that by a third projection. Its state is the last tokens of the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import FULL, TinyShape, tiny_weights, write_tiny_gguf

L_CACHE = 3
ATTENDING = (1, 3, 4, 6)
"""The layers with attention, of `N_LAYER`."""
N_LAYER = 7
SHAPE = TinyShape(n_layer=N_LAYER)


def hybrid_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Under the names of the tiny Qwen3 and of LFM2's short convolutions, shapes as of `tiny_weights`."""
    rng = np.random.default_rng(seed + 1000)
    e = SHAPE.n_embd

    def mat(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = tiny_weights(SHAPE, seed)
    for i in set(range(N_LAYER)) - set(ATTENDING):
        p = f"blk.{i}."
        for name in [name for name in weights if name.startswith(p + "attn_") and "attn_norm" not in name]:
            del weights[name]
        weights[p + "shortconv.in_proj.weight"] = mat(3 * e, e)
        weights[p + "shortconv.conv.weight"] = mat(e, L_CACHE)
        weights[p + "shortconv.out_proj.weight"] = mat(e, e, gain=0.6)
    return weights


def write_tiny_hybrid(path: str | Path, *, schedule: Sched | Any = None, seed: int = 0, **kwargs: Any) -> Path:
    """The file; keywords as of `write_tiny_gguf`."""
    weights = hybrid_weights(seed)
    weights["token_embd_norm.weight"] = weights.pop("output_norm.weight")  # as upstream's table calls it
    heads = [SHAPE.n_head_kv if i in ATTENDING else 0 for i in range(N_LAYER)]
    extra = {"lfm2.shortconv.l_cache": L_CACHE, "lfm2.attention.head_count_kv": heads} | kwargs.pop("extra", {})
    return write_tiny_gguf(
        path, n_layer=N_LAYER, file_arch="lfm2", weights=weights, extra=extra, schedule=schedule, **kwargs
    )


def hybrid(window: int, sinks: int, modes: Sequence[int]) -> Sched:
    """A schedule with these modes for the layers with attention; the others stand as FULL."""
    found = dict(zip(ATTENDING, modes, strict=True))
    return Sched(window, sinks, tuple(found.get(i, FULL) for i in range(N_LAYER)))


class NumpyHybrid(NumpyModel):
    """`NumpyModel` with states. What a state holds cannot be removed: `remove` takes whole sequences alone."""

    def __init__(self, schedule: Sched | None = None, seed: int = 0) -> None:
        super().__init__(schedule, shape=SHAPE, weights=hybrid_weights(seed))
        self.states = {i: np.zeros((L_CACHE - 1, SHAPE.n_embd)) for i in range(N_LAYER) if i not in ATTENDING}

    def copy(self) -> NumpyHybrid:
        other = super().copy()
        assert isinstance(other, NumpyHybrid)
        other.states = dict(self.states)
        return other

    def _attention(
        self, h: np.ndarray, layer: Mapping[str, np.ndarray], i: int, pos: np.ndarray, phase: np.ndarray
    ) -> np.ndarray:
        if i not in self.states:
            return super()._attention(h, layer, i, pos, phase)
        b, c, x = np.split(h @ layer["shortconv.in_proj.weight"].T, 3, axis=1)
        past = np.concatenate([self.states[i], b * x])
        self.states[i] = past[len(past) - (L_CACHE - 1) :]
        kernel = layer["shortconv.conv.weight"]
        convolved = sum(past[j : j + len(pos)] * kernel[:, j] for j in range(L_CACHE))
        return (c * convolved) @ layer["shortconv.out_proj.weight"].T


def forward_hybrid(tokens: Sequence[int], schedule: Sched | None = None, prompt_end: int | None = None) -> np.ndarray:
    """As `reference_numpy.forward`."""
    decode = np.arange(len(tokens)) >= (len(tokens) if prompt_end is None else prompt_end)
    return NumpyHybrid(schedule).feed(tokens, decode=decode)
