"""The schedule in a GGUF's metadata, the facts of the model it belongs to, and why a model cannot have one.

Reads headers only. It refuses what metadata can tell; the engine has the last word on an architecture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from swaa_local.errors import GGUFError
from swaa_local.model_file.check import bad_value, check_values, describe_value
from swaa_local.model_file.header import GGUFFile
from swaa_local.model_file.layer_kinds import layer_kinds
from swaa_local.model_file.recurrent_state import state_bytes
from swaa_local.model_file.split import KEY_COUNT, open_gguf
from swaa_local.model_file.unsupported import unsupported_reason
from swaa_local.schedule.model_layers import LayerKind, ModelLayers
from swaa_local.text.printable import printable
from swaa_local.text.units import format_count


@dataclass(frozen=True)
class ModelInfo:
    """What a GGUF's header says of its model. Counts in tokens, elements or bytes as named."""

    architecture: str
    name: str | None
    n_layer: int
    """Layers that run: without those for multi-token prediction."""
    n_ctx_train: int | None
    n_embd: int | None
    n_head: tuple[int, ...]
    """Query heads of each layer."""
    n_head_kv: tuple[int, ...]
    """Key and value heads of each layer."""
    head_dim_k: int
    head_dim_v: int
    head_dim_k_own: int
    """Where a layer has the model's own window."""
    head_dim_v_own: int
    n_params: int
    """Elements of all tensors."""
    file_bytes: int
    """Bytes of the file, or of all files that the model is split into."""
    file_type: str
    """What the weights are stored as, by llama.cpp's names (`Q4_K_M`), or `unknown`."""
    has_chat_template: bool
    n_split: int
    """Files the model is split into; 1 if it is whole."""
    layers: ModelLayers
    """Which can slide; where no schedule can apply, it does not say."""
    state_bytes: tuple[int, ...]
    """Of each layer's recurrent state, for one sequence; 0 where there is none."""
    unsupported: str | None
    """Why no schedule can apply, as far as metadata tell; names the architecture."""

    @property
    def n_embd_k(self) -> tuple[int, ...]:
        """Elements of one token's K in each layer's cache; 0 where there is none."""
        return self._n_embd(self.head_dim_k, self.head_dim_k_own)

    @property
    def n_embd_v(self) -> tuple[int, ...]:
        """Elements of one token's V in each layer's cache; 0 where there is none."""
        return self._n_embd(self.head_dim_v, self.head_dim_v_own)

    def _n_embd(self, head_dim: int, head_dim_own: int) -> tuple[int, ...]:
        dims = {LayerKind.SLIDES: head_dim, LayerKind.OWN_WINDOW: head_dim_own}
        return tuple(n * dims.get(kind, 0) for n, kind in zip(self.n_head_kv, self.layers.kinds, strict=True))


def read_model_info(path: str | os.PathLike[str]) -> ModelInfo:
    """The model's facts; `GGUFError` if the file is not a model (an adapter, a vocabulary, a projector)."""
    with open_gguf(path) as file:
        return model_info_of(file)


def model_info_of(file: GGUFFile) -> ModelInfo:
    """`read_model_info` for an open file."""
    architecture = _text(file, "general.architecture")
    if architecture is None:
        raise GGUFError(f"{file.path}: key general.architecture is missing, so this is not a model")
    kind = _text(file, "general.type") or "model"
    if kind != "model" or architecture == "clip":
        raise GGUFError(
            f"{file.path}: is of type {kind if kind != 'model' else architecture!r} and not a language model; "
            "name the GGUF of the model itself"
        )
    check_values(file)

    def number(name: str) -> int | None:
        return _number(file, f"{architecture}.{name}")

    n_layer_all = number("block_count")
    if n_layer_all is None:
        raise GGUFError(
            f"{file.path}: key {printable(architecture)}.block_count is missing, so this is not a complete model"
        )
    n_layer = n_layer_all - (number("nextn_predict_layers") or 0)
    n_embd = number("embedding_length")
    n_head = _per_layer(file, f"{architecture}.attention.head_count", n_layer) or (0,) * n_layer
    head_dim = (n_embd or 0) // max(1, n_head[0])
    head_dim_k, head_dim_v = number("attention.key_length"), number("attention.value_length")
    head_dim_k = head_dim if head_dim_k is None else head_dim_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    head_dim_k_own, head_dim_v_own = number("attention.key_length_swa"), number("attention.value_length_swa")
    unsupported = unsupported_reason(architecture, file.keys, file.get)
    layers = ModelLayers.of(n_layer) if unsupported else layer_kinds(architecture, n_layer, file.get)
    return ModelInfo(
        architecture=architecture,
        name=_text(file, "general.name"),
        n_layer=n_layer,
        n_ctx_train=number("context_length"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=_per_layer(file, f"{architecture}.attention.head_count_kv", n_layer) or n_head,
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        head_dim_k_own=head_dim_k if head_dim_k_own is None else head_dim_k_own,
        head_dim_v_own=head_dim_v if head_dim_v_own is None else head_dim_v_own,
        n_params=sum(tensor.n_elements for tensor in file.tensors),
        file_bytes=file.size,
        file_type=file_type_name(file.get("general.file_type")),
        has_chat_template="tokenizer.chat_template" in file.keys,
        n_split=max(1, _number(file, KEY_COUNT) or 1),
        layers=layers,
        state_bytes=state_bytes(architecture, layers, file.get),
        unsupported=unsupported,
    )


def _number(file: GGUFFile, key: str) -> int | None:
    value = file.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise bad_value(file, key, "a whole number")
    return value


def _text(file: GGUFFile, key: str) -> str | None:
    value = file.get(key)
    if value is not None and not isinstance(value, str):
        raise bad_value(file, key, "a text")
    return value


def _per_layer(file: GGUFFile, key: str, n_layer: int) -> tuple[int, ...] | None:
    """A key that holds one number for all layers or one for each."""
    value = file.get(key)
    if value is None:
        return None
    if isinstance(value, int):
        return (value,) * n_layer
    if not isinstance(value, list) or len(value) < n_layer or not all(isinstance(item, int) for item in value):
        raise GGUFError(
            f"{file.path}: {key} is {describe_value(file, file.keys[key])}, expected a number or one for each of "
            f"{n_layer} layers"
        )
    return tuple(value[:n_layer])


def describe_model(architecture: str, n_params: int, file_type: str) -> str:
    """One line, from the model's own figures: llama.cpp's description guesses a size from the shape."""
    return f"{architecture}, {format_count(n_params)} parameters, {file_type}"


def file_type_name(number: int | str | None) -> str:
    """llama.cpp's name for a `general.file_type`, such as Q4_K_M, or `unknown`."""
    if number is None:
        return "unknown"
    from gguf import LlamaFileType

    try:
        return LlamaFileType(int(number)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (ValueError, TypeError):
        return f"unknown ({number})"
