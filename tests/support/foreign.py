"""Tiny models of architectures that take no schedule, complete enough that llama.cpp loads them without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.tiny import TinyShape, tiny_weights

_SHAPE = TinyShape()
_E, _FF = _SHAPE.n_embd, _SHAPE.n_ff
_QKV = _SHAPE.n_head * _SHAPE.head_dim


def _random(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) / 10).astype(np.float32)


def _llama4() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    weights = {k: v for k, v in tiny_weights(_SHAPE).items() if ".attn_q_norm" not in k and ".attn_k_norm" not in k}
    experts = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": _FF}
    return weights, {f"llama4.{k}": v for k, v in {**experts, "interleave_moe_layer_step": 0}.items()}


def _mamba() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    inner, state, rank, conv = 2 * _E, 16, 8, 4
    weights = {"token_embd.weight": _random(_SHAPE.n_vocab, _E), "output_norm.weight": _random(_E)}
    for i in range(_SHAPE.n_layer):
        p = f"blk.{i}."
        weights[p + "attn_norm.weight"] = _random(_E)
        weights[p + "ssm_in.weight"] = _random(2 * inner, _E)
        weights[p + "ssm_conv1d.weight"] = _random(inner, conv)
        weights[p + "ssm_conv1d.bias"] = _random(inner)
        weights[p + "ssm_x.weight"] = _random(rank + 2 * state, inner)
        weights[p + "ssm_dt.weight"] = _random(inner, rank)
        weights[p + "ssm_dt.bias"] = _random(inner)
        weights[p + "ssm_a"] = -np.abs(_random(inner, state))
        weights[p + "ssm_d"] = _random(inner)
        weights[p + "ssm_out.weight"] = _random(_E, inner)
    sizes = {"conv_kernel": conv, "inner_size": inner, "state_size": state, "time_step_rank": rank}
    return weights, {f"mamba.ssm.{k}": v for k, v in sizes.items()}


def _bert() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    weights = {
        "token_embd.weight": _random(_SHAPE.n_vocab, _E),
        "position_embd.weight": _random(_SHAPE.n_ctx_train, _E),
        "token_embd_norm.weight": _random(_E),
        "token_embd_norm.bias": _random(_E),
    }
    for i in range(_SHAPE.n_layer):
        p, kv = f"blk.{i}.", _SHAPE.n_head_kv * _SHAPE.head_dim
        rows = {"attn_q": _E, "attn_k": kv, "attn_v": kv, "attn_output": _E, "ffn_up": _FF}
        weights |= {f"{p}{name}.weight": _random(n, _E) for name, n in rows.items()}
        weights[p + "ffn_down.weight"] = _random(_E, _FF)
        for name in ("attn_output_norm", "layer_output_norm"):
            weights[f"{p}{name}.weight"], weights[f"{p}{name}.bias"] = _random(_E), _random(_E)
    return weights, {
        "bert.attention.layer_norm_epsilon": 1e-6,
        "bert.attention.causal": False,
        "tokenizer.ggml.token_type_count": 2,
    }


def _mpt() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    weights = {"token_embd.weight": _random(_SHAPE.n_vocab, _E), "output_norm.weight": _random(_E)}
    for i in range(_SHAPE.n_layer):
        p = f"blk.{i}."
        weights[p + "attn_norm.weight"], weights[p + "ffn_norm.weight"] = _random(_E), _random(_E)
        weights[p + "attn_qkv.weight"] = _random(_QKV + 2 * _SHAPE.n_head_kv * _SHAPE.head_dim, _E)
        weights[p + "attn_output.weight"] = _random(_E, _QKV)
        weights[p + "ffn_up.weight"], weights[p + "ffn_down.weight"] = _random(_FF, _E), _random(_E, _FF)
    return weights, {"mpt.attention.layer_norm_epsilon": 1e-6, "mpt.attention.max_alibi_bias": 8.0}


def _deepseek2() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    heads, rope, nope, value, q_rank, kv_rank = _SHAPE.n_head, _SHAPE.head_dim, 16, 32, 24, 16
    weights = {k: v for k, v in tiny_weights(_SHAPE).items() if ".attn_" not in k or ".attn_norm" in k}
    for i in range(_SHAPE.n_layer):
        p = f"blk.{i}."
        weights[p + "attn_q_a.weight"], weights[p + "attn_q_a_norm.weight"] = _random(q_rank, _E), _random(q_rank)
        weights[p + "attn_q_b.weight"] = _random(heads * (nope + rope), q_rank)
        weights[p + "attn_kv_a_mqa.weight"] = _random(kv_rank + rope, _E)
        weights[p + "attn_kv_a_norm.weight"] = _random(kv_rank)
        weights[p + "attn_k_b.weight"] = _random(heads, kv_rank, nope)
        weights[p + "attn_v_b.weight"] = _random(heads, value, kv_rank)
        weights[p + "attn_output.weight"] = _random(_E, heads * value)
    return weights, {
        "deepseek2.leading_dense_block_count": _SHAPE.n_layer,
        "deepseek2.attention.q_lora_rank": q_rank,
        "deepseek2.attention.kv_lora_rank": kv_rank,
        "deepseek2.attention.key_length_mla": nope + rope,
        "deepseek2.attention.value_length_mla": value,
        "deepseek2.expert_feed_forward_length": _FF,
        "deepseek2.expert_shared_count": 0,
    }


FOREIGN: dict[str, Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]] = {
    "llama4": _llama4,  # attends in chunks
    "mamba": _mamba,  # recurrent
    "bert": _bert,  # encoder
    "mpt": _mpt,  # ALiBi
    "deepseek2": _deepseek2,  # MLA
}
"""Architecture -> its tensors and further keys."""
