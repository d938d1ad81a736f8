"""The schedule in a GGUF's metadata, the facts of the model it belongs to, and why a model cannot have one.

Reads headers only. It refuses what metadata can tell; the engine has the last word on an architecture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swaa_local.model_file.check import bad_value, check_values, describe_value
from swaa_local.model_file.header import GGUFError, GGUFFile, KeyValue, ValueType, encode_i32_array, encode_u32
from swaa_local.model_file.split import KEY_COUNT, open_gguf
from swaa_local.report.printable import printable
from swaa_local.report.units import format_count
from swaa_local.schedule.config import (
    KEY_LAYER_MODES,
    KEY_PREFIX,
    KEY_SINKS,
    KEY_VERSION,
    KEY_WINDOW,
    MAX_TOKENS,
    SCHEDULE_VERSION,
    LayerMode,
    Schedule,
)

# Architectures whose loader in llama.cpp (src/models/*.cpp) turns `attention.sliding_window` into a window of the
# model's own. Others ignore the key: files of Phi-3 carry one, and upstream runs Phi-3 with full attention.
# fmt: off
_READS_OWN_WINDOW = frozenset((
    "afmoe", "cohere2", "cohere2moe", "deepseek4", "dflash", "dots3note", "exaone-moe", "gemma-embedding", "gemma2",
    "gemma3", "gemma3n", "gemma4", "gemma4-assistant", "gpt-oss", "granite_swa", "laguna", "lfm2", "lfm2moe", "llama4",
    "maple", "mellum", "mimo2", "modern-bert", "muse-glimmer", "olmo2", "plamo3", "smallthinker", "spark2_5", "step35",
))
# Windows that are in upstream's code and not in the file: Gemma 2's width, Llama 4's chunks.
_DEFAULT_WINDOW = {"gemma2": 4096, "llama4": 8192}
_RECURRENT_KEYS = ("ssm.", "wkv.", "kda.", "shortconv.", "attention.recurrent_layers")
_NOT_CAUSAL = frozenset((
    "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe", "llama-embed",
    "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "t5", "t5encoder",
))
_ALIBI = frozenset(("bloom", "jais", "jina-bert-v2", "mpt", "refact"))
_M_ROPE = frozenset(("paddleocr", "qwen2vl", "qwen35", "qwen35moe", "qwen3vl", "qwen3vlmoe", "qwen4exp"))
# fmt: on


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
    n_params: int
    """Elements of all tensors."""
    file_bytes: int
    """Bytes of the file, or of all files that the model is split into."""
    file_type: str
    """What the weights are stored as, by llama.cpp's names (`Q4_K_M`), or `unknown`."""
    has_chat_template: bool
    n_split: int
    """Files the model is split into; 1 if it is whole."""
    unsupported: str | None
    """Why no schedule can apply, as far as metadata tell; names the architecture."""

    @property
    def n_embd_k(self) -> tuple[int, ...]:
        """Elements of one token's K in each layer's cache."""
        return tuple(n * self.head_dim_k for n in self.n_head_kv)

    @property
    def n_embd_v(self) -> tuple[int, ...]:
        """Elements of one token's V in each layer's cache."""
        return tuple(n * self.head_dim_v for n in self.n_head_kv)


def read_schedule(path: str | os.PathLike[str]) -> Schedule | None:
    """The schedule that a GGUF stores, or None.

    Raises `GGUFError` naming key and value for an unknown version, a missing key, a wrong type, W = 0, a mode above 2
    or a number of modes that is not the model's number of layers.
    """
    with open_gguf(path) as file:
        return schedule_of(file)


def read_model_info(path: str | os.PathLike[str]) -> ModelInfo:
    """The model's facts; `GGUFError` if the file is not a model (an adapter, a vocabulary, a projector)."""
    with open_gguf(path) as file:
        return model_info_of(file)


def has_schedule_keys(file: GGUFFile) -> bool:
    """True if any `swaa.*` key is there, well-formed or not."""
    return any(key.startswith(KEY_PREFIX) for key in file.keys)


def schedule_of(file: GGUFFile) -> Schedule | None:
    """`read_schedule` for an open file."""
    if not has_schedule_keys(file):
        return None

    def fail(what: str) -> GGUFError:
        return GGUFError(f"{file.path}: {what}; write the schedule again with swaa-local convert")

    def entry(key: str) -> KeyValue:
        if key not in file.keys:
            raise fail(f"key {key} is missing, though the file has other {KEY_PREFIX}* keys")
        return file.keys[key]

    def u32(key: str) -> int:
        found = entry(key)
        if found.type is not ValueType.U32:
            raise fail(f"{key} is {describe_value(file, found)}, expected a u32")
        return int(file.get(key))

    version = u32(KEY_VERSION)
    if version != SCHEDULE_VERSION:
        raise GGUFError(
            f"{file.path}: {KEY_VERSION} is {version}, but this program reads version {SCHEDULE_VERSION}; "
            "update swaa-local or write the schedule again with swaa-local convert"
        )
    window, sinks = u32(KEY_WINDOW), u32(KEY_SINKS)
    if not 1 <= window <= MAX_TOKENS:
        raise fail(f"{KEY_WINDOW} is {window}, expected 1 to {MAX_TOKENS}")
    if sinks > MAX_TOKENS:
        raise fail(f"{KEY_SINKS} is {sinks}, expected 0 to {MAX_TOKENS}")

    found = entry(KEY_LAYER_MODES)
    if found.type is not ValueType.ARRAY or found.item_type is not ValueType.I32:
        raise fail(f"{KEY_LAYER_MODES} is {describe_value(file, found)}, expected an array of i32")
    n_layer = model_info_of(file).n_layer
    if found.n_items != n_layer:
        raise fail(f"{KEY_LAYER_MODES} has {found.n_items} entries, but the model has {n_layer} layers")
    modes = []
    for layer, mode in enumerate(file.get(KEY_LAYER_MODES)):
        if not LayerMode.FULL <= mode <= LayerMode.ALWAYS:
            raise fail(
                f"{KEY_LAYER_MODES}[{layer}] is {mode}, expected 0 (full), 1 (window in prefill) or 2 (window always)"
            )
        modes.append(LayerMode(mode))
    return Schedule(window, sinks, tuple(modes))


def encode_schedule(schedule: Schedule) -> list[bytes]:
    """The four metadata entries, encoded."""
    return [
        encode_u32(KEY_VERSION, SCHEDULE_VERSION),
        encode_u32(KEY_WINDOW, schedule.window),
        encode_u32(KEY_SINKS, schedule.sinks),
        encode_i32_array(KEY_LAYER_MODES, [int(mode) for mode in schedule.layer_modes]),
    ]


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
    return ModelInfo(
        architecture=architecture,
        name=_text(file, "general.name"),
        n_layer=n_layer,
        n_ctx_train=number("context_length"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=_per_layer(file, f"{architecture}.attention.head_count_kv", n_layer) or n_head,
        head_dim_k=head_dim if head_dim_k is None else head_dim_k,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        n_params=sum(tensor.n_elements for tensor in file.tensors),
        file_bytes=file.size,
        file_type=file_type_name(file.get("general.file_type")),
        has_chat_template="tokenizer.chat_template" in file.keys,
        n_split=max(1, _number(file, KEY_COUNT) or 1),
        unsupported=unsupported_reason(architecture, file.keys, file.get),
    )


def unsupported_reason(architecture: str, keys: Mapping[str, Any], get: Callable[[str], Any]) -> str | None:
    """Why no schedule can apply to this architecture, or None if metadata show no reason.

    A schedule needs plain causal attention over one KV cache. `keys` holds the file's keys, `get` gives a value or
    None; both may also come from metadata that are not written yet.
    """

    def value(name: str) -> Any:
        return get(f"{architecture}.{name}")

    def because(what: str) -> str:
        return f"architecture {architecture!r} {what}"

    prefix = architecture + "."
    if any(key.startswith(prefix) and key[len(prefix) :].startswith(_RECURRENT_KEYS) for key in keys):
        return because("has recurrent layers")
    if window := _own_window(architecture, value):
        return because(f"has a sliding window of its own ({window} tokens)")
    if value("attention.key_length_mla") or value("attention.kv_lora_rank"):
        return because("has multi-head latent attention (MLA)")
    if architecture in _NOT_CAUSAL or value("attention.causal") is False:
        return because("does not use causal attention")
    if architecture in _ALIBI or value("attention.max_alibi_bias"):
        return because("uses ALiBi instead of RoPE")
    sections = value("rope.dimension_sections")
    if architecture in _M_ROPE or (isinstance(sections, list) and len(sections) > 1 and min(sections[:2]) > 0):
        return because("uses M-RoPE")
    if value("attention.shared_kv_layers"):
        return because("shares KV caches between layers")
    if nextn := value("nextn_predict_layers"):
        return because(f"has {nextn} layers for multi-token prediction")
    return None


def _own_window(architecture: str, value: Callable[[str], Any]) -> int:
    """The window that llama.cpp gives the model by itself, in tokens; 0 if none."""
    window = value("attention.sliding_window")
    if architecture == "exaone4" and value("block_count") == 64:
        return window or 4096
    if architecture not in _READS_OWN_WINDOW:
        return 0
    if window is None:
        return _DEFAULT_WINDOW.get(architecture, 0)
    return max(window, default=0) if isinstance(window, list) else int(window)


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
