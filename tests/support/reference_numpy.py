"""A transformer in numpy, float64, over the weights of `tiny.tiny_weights`: the oracle of the engine tests.

Written from the definitions of the architectures, without llama.cpp and without PyTorch, so these tests run wherever
the engine does. `NumpyModel` holds one sequence; keys are kept without RoPE and rotated where they are read, so that
removing and shifting positions is plain array work. `forward` is the whole of a sequence in one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np

from tests.support.masks import Sched, full_schedule, visible
from tests.support.tiny import TinyShape, tiny_weights


class NumpyModel:
    """A model and the keys and values of one sequence.

    `shape` is by default a tiny model's of as many layers as the schedule has. `rope_scale` multiplies positions, as
    llama.cpp's `rope_freq_scale` does.
    """

    def __init__(
        self,
        schedule: Sched | None = None,
        *,
        shape: TinyShape | None = None,
        seed: int = 0,
        weights: Mapping[str, np.ndarray] | None = None,
        rope_base: float | None = None,
        rope_scale: float = 1.0,
    ) -> None:
        self.shape = shape or (TinyShape(n_layer=len(schedule.layer_modes)) if schedule else TinyShape())
        self.schedule = schedule or full_schedule(self.shape.n_layer)
        self.weights = {k: v.astype(np.float64) for k, v in (weights or tiny_weights(self.shape, seed)).items()}
        d = self.shape.head_dim
        self.inv_freq = rope_scale * (rope_base or self.shape.rope_base) ** (-np.arange(0, d, 2) / d)
        self.positions = np.empty(0, int)
        empty = np.empty((0, self.shape.n_head_kv, d))
        self.keys, self.values = [empty] * self.shape.n_layer, [empty] * self.shape.n_layer

    def feed(self, tokens: Sequence[int], *, decode: bool | Sequence[bool] | np.ndarray = False) -> np.ndarray:
        """Append tokens, each in its phase; logits (n, n_vocab)."""
        pos = np.arange(self.next_position, self.next_position + len(tokens))
        phase = np.broadcast_to(np.asarray(decode, bool), pos.shape)
        self.positions = np.concatenate([self.positions, pos])
        x = self.weights["token_embd.weight"][list(tokens)]
        for i in range(self.shape.n_layer):
            layer = {k.removeprefix(f"blk.{i}."): v for k, v in self.weights.items() if k.startswith(f"blk.{i}.")}
            x = x + self._attention(_rms_norm(x, layer["attn_norm.weight"], self.shape.norm_eps), layer, i, pos, phase)
            h = _rms_norm(x, layer["ffn_norm.weight"], self.shape.norm_eps)
            x = x + (_moe(h, layer, self.shape) if "ffn_gate_inp.weight" in layer else _mlp(h, layer))
        return _rms_norm(x, self.weights["output_norm.weight"], self.shape.norm_eps) @ self.weights["output.weight"].T

    @property
    def next_position(self) -> int:
        return int(self.positions[-1]) + 1 if len(self.positions) else 0

    def copy(self) -> NumpyModel:
        """The same weights, the same past, futures apart."""
        other = copy.copy(self)
        other.keys, other.values = list(self.keys), list(self.values)
        return other

    def remove(self, p0: int, p1: int) -> None:
        """Forget positions p0 <= p < p1."""
        held = (self.positions < p0) | (self.positions >= p1)
        self.positions = self.positions[held]
        self.keys = [k[held] for k in self.keys]
        self.values = [v[held] for v in self.values]

    def shift(self, p0: int, delta: int) -> None:
        """Add delta to positions p >= p0."""
        self.positions = np.where(self.positions >= p0, self.positions + delta, self.positions)

    def _attention(
        self, h: np.ndarray, layer: Mapping[str, np.ndarray], i: int, pos: np.ndarray, phase: np.ndarray
    ) -> np.ndarray:
        s, d = self.shape, self.shape.head_dim
        q, k, v = (h @ layer[f"attn_{name}.weight"].T + layer.get(f"attn_{name}.bias", 0) for name in "qkv")
        q, k, v = (a.reshape(len(pos), -1, d) for a in (q, k, v))
        if "attn_q_norm.weight" in layer:
            q = _rms_norm(q, layer["attn_q_norm.weight"], s.norm_eps)
            k = _rms_norm(k, layer["attn_k_norm.weight"], s.norm_eps)
        self.keys[i] = np.concatenate([self.keys[i], k])
        self.values[i] = np.concatenate([self.values[i], v])
        q, k, v = self._rope(q, pos), self._rope(self.keys[i], self.positions), self.values[i]
        mask = visible(self.schedule, i, pos, self.positions, phase)
        heads = []
        for head in range(s.n_head):
            kv_head = head // (s.n_head // s.n_head_kv)
            score = np.where(mask, q[:, head] @ k[:, kv_head].T / np.sqrt(d), -np.inf)
            p = np.exp(score - score.max(axis=1, keepdims=True))
            heads.append((p / p.sum(axis=1, keepdims=True)) @ v[:, kv_head])
        return np.concatenate(heads, axis=1) @ layer["attn_output.weight"].T

    def _rope(self, x: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """Rotate pairs (2j, 2j+1) as Meta's Llama does, or (j, j + d/2) as NeoX does. x: (n, heads, d)."""
        angle = pos[:, None, None] * self.inv_freq
        cos, sin, d = np.cos(angle), np.sin(angle), x.shape[-1]
        interleaved = self.shape.arch == "llama"
        first, second = (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(0, d // 2), slice(d // 2, d))
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


def forward(
    tokens: Sequence[int],
    schedule: Sched | None = None,
    prompt_end: int | None = None,
    *,
    shape: TinyShape | None = None,
    seed: int = 0,
    weights: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Logits (n, n_vocab) of a sequence whose tokens from `prompt_end` on are decoded (None: all are prefilled)."""
    decode = np.arange(len(tokens)) >= (len(tokens) if prompt_end is None else prompt_end)
    return NumpyModel(schedule, shape=shape, seed=seed, weights=weights).feed(tokens, decode=decode)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


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
