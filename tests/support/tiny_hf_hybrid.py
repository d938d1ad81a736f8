"""Tiny hybrid models, as `tiny_hf` makes others: layers with attention among recurrent ones, or beside a recurrence."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.tiny import HEAD_DIM
from tests.support.tiny_hf import SIZES, random_weight, write_bpe, write_sentencepiece


@dataclass(frozen=True)
class Hybrid:
    """A model with attention in some layers.

    config_class, model_class: of transformers. attending: the layers with attention, of n_layer. on_hub: what published
    checkpoints have in config.json where transformers would write something else; None where they have nothing.
    """

    config_class: str
    model_class: str
    config: dict[str, Any]
    attending: tuple[int, ...]
    n_layer: int
    on_hub: dict[str, Any] = field(default_factory=dict)


_ATTENDING = (1, 3, 4, 6)


def _types(recurrent: str, attention: str = "full_attention") -> list[str]:
    return [attention if i in _ATTENDING else recurrent for i in range(7)]


_GATED_DELTA = {
    "head_dim": 64,
    "layer_types": _types("linear_attention"),
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_M_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
}
_PREDICTION = {"mtp_num_hidden_layers": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2}
_NEMOTRON_H = {
    "head_dim": HEAD_DIM,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "use_mamba_kernels": False,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-6,
}
HYBRIDS: dict[str, Hybrid] = {
    "qwen3.5": Hybrid("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _GATED_DELTA | _M_ROPE, _ATTENDING, 7, _PREDICTION),
    "qwen3.5-moe": Hybrid(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        _GATED_DELTA | _M_ROPE | _EXPERTS | {"shared_expert_intermediate_size": 96},
        _ATTENDING,
        7,
        _PREDICTION,
    ),
    "qwen3-next": Hybrid(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _GATED_DELTA | _EXPERTS | {"shared_expert_intermediate_size": 96},
        _ATTENDING,
        7,
    ),
    "jamba": Hybrid(
        "JambaConfig",
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "expert_layer_period": 4,
            "expert_layer_offset": 2,
            "use_mamba_kernels": False,
        },
        (1, 3, 5, 7),
        8,
    ),
    "falcon-h1": Hybrid(
        "FalconH1Config",
        "FalconH1ForCausalLM",
        _MAMBA2 | {"mamba_d_ssm": 256, "mamba_d_head": 32, "head_dim": HEAD_DIM},
        (0, 1, 2, 3),
        4,
    ),
    "lfm2": Hybrid(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": _types("conv"), "conv_L_cache": 3, "block_auto_adjust_ff_dim": False, "norm_eps": 1e-6},
        _ATTENDING,
        7,
        {"layer_types": _types("conv")},
    ),
    "lfm2-moe": Hybrid(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        _EXPERTS
        | {"layer_types": _types("conv"), "conv_L_cache": 3, "num_dense_layers": 2, "norm_eps": 1e-6}
        | {"tie_word_embeddings": True, "num_experts_per_tok": 4},
        _ATTENDING,
        7,
        {"layer_types": _types("conv")},
    ),
    "granite-hybrid": Hybrid(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _MAMBA2
        | {"layer_types": _types("mamba", "attention"), "num_local_experts": 4, "shared_intermediate_size": 96}
        | {"embedding_multiplier": 0.8, "attention_multiplier": 0.2, "residual_multiplier": 0.9},
        _ATTENDING,
        7,
        {"layer_types": _types("mamba", "attention")},
    ),
    "bamba": Hybrid(
        "BambaConfig",
        "BambaForCausalLM",
        _MAMBA2 | {"attn_layer_indices": list(_ATTENDING)},
        _ATTENDING,
        7,
        {"attn_layer_indices": list(_ATTENDING), "attn_rotary_emb": HEAD_DIM // 2, "layer_types": None},
    ),
    "nemotron-h": Hybrid(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _NEMOTRON_H | {"hybrid_override_pattern": "M*-M*-M*-*"},
        (1, 4, 7, 9),
        10,
        {"hybrid_override_pattern": "M*-M*-M*-*", "layer_types": None, "num_hidden_layers": 10}
        | {"num_experts_per_tok": None},
    ),
    "minimax-01": Hybrid(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {
            "head_dim": HEAD_DIM,
            "layer_types": ["linear_attention" if (i + 1) % 8 else "full_attention" for i in range(32)],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **{f"{kind}_alpha_factor": 3.5 for kind in ("full_attn", "linear_attn", "mlp")},
        },
        (7, 15, 23, 31),
        32,
        {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "rotary_dim": HEAD_DIM,
            **{f"layernorm_{kind}_alpha": 3.5 for kind in ("full_attention", "linear_attention", "mlp")},
            **{f"layernorm_{kind}_beta": 1.0 for kind in ("full_attention", "linear_attention", "mlp")},
        },
    ),
    "nemotron-h-moe": Hybrid(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _NEMOTRON_H
        | {"hybrid_override_pattern": "M*E*M*E*", "n_routed_experts": 4, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 96},
        (1, 3, 5, 7),
        8,
        {"hybrid_override_pattern": "M*E*M*E*", "layer_types": None, "num_hidden_layers": 8},
    ),
}
"""Names -> hybrids, each with four layers that attend."""

_SENTENCEPIECE = ("jamba",)  # upstream's converter takes no SentencePiece vocabulary for the others


def write_hybrid(directory: Path, kind: str, *, seed: int = 0) -> Path:
    """One of HYBRIDS, float32, as published checkpoints are."""
    directory.mkdir(parents=True)
    made = HYBRIDS[kind]
    n_vocab = (write_sentencepiece if kind in _SENTENCEPIECE else write_bpe)(directory)
    n_vocab = -(-n_vocab // 64) * 64  # some converters pad it to that
    sizes = SIZES | {"num_hidden_layers": made.n_layer, "vocab_size": n_vocab}
    model = getattr(transformers, made.model_class)(getattr(transformers, made.config_class)(**sizes | made.config))
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_weight(rng, made.config_class, name, tuple(parameter.shape))))
    model.save_pretrained(directory)
    if made.config_class.startswith("Qwen3"):
        _add_prediction_layer(directory / "model.safetensors", made.attending[-1])
    if made.config_class == "MiniMaxConfig":
        _as_published(directory / "model.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in made.on_hub.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
    return directory


def _add_prediction_layer(path: Path, like: int) -> None:
    """A layer for multi-token prediction, which published checkpoints of these have, transformers leaves out, and
    upstream's converter expects; `like` one of the others."""
    weights = load_file(path)
    prefix = f"model.layers.{like}."
    layer = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    norm = weights["model.norm.weight"]
    weights |= {f"mtp.layers.0.{name}": weight.clone() for name, weight in layer.items()}
    weights |= {f"mtp.{name}.weight": norm.clone() for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    weights["mtp.fc.weight"] = torch.cat([torch.eye(len(norm))] * 2, dim=1)
    save_file(weights, path, {"format": "pt"})


def _as_published(path: Path) -> None:
    """Without what transformers computes, and with an index, which upstream's converter reads."""
    weights = {name: weight for name, weight in load_file(path).items() if not re.search(r"decay$|slope_rate$", name)}
    save_file(weights, path, {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, path.name)}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))


# Of decided routers, so that rounding rarely flips an expert, and of what a layer adds. Routers by sigmoid are never
# decided: where there is one, all experts are chosen.
_GAINS = {
    r"router": 24.0,
    r"(mixer|feed_forward)\.gate\.weight": 4.0,  # a sigmoid, which more would saturate
    r"out_proj": 0.6,
    r"\.w2\.|output_linear": 0.3,
}


def _weight(rng: np.random.Generator, config_class: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("A_log"):
        return (0.5 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith(".D"):
        return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    if "embeddings" in name:
        return rng.standard_normal(shape).astype(np.float32)
    weight = random_weight(rng, name, shape)
    if config_class.startswith("Qwen3") and "norm" in name and "linear_attn" not in name:
        return weight - 1  # these norms multiply by one more than their weight
    gain = next((g for pattern, g in _GAINS.items() if re.search(pattern, name)), 1.0)
    return weight if "norm" in name or name.endswith("bias") else np.float32(gain) * weight
