"""Metadata values that llama.cpp does not survive, or that no model has: found here, they are an error with a name.

llama.cpp asserts on some, divides by others, and reserves memory by others, in the loader, in the graph or in the first
evaluation. What it refuses by itself with a reason is left to it. The limits are those of src/llama-hparams.h,
llama_model_base::load_hparams and the operators of ggml. Knows keys and values; nothing of schedules.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from swaa_local.errors import GGUFError
from swaa_local.model_file.header import GGUFFile, KeyValue, ValueType
from swaa_local.model_file.layer_kinds import SHARES_KV, layer_kinds
from swaa_local.model_file.split import open_gguf
from swaa_local.schedule.config import MAX_TOKENS
from swaa_local.text.printable import printable

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_MAX_WIDTH = 1 << 24

# Whole numbers, or lists of them for each layer: least and most. Names follow the architecture's.
_NUMBERS: dict[str, tuple[int, int]] = {
    "block_count": (1, MAX_LAYERS),
    "nextn_predict_layers": (0, MAX_LAYERS - 1),
    "context_length": (1, MAX_TOKENS),
    "embedding_length": (1, _MAX_WIDTH),
    "feed_forward_length": (0, _MAX_WIDTH),
    "attention.head_count": (0, _MAX_WIDTH),
    "attention.head_count_kv": (0, _MAX_WIDTH),
    "attention.key_length": (0, _MAX_WIDTH),
    "attention.value_length": (0, _MAX_WIDTH),
    "attention.key_length_swa": (0, _MAX_WIDTH),
    "attention.value_length_swa": (0, _MAX_WIDTH),
    "attention.shared_kv_layers": (0, MAX_LAYERS),
    "attention.sliding_window": (0, (1 << 32) - 1),
    "full_attention_interval": (1, MAX_LAYERS),
    "rope.dimension_count": (0, _MAX_WIDTH),
    "rope.dimension_count_swa": (0, _MAX_WIDTH),
    "rope.dimension_sections": (0, _MAX_WIDTH),
    "expert_count": (0, MAX_EXPERTS),
    "expert_used_count": (0, MAX_EXPERTS),
    "expert_group_count": (0, MAX_EXPERTS),
    "expert_group_used_count": (0, MAX_EXPERTS),
    "pooling_type": (0, 4),
}
# Finite numbers that are at least 0, or more than 0.
_EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.group_norm_epsilon")
_ROPE_FACTORS = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.alpha")
_ROPE_BASES = ("rope.freq_base", "rope.freq_base_swa")
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
# ggml types that no matrix product of the CPU takes, by their numbers; and the one that vectors have.
_NO_WEIGHTS = {9: "q8_1", 15: "q8_k", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64"}
_F32 = 0


def check_gguf(path: str | os.PathLike[str]) -> None:
    """`check_values` for a file. Raises `GGUFError`, also where the file is no whole GGUF."""
    with open_gguf(path) as file:
        check_values(file)


def check_values(file: GGUFFile) -> None:
    """Raise `GGUFError` that names key and value for one that llama.cpp would not survive; no key has to be there."""
    _check_texts(file)
    _check_tensors(file)
    architecture = file.get("general.architecture")
    if isinstance(architecture, str):
        _Values(file, architecture).check()


def bad_value(file: GGUFFile, key: str, expected: str) -> GGUFError:
    """The error for a key whose value is none that can be."""
    return GGUFError(
        f"{file.path}: {printable(key)} is {describe_value(file, file.keys[key])}, expected {expected}; "
        "the file is damaged or was made wrongly: download or convert it again"
    )


def describe_value(file: GGUFFile, entry: KeyValue) -> str:
    """A value and its type in a few words."""
    if entry.type is ValueType.ARRAY and entry.item_type is not None:
        return f"an array of {entry.n_items} {entry.item_type.name.lower()}"
    value = file.get(entry.key)
    if isinstance(value, str) and len(value) > 80:
        value = value[:77] + "..."
    return f"{value!r} ({entry.type.name.lower()})"


def _check_texts(file: GGUFFile) -> None:
    """Texts that are no UTF-8 would stop whoever reads them later; reading them raises."""
    for key, entry in file.keys.items():
        if entry.type is ValueType.STRING:
            file.get(key)


def _check_tensors(file: GGUFFile) -> None:
    """llama.cpp's loader takes a tensor of any type, its operators do not."""
    for tensor in file.tensors:
        if not tensor.name.endswith((".weight", ".bias")):
            continue
        is_vector = len(tensor.dims) < 2 or tensor.name.endswith(("_norm.weight", ".bias"))
        if tensor.type in _NO_WEIGHTS or (is_vector and tensor.type != _F32):
            told = _NO_WEIGHTS.get(tensor.type) or _type_name(tensor.type)
            expected = "f32, as all vectors" if is_vector else "a type of weights"
            raise GGUFError(
                f"{file.path}: tensor {tensor.name!r} has type {told}, expected {expected}; the file is damaged or was "
                "made wrongly: download or convert it again"
            )


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name.lower()
    except ValueError:
        return str(number)


class _Values:
    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._file = file
        self._architecture = architecture
        self._prefix = architecture + "."

    def check(self) -> None:
        for name, (least, most) in _NUMBERS.items():
            self._each(name, int, f"{least} to {most}", range(least, most + 1).__contains__)
        for name in (*_EPSILONS, *_ROPE_FACTORS):
            self._each(name, float, "a number that is at least 0", lambda x: math.isfinite(x) and x >= 0)
        for name in _ROPE_BASES:
            self._each(name, float, "a number above 0", lambda x: math.isfinite(x) and x > 0)
        for key, entry in self._file.keys.items():
            is_float = (entry.item_type or entry.type) in (ValueType.F32, ValueType.F64)
            if key.startswith(self._prefix) and is_float:
                self._each(key[len(self._prefix) :], float, "a number", lambda x: not math.isnan(x))
        scaling = self._value("rope.scaling.type")
        if scaling is not None and (not isinstance(scaling, str) or scaling not in _ROPE_SCALINGS):
            raise self._bad("rope.scaling.type", f"one of {', '.join(_ROPE_SCALINGS)}")
        if self._first("nextn_predict_layers") >= self._first("block_count", 1):
            raise self._bad("nextn_predict_layers", f"fewer than the model's {self._first('block_count')} layers")
        self._check_heads()
        self._check_shared_caches()
        self._check_rope()
        self._check_experts()

    def _check_heads(self) -> None:
        """Several query heads share one of keys and values."""
        heads, heads_kv = self._list("attention.head_count"), self._list("attention.head_count_kv")
        n = max(len(heads), len(heads_kv))
        # One number is that of every layer.
        pairs = zip(heads * (n if len(heads) == 1 else 1), heads_kv * (n if len(heads_kv) == 1 else 1), strict=False)
        for n_head, n_head_kv in pairs:
            if n_head and n_head_kv and n_head % n_head_kv:
                raise self._bad("attention.head_count_kv", f"a divisor of the {n_head} heads")

    def _check_shared_caches(self) -> None:
        """The last layers read the caches of two earlier ones: one with a window, and one without."""
        n_layer = self._first("block_count")
        if self._architecture not in SHARES_KV or not n_layer:
            return
        if self._first("attention.shared_kv_layers") > max(0, n_layer - 2):
            raise self._bad(
                "attention.shared_kv_layers", f"at most {max(0, n_layer - 2)} of the model's {n_layer} layers"
            )
        layers = layer_kinds(self._architecture, n_layer, self._file.get)
        if any(layers.kinds[layer] is not layers.kinds[source] for layer, source in enumerate(layers.kv_of)):
            key = "attention.sliding_window_pattern"
            if self._value(key) is None:
                key = (
                    "block_count" if self._value("attention.shared_kv_layers") is None else "attention.shared_kv_layers"
                )
            raise self._bad(key, "a layer with a window and one without it before those that share their caches")

    def _check_rope(self) -> None:
        """RoPE turns pairs of a head's elements."""
        n_rope = self._first("rope.dimension_count")
        if n_rope % 2:
            raise self._bad("rope.dimension_count", "an even number")
        if n_head := self._first("attention.head_count"):
            width = self._first("attention.key_length", self._first("embedding_length") // n_head)
            if width and n_rope > width:
                raise self._bad("rope.dimension_count", f"at most the width of a head, {width}")

    def _check_experts(self) -> None:
        n = self._first("expert_count")
        if n <= 1 and self._prefix.startswith("hunyuan"):
            return  # one expert is none there
        used = max(self._list("expert_used_count"), default=0)
        groups, groups_used = self._first("expert_group_count"), self._first("expert_group_used_count")
        if used > n:
            raise self._bad("expert_used_count", f"at most the model's {n} experts")
        if n and not used:
            raise self._bad("expert_count", "0, because the model uses none (expert_used_count)")
        if groups and groups >= n:
            raise self._bad("expert_group_count", f"fewer than the model's {n} experts")
        if groups > 1 and n % groups:
            raise self._bad("expert_group_count", f"a divisor of the model's {n} experts")
        if groups > 1 and not 0 < groups_used < groups:
            raise self._bad(
                "expert_group_used_count" if groups_used else "expert_group_count",
                f"more than 0 and fewer than all {groups} groups to be used (expert_group_used_count)",
            )

    def _each(self, name: str, kind: type, expected: str, is_right: Callable[[Any], bool]) -> None:
        """Raise if a key has another type, or if it or one of its items is not right."""
        for value in self._list(name):
            # Booleans are whole numbers to Python, and whole numbers no floats to llama.cpp.
            if type(value) is not kind or not is_right(value):
                raise self._bad(name, expected)

    def _value(self, name: str) -> Any:
        return self._file.get(self._prefix + name)

    def _list(self, name: str) -> list[Any]:
        value = self._value(name)
        return value if isinstance(value, list) else [] if value is None else [value]

    def _first(self, name: str, default: int = 0) -> int:
        """The number, or the first layer's. Its type is checked before."""
        return next(iter(self._list(name)), default)

    def _bad(self, name: str, expected: str) -> GGUFError:
        return bad_value(self._file, self._prefix + name, expected)
