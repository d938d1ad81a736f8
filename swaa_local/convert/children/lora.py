"""A LoRA adapter merged into a checkpoint's weights while upstream's converter runs, before they get their type.

Adapters in GGUF name tensors as llama.cpp does, in its order of rows, so they fit what the converter's `modify_tensors`
yields. Runs in the converter's child process, where its modules can be imported.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

_BASE_TENSOR = "output_norm.weight"


def merge_while_converting(path: str, scale: float, emit: Callable[..., None]) -> None:
    """Make the converter add `scale` times what the adapter says to the tensors that it names.

    Events: `note` if it was tuned on another model; `error`, and the process ends, for a tensor that the model lacks or
    that has another shape.
    """
    from conversion.base import LazyTorchTensor, ModelBase

    from swaa_local.model_file.adapter import read_adapter

    info = read_adapter(_as_path(path))
    deltas = _Deltas(path, info.alpha, scale)
    original = ModelBase.prepare_tensors

    @functools.wraps(original)
    def prepare_tensors(self: Any) -> None:
        modify = self.modify_tensors

        def modify_and_merge(data: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
            for new_name, tensor in modify(data, name, bid):
                if new_name == _BASE_TENSOR and info.base_sha256 not in (None, _sha256(LazyTorchTensor, tensor)):
                    emit(note=f"the LoRA adapter {info.path.name} was tuned on another model: {info.base}")
                if new_name not in deltas:
                    yield new_name, tensor
                    continue
                delta = deltas.take(new_name)
                if tuple(delta.shape) != tuple(tensor.shape):
                    emit(
                        error=f"{path} changes {new_name} with the shape {tuple(delta.shape)}, and the model's is "
                        f"{tuple(tensor.shape)}: it was made for another model"
                    )
                    raise SystemExit(1)
                yield new_name, tensor.float() + _as_lazy(LazyTorchTensor, tensor, delta)

        self.modify_tensors = modify_and_merge
        original(self)
        if missing := deltas.left:
            emit(error=f"{path} changes {missing[0]}, which this model does not have: it was made for another model")
            raise SystemExit(1)

    ModelBase.prepare_tensors = prepare_tensors


def _as_path(path: str) -> Any:
    from pathlib import Path

    return Path(path)


def _as_lazy(lazy: Any, tensor: Any, delta: Any) -> Any:
    return lazy.from_eager(delta) if isinstance(tensor, lazy) else delta


def _sha256(lazy: Any, tensor: Any) -> str:
    """Of the values in float32, as `base_sha256` of the GGUF will be."""
    return hashlib.sha256(lazy.to_eager(tensor).float().contiguous().numpy().tobytes()).hexdigest()


class _Deltas:
    """What an adapter adds to each tensor, shape (rows, columns) as in PyTorch, in float32."""

    def __init__(self, path: str, alpha: float, scale: float) -> None:
        import gguf

        self._alpha, self._scale = alpha, scale
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._names = [name.removesuffix(".lora_a") for name in self._tensors if name.endswith(".lora_a")]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def left(self) -> list[str]:
        """Names that nobody took."""
        return self._names

    def take(self, name: str) -> Any:
        self._names.remove(name)
        a, b = self._read(f"{name}.lora_a"), self._read(f"{name}.lora_b")
        # As llama_adapter_lora_weight::get_scale.
        factor = self._scale * self._alpha / b.shape[-1] if self._alpha else self._scale
        return factor * (a @ b.T if name == "token_embd.weight" else b @ a)

    def _read(self, name: str) -> Any:
        import gguf
        import torch

        tensor = self._tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.astype("float32", copy=True))
