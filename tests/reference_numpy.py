"""A transformer's forward pass in numpy, float64, over `tiny.tiny_weights`: the oracle of the engine tests.

Written from the definitions of the architectures, without llama.cpp and without PyTorch, so these tests run wherever
the engine does. The whole token sequence goes through in one pass; masks come from `masks.layer_masks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from masks import Sched, full_schedule, layer_masks
from tiny import TinyShape, tiny_weights


def forward(
    tokens: Sequence[int],
    *,
    shape: TinyShape | None = None,
    seed: int = 0,
    weights: Mapping[str, np.ndarray] | None = None,
    schedule: Sched | None = None,
    prompt_end: int | Sequence[bool] | None = None,
    positions: Sequence[int] | None = None,
    rope_base: float | None = None,
    rope_scale: float = 1.0,
) -> np.ndarray:
    """Logits (n, n_vocab) of every position, float64.

    `positions` are what RoPE sees (default 0, 1, ...); masks always count tokens. `rope_scale` multiplies positions, as
    llama.cpp's `rope_freq_scale` does.
    """
    shape = shape or TinyShape()
    w = {k: v.astype(np.float64) for k, v in (weights or tiny_weights(shape, seed)).items()}
    n, d, group = len(tokens), shape.head_dim, shape.n_head // shape.n_head_kv
    masks = layer_masks(schedule or full_schedule(shape.n_layer), n, prompt_end)
    where = np.asarray(np.arange(n) if positions is None else positions, np.float64) * rope_scale
    inv_freq = (rope_base or shape.rope_base) ** (-np.arange(0, d, 2) / d)
    angle = where[:, None, None] * inv_freq
    cos, sin = np.cos(angle), np.sin(angle)

    x = w["token_embd.weight"][list(tokens)]
    for i in range(shape.n_layer):
        layer = {k.removeprefix(f"blk.{i}."): v for k, v in w.items() if k.startswith(f"blk.{i}.")}
        h = _rms_norm(x, layer["attn_norm.weight"], shape.norm_eps)
        q, k, v = (h @ layer[f"attn_{name}.weight"].T + layer.get(f"attn_{name}.bias", 0) for name in "qkv")
        q = q.reshape(n, shape.n_head, d)
        k = k.reshape(n, shape.n_head_kv, d)
        v = v.reshape(n, shape.n_head_kv, d)
        if "attn_q_norm.weight" in layer:
            q = _rms_norm(q, layer["attn_q_norm.weight"], shape.norm_eps)
            k = _rms_norm(k, layer["attn_k_norm.weight"], shape.norm_eps)
        q, k = (_rope(a, cos, sin, interleaved=shape.arch == "llama") for a in (q, k))
        heads = []
        for head in range(shape.n_head):
            score = q[:, head] @ k[:, head // group].T / np.sqrt(d)
            score = np.where(masks[i], score, -np.inf)
            score -= score.max(axis=1, keepdims=True)
            p = np.exp(score)
            heads.append((p / p.sum(axis=1, keepdims=True)) @ v[:, head // group])
        x = x + np.concatenate(heads, axis=1) @ layer["attn_output.weight"].T
        h = _rms_norm(x, layer["ffn_norm.weight"], shape.norm_eps)
        x = x + (_moe(h, layer, shape) if "ffn_gate_inp.weight" in layer else _mlp(h, layer))
    return _rms_norm(x, w["output_norm.weight"], shape.norm_eps) @ w["output.weight"].T


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """Rotate pairs (2j, 2j+1) as Meta's Llama does, or (j, j + d/2) as NeoX does. x: (n, heads, d)."""
    d = x.shape[-1]
    first, second = (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
    out = np.empty_like(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _mlp(h: np.ndarray, layer: Mapping[str, np.ndarray]) -> np.ndarray:
    gate, up = h @ layer["ffn_gate.weight"].T, h @ layer["ffn_up.weight"].T
    return (_silu(gate) * up) @ layer["ffn_down.weight"].T


def _moe(h: np.ndarray, layer: Mapping[str, np.ndarray], shape: TinyShape) -> np.ndarray:
    logit = h @ layer["ffn_gate_inp.weight"].T
    chosen = np.argsort(-logit, axis=1)[:, : shape.n_expert_used]
    gate = np.exp(np.take_along_axis(logit, chosen, axis=1))
    gate /= gate.sum(axis=1, keepdims=True)
    out = np.zeros_like(h)
    for expert in range(shape.n_expert):
        rows, slot = np.nonzero(chosen == expert)
        part = {f"ffn_{m}.weight": layer[f"ffn_{m}_exps.weight"][expert] for m in ("gate", "up", "down")}
        out[rows] += gate[rows, slot][:, None] * _mlp(h[rows], part)
    return out
