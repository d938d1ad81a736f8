"""Random LoRA adapters for tiny models, written with gguf-py alone, and the weights that they amount to.

Knows nothing of `swaa_local`: the keys that `swaa-local tune` writes are written here by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def write_adapter(
    path: Path,
    weights: Mapping[str, np.ndarray],
    *,
    targets: Sequence[str] = ATTENTION,
    layers: Sequence[int] = range(4),
    rank: int = 4,
    alpha: float = 8.0,
    gain: float = 1.0,
    seed: int = 5,
    arch: str = "qwen3",
    schedule: Any = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter of the given rank for these tensors of `weights`. schedule: anything with `window`, `sinks` and
    `layer_modes`, as `swaa.*` keys; texts: further keys."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if schedule is not None:
        writer.add_uint32("swaa.version", 1)
        writer.add_uint32("swaa.window", schedule.window)
        writer.add_uint32("swaa.sinks", schedule.sinks)
        writer.add_array("swaa.layer_modes", [int(mode) for mode in schedule.layer_modes])
    for key, value in (texts or {}).items():
        writer.add_string(key, value)
    for name, (a, b) in pairs(weights, targets, layers, rank, gain, seed).items():
        writer.add_tensor(name + ".lora_a", a)
        writer.add_tensor(name + ".lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs(
    weights: Mapping[str, np.ndarray], targets: Sequence[str], layers: Sequence[int], rank: int, gain: float, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (rank, columns) and B (rows, rank) of each tensor, such that B A is about as large as a weight for gain 1."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer in layers:
        for target in targets:
            name = f"blk.{layer}.{target}.weight"
            rows, columns = weights[name].shape
            a = (gain * rng.standard_normal((rank, columns)) / np.sqrt(columns)).astype(np.float32)
            made[name] = a, (rng.standard_normal((rows, rank)) / np.sqrt(rank)).astype(np.float32)
    return made


def merged(
    weights: Mapping[str, np.ndarray],
    *,
    scale: float = 1.0,
    targets: Sequence[str] = ATTENTION,
    layers: Sequence[int] = range(4),
    rank: int = 4,
    alpha: float = 8.0,
    gain: float = 1.0,
    seed: int = 5,
) -> dict[str, np.ndarray]:
    """`weights` with the adapter of the same arguments added, `scale` times."""
    out = dict(weights)
    for name, (a, b) in pairs(weights, targets, layers, rank, gain, seed).items():
        out[name] = (weights[name] + scale * alpha / rank * b @ a).astype(np.float32)
    return out
