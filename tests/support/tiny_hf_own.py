"""Tiny models with sliding windows of their own, as `tiny_hf` makes them: what their configurations and weights need.

Half of the windows are narrower than that of the schedules in the parity test, half are wider. Knows names of
transformers' classes and parameters alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support.tiny import HEAD_DIM

_OWN, _FULL = "sliding_attention", "full_attention"
_NARROW, _WIDE = 14, 60
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
_TIED = {"tie_word_embeddings": True}
_SIGMOID = {"scoring_func": "sigmoid"}
# Routers whose scores are close to each other: with all experts in use, rounding chooses no other one.
_ALL_EXPERTS = {"num_experts_per_tok": 4}


def _types(period: int, n_layer: int, *, full_first: bool = False) -> dict[str, Any]:
    """One layer of each period is full: the last, or the first."""
    full = 0 if full_first else period - 1
    return {
        "num_hidden_layers": n_layer,
        "layer_types": [_FULL if i % period == full else _OWN for i in range(n_layer)],
    }


def _rope(own: float, full: float, **scaling: Any) -> dict[str, Any]:
    """Rotations by kind of layer."""
    return {
        "rope_parameters": {
            _OWN: {"rope_type": "default", "rope_theta": own},
            _FULL: {"rope_type": "default", "rope_theta": full, **scaling},
        }
    }


# Gemma 3n's 95 %. llama.cpp divides a variance by n - 1 and transformers by n, which are as good as equal in its width
# of 8192; in one of 96, this makes up for it.
_SPARSITY = 0.5 * (1 + math.erf(1.6448533535 * math.sqrt(96 / 95) / math.sqrt(2)))
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,  # as llama.cpp does
    "original_max_position_embeddings": 64,
}
_GEMMA = {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, **_TIED}
# CUDA's flash attention caps logits of heads of 128 and more alone, which Gemma 2's are.
_GEMMA2 = {**_GEMMA, "head_dim": 2 * HEAD_DIM, "query_pre_attn_scalar": 2 * HEAD_DIM}
_GEMMA3 = {**_GEMMA, **_rope(100.0, 10000.0, rope_type="linear", factor=4.0)}
_GEMMA4 = {
    "head_dim": HEAD_DIM,
    "global_head_dim": 2 * HEAD_DIM,
    "hidden_size_per_layer_input": 32,
    "final_logit_softcapping": 30.0,  # llama.cpp takes this if there is none
    **_TIED,
    **_rope(100.0, 10000.0, rope_type="proportional", partial_rotary_factor=0.25),
}

OWN_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {**_GEMMA2, "sliding_window": _NARROW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        | _types(2, 8),
    ),
    "gemma3": ("Gemma3", {**_GEMMA3, "sliding_window": _NARROW} | _types(6, 24)),
    "gemma3, wide": ("Gemma3", {**_GEMMA3, "sliding_window": _WIDE} | _types(6, 24)),
    "gemma3n": (
        "Gemma3n",
        {
            "head_dim": HEAD_DIM,
            "hidden_size_per_layer_input": 256,  # llama.cpp knows it so, and the next ones
            "laurel_rank": 64,
            "num_kv_shared_layers": 4,
            "activation_sparsity_pattern": [_SPARSITY] * 10 + [0.0] * 14,
            "sliding_window": _WIDE,
            **_TIED,
            **_rope(100.0, 10000.0),
        }
        | _types(2, 24),
    ),
    "gemma4": ("Gemma4", {**_GEMMA4, "sliding_window": _NARROW} | _types(2, 8)),
    "gemma4, shared caches": (
        "Gemma4",
        {**_GEMMA4, "sliding_window": _WIDE, "num_kv_shared_layers": 4, "use_double_wide_mlp": True} | _types(2, 16),
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": HEAD_DIM,
            "num_local_experts": 4,
            **_ALL_EXPERTS,
            "sliding_window": _NARROW,
            "rope_parameters": _YARN,
        }
        | _types(2, 8),
    ),
    "cohere2": ("Cohere2", {"rotary_pct": 1.0, "logit_scale": 0.5, "sliding_window": _WIDE, **_TIED} | _types(4, 16)),
    "cohere2-moe": (
        "Cohere2Moe",
        {
            "head_dim": HEAD_DIM,
            "logit_scale": 0.5,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": _NARROW,
        }
        | _types(2, 8, full_first=True)
        | _TIED,
    ),
    "olmo3": ("Olmo3", {"sliding_window": _WIDE, **_rope(10000.0, 10000.0)} | _types(2, 8)),
    "exaone4": ("Exaone4", {"sliding_window": _NARROW} | _types(4, 64)),
    "exaone-moe": (
        "ExaoneMoe",
        {**_MOE, **_ALL_EXPERTS, **_SIGMOID, "sliding_window": _WIDE, "first_k_dense_replace": 1} | _types(2, 8),
    ),
    "afmoe": (
        "Afmoe",
        {
            "head_dim": HEAD_DIM,
            "num_dense_layers": 2,
            "num_experts": 4,
            **_ALL_EXPERTS,
            "num_shared_experts": 1,
            "moe_intermediate_size": 96,
            "mup_enabled": True,
            "route_norm": True,
            **_SIGMOID,
            "sliding_window": _NARROW,
        }
        | _types(4, 16),
    ),
    "laguna": (
        "Laguna",
        {
            **_MOE,
            **_ALL_EXPERTS,
            "head_dim": HEAD_DIM,
            "shared_expert_intermediate_size": 96,
            "sliding_window": _WIDE,
            **_rope(100.0, 10000.0),
        }
        | _types(4, 16, full_first=True),
    ),
    # llama.cpp rotates both kinds of its layers alike
    "mellum": ("Mellum", {**_MOE, "head_dim": HEAD_DIM, "sliding_window": _NARROW, **_rope(1e4, 1e4)} | _types(2, 8)),
    "mimo-v2": (
        "MiMoV2Flash",
        {
            "head_dim": HEAD_DIM,
            "v_head_dim": HEAD_DIM,
            "num_key_value_heads": 1,  # and two in layers with a window
            "n_routed_experts": 4,
            **_ALL_EXPERTS,
            "moe_intermediate_size": 96,
            "mlp_layer_types": ["dense"] + ["sparse"] * 7,
            "sliding_window": _NARROW,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in ((_OWN, 100.0), (_FULL, 10000.0))
            },
        }
        | _types(2, 8),
    ),
    "granite-swa": ("GraniteSWA", {"attention_multiplier": 0.2, "sliding_window": _WIDE} | _types(2, 8)),
}
"""Name -> transformers' class prefix and what its config has beside the common sizes."""

CONFIG_CLASSES = {"Gemma3": "Gemma3TextConfig", "Gemma3n": "Gemma3nTextConfig", "Gemma4": "Gemma4TextConfig"}
"""Where it is not the prefix and `Config`."""

ROUNDING = {kind: 5e-3 for kind, (prefix, _) in OWN_KINDS.items() if prefix.startswith("Gemma")}
"""What llama.cpp's GELU, a table of halves, takes off, in sigma."""

BPE_KINDS = (
    "gpt-oss",
    "cohere2",
    "cohere2-moe",
    "olmo3",
    "exaone4",
    "exaone-moe",
    "laguna",
    "mellum",
    "mimo-v2",
    "granite-swa",
)
BYTE_FALLBACK_KINDS = ("gemma4", "gemma4, shared caches")

# What a layer adds goes through a norm that is its share of the residual.
_POST = r"post_.*norm"
_NORMS_ADD_ONE = ("Gemma2", "Gemma3")
_SCALES_EMBEDDINGS = ("Gemma2", "Gemma3", "Gemma3n", "Gemma4", "Afmoe")
# Routers that decide, so that rounding rarely flips an expert, and do not saturate.
_ROUTERS = {"Afmoe": 3.0, "Laguna": 3.0 / 24, "ExaoneMoe": 3.0 / 24, "MiMoV2Flash": 3.0 / 24}
_UNSCALED = ("Gemma3n", "Gemma4")  # scores are not divided by the root of the head's width
_POST_NORMS = ("Gemma2", "Gemma3", "Gemma3n", "Gemma4", "Olmo3", "Exaone4", "Afmoe")


def adjusted(prefix: str, name: str, weight: np.ndarray) -> np.ndarray:
    """A random weight as `tiny_hf` makes it, for this class of models and parameter."""
    if "norm" in name:
        if prefix in _POST_NORMS and re.search(_POST, name):
            weight = 0.3 * weight
        if prefix in _UNSCALED and "q_norm" in name:
            weight = weight / np.sqrt(weight.shape[-1])
        return weight - 1 if prefix in _NORMS_ADD_ONE else weight
    if "embed_tokens" in name and prefix in _SCALES_EMBEDDINGS:
        return weight / np.sqrt(weight.shape[-1])
    if re.search(r"mlp\.(router\.|gate\.|router\.gate\.)weight", name):
        return _ROUTERS.get(prefix, 1.0) * weight
    if name.endswith("sinks"):  # of the size of other scores
        return 2 * np.sqrt(weight.shape[-1]) * weight
    if re.search(r"altup\.(prediction|correction)_coefs", name):
        return 0.1 * weight
    return weight


def published_settings(prefix: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What config.json of published checkpoints has beside what transformers writes."""
    if prefix != "MiMoV2Flash":
        return {}
    return {
        "hybrid_layer_pattern": [int(kind == _OWN) for kind in settings["layer_types"]],
        "swa_num_key_value_heads": 2 * settings["num_key_value_heads"],
        "swa_num_attention_heads": 4,
        "swa_head_dim": settings["head_dim"],
        "swa_v_head_dim": settings["v_head_dim"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-6,
        "moe_layer_freq": [0] + [1] * (len(settings["layer_types"]) - 1),
    }


def missing_tensors(prefix: str, settings: dict[str, Any], present: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What published checkpoints hold, and transformers no longer: K and V of layers that read another one's cache."""
    if prefix != "Gemma3n":
        return {}
    n_layer, n_shared = settings["num_hidden_layers"], settings["num_kv_shared_layers"]
    names = [f"self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    like = {name: present[f"model.layers.0.{name}"] for name in names}
    layers = range(n_layer - n_shared, n_layer)
    return {f"model.layers.{i}.{name}": np.zeros_like(array) for i in layers for name, array in like.items()}
