"""The bundled model: Qwen3's architecture, small, in plain PyTorch; saves a checkpoint that transformers loads.

Takes an attention mask per layer, so that a schedule can be evaluated where it was trained; knows no schedules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from needle.tokenizer import VOCAB_SIZE


@dataclass(frozen=True)
class NeedleConfig:
    """Sizes, by the names of transformers' Qwen3Config."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 512
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02


class Attention(nn.Module):
    """Grouped-query attention with norms on queries and keys."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.config = config
        d, width = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, d, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        c = self.config
        n_q, n_kv = c.num_attention_heads, c.num_key_value_heads
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        heads = F.linear(x, weight).unflatten(-1, (n_q + 2 * n_kv, c.head_dim))
        scale = torch.cat([self.q_norm.weight.expand(n_q, -1), self.k_norm.weight.expand(n_kv, -1)])
        qk = F.rms_norm(heads[:, :, : n_q + n_kv], (c.head_dim,), None, c.rms_norm_eps) * scale.to(x.dtype)
        qk = _rotate(qk, *rope).transpose(1, 2)
        q, k = qk[:, :n_q], qk[:, n_q:]
        v = heads[:, :, n_q + n_kv :].transpose(1, 2)
        if mask is not None:  # not every kernel takes both a mask and grouped heads
            k, v = (t.repeat_interleave(n_q // n_kv, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE. x: [batch, length, heads, head_dim]; cos, sin: [length, 1, head_dim / 2], float32."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(_norm(self.input_layernorm, x), rope, mask)
        return x + self.mlp(_norm(self.post_attention_layernorm, x))


class Needle(nn.Module):
    """The model; parameters are named as in a transformers checkpoint, but for the prefix "model."."""

    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        half = config.head_dim // 2
        frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin().float()[:, None], persistent=False)

    def initialize(self, seed: int) -> None:
        """Draw all weights anew, on the CPU: the same for every device."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator) * self.config.initializer_range
                parameter.data.copy_(drawn)
            else:
                parameter.data.fill_(1.0)

    def forward(
        self, tokens: Tensor, masks: Sequence[Tensor | None] | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Hidden states after the last norm, [batch, length, hidden_size], in `dtype`; see `logits`.

        masks: per layer, True where a key is visible, [batch or 1, 1, length, length]; None is causal attention.
        """
        length = tokens.shape[1]
        rope = (self.cos[:length], self.sin[:length])
        x = self.embed_tokens(tokens).to(dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, masks[index] if masks is not None else None)
        return _norm(self.norm, x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)


def _norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def save_checkpoint(model: Needle, directory: Path, *, eos: int, pad: int) -> None:
    """Write config.json, generation_config.json and model.safetensors (float16), each complete or not at all."""
    from safetensors.torch import save_file

    c = model.config
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.initializer_range,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": c.num_hidden_layers,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float16",
    }
    # top_k 1: the model answers, it does not invent; converters carry it over to where chat programs look.
    generation = {"eos_token_id": eos, "pad_token_id": pad, "do_sample": True, "top_k": 1, "temperature": 1.0}
    _write(directory / "config.json", json.dumps(config, indent=1) + "\n")
    _write(directory / "generation_config.json", json.dumps(generation, indent=1) + "\n")
    tensors = {f"model.{name}": tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
    part = directory / "model.safetensors.part"
    save_file(tensors, str(part), metadata={"format": "pt"})
    part.replace(directory / "model.safetensors")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def load_checkpoint(directory: Path) -> Needle:
    """Read what `save_checkpoint` wrote, in float32."""
    from safetensors.torch import load_file

    stored = json.loads((directory / "config.json").read_text())
    model = Needle(NeedleConfig(**{name: stored[name] for name in NeedleConfig.__dataclass_fields__}))
    tensors = load_file(str(directory / "model.safetensors"))
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return model
