"""Which layers of a model can slide, by its metadata: windows of the model's own, recurrent layers, shared caches.

Follows `load_arch_hparams` of llama.cpp (src/models/*.cpp), where the defaults are that a file may leave out. Knows
keys; nothing of files, and not whether an architecture is supported at all (`unsupported`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swaa_local.schedule.model_layers import LayerKind, ModelLayers


@dataclass(frozen=True)
class _OwnWindow:
    """Where an architecture's windows are, if the file does not say.

    period: one layer in so many is full, the last of them or, with full_first, the first. None: the file lists them.
    default: tokens, if the file does not say. fixed: tokens, whatever the file says, if it says any.
    """

    period: int | None
    full_first: bool = False
    default: int = 0
    fixed: int = 0


_OWN_WINDOWS = {
    "afmoe": _OwnWindow(4),
    "cohere2": _OwnWindow(4),
    "cohere2moe": _OwnWindow(4, full_first=True),
    "exaone-moe": _OwnWindow(4, default=128),
    "gemma2": _OwnWindow(2, default=4096),
    "gemma3": _OwnWindow(6),
    "gemma3n": _OwnWindow(5),
    "gemma4": _OwnWindow(None),
    "gpt-oss": _OwnWindow(2),
    "granite_swa": _OwnWindow(None),
    "laguna": _OwnWindow(4, full_first=True),
    "llama4": _OwnWindow(4, default=8192, fixed=8192),
    "maple": _OwnWindow(None),
    "mellum": _OwnWindow(4),
    "mimo2": _OwnWindow(None),
    "muse-glimmer": _OwnWindow(4),
    "olmo2": _OwnWindow(4),
    "plamo3": _OwnWindow(8),
    "smallthinker": _OwnWindow(4, full_first=True, fixed=4096),
    "spark2_5": _OwnWindow(None),
    "step35": _OwnWindow(None),
}
_EXAONE4 = _OwnWindow(4, default=4096)  # of 64 layers alone

_RECURRENT = frozenset(("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"))
# One layer in so many attends, the last of them, if the file does not say.
_ATTENTION_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
_RECURRENT_WITHOUT_KV_HEADS = frozenset(
    ("bailingmoe3", "glm5-next", "granitehybrid", "jamba", "kimi-k3", "kimi-linear", "lfm2", "lfm2moe", "plamo2")
)
# Where a layer without KV heads is recurrent, or has a feed-forward network alone.
_NEMOTRON_H = frozenset(("nemotron_h", "nemotron_h_moe"))

SHARES_KV = frozenset(("gemma3n", "gemma4"))
"""Whose last layers read the KV caches of earlier ones."""
_GEMMA3N_KV_LAYERS = 20


def layer_kinds(architecture: str, n_layer: int, get: Callable[[str], Any]) -> ModelLayers:
    """The kinds of a model's layers. get: the value of a key, or None; also of metadata that are not written yet."""

    def value(name: str) -> Any:
        return get(f"{architecture}.{name}")

    window = own_window(architecture, value)
    has_window = _has_window(architecture, n_layer, value) if window else [False] * n_layer
    recurrent = _recurrent(architecture, n_layer, value)

    def kind(layer: int) -> LayerKind:
        if recurrent[layer] is not LayerKind.SLIDES:
            return recurrent[layer]
        return LayerKind.OWN_WINDOW if has_window[layer] else LayerKind.SLIDES

    return ModelLayers(
        tuple(kind(layer) for layer in range(n_layer)),
        window if any(has_window) else 0,
        kv_of(architecture, has_window, value),
    )


def own_window(architecture: str, value: Callable[[str], Any]) -> int:
    """The window that llama.cpp gives the model by itself, in tokens; 0 if none. value: of a key without its prefix."""
    known = _own(architecture, value)
    said = value("attention.sliding_window")
    # Other architectures ignore the key: files of Phi-3 carry one, and upstream runs Phi-3 with full attention.
    if known is None:
        return 0
    if said is None:
        return known.default
    window = _whole(max(said, default=0) if isinstance(said, list) else said)
    return (known.fixed or window) if window else 0


def _own(architecture: str, value: Callable[[str], Any]) -> _OwnWindow | None:
    if architecture == "exaone4":
        return _EXAONE4 if value("block_count") == 64 else None
    return _OWN_WINDOWS.get(architecture)


def _has_window(architecture: str, n_layer: int, value: Callable[[str], Any]) -> list[bool]:
    known = _own(architecture, value)
    pattern = value("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return _flags(pattern, n_layer)
    if known is None:
        return [False] * n_layer
    period = pattern if isinstance(pattern, int) else known.period
    if period is None:
        return [False] * n_layer
    if period == 0:
        return [True] * n_layer
    full = 0 if known.full_first else period - 1
    return [layer % period != full for layer in range(n_layer)]


def _recurrent(architecture: str, n_layer: int, value: Callable[[str], Any]) -> list[LayerKind]:
    """`SLIDES` where the layer is none of these. Layers that attend beside a state (Falcon-H1) slide."""
    kinds = [LayerKind.SLIDES] * n_layer
    if architecture in _RECURRENT:
        return [LayerKind.RECURRENT] * n_layer
    if architecture in _ATTENTION_INTERVAL:
        said = value("attention.recurrent_layers")
        said_interval = _whole(value("full_attention_interval"))
        interval = _ATTENTION_INTERVAL[architecture] if said_interval is None else max(1, said_interval)
        if isinstance(said, list):
            flags = _flags(said, n_layer)
        elif said is not None:
            flags = [bool(said)] * n_layer
        else:
            flags = [(layer + 1) % interval != 0 for layer in range(n_layer)]
        return [LayerKind.RECURRENT if flag else kind for flag, kind in zip(flags, kinds, strict=True)]
    n_head_kv = _each(value("attention.head_count_kv"), n_layer)
    if architecture in _RECURRENT_WITHOUT_KV_HEADS:
        return [LayerKind.RECURRENT if n == 0 else kind for n, kind in zip(n_head_kv, kinds, strict=True)]
    if architecture in _NEMOTRON_H:
        n_ff = _each(value("feed_forward_length"), n_layer)
        without = [LayerKind.NO_ATTENTION if n else LayerKind.RECURRENT for n in n_ff]
        return [other if n == 0 else kind for n, other, kind in zip(n_head_kv, without, kinds, strict=True)]
    return kinds


def kv_of(architecture: str, has_window: list[bool], value: Callable[[str], Any]) -> tuple[int, ...]:
    """The layer whose KV cache each layer reads; empty where each has its own. value: of a key without its prefix."""
    n_layer = len(has_window)
    if architecture not in SHARES_KV:
        return ()
    n_shared = _whole(value("attention.shared_kv_layers")) or 0
    n_own = _GEMMA3N_KV_LAYERS if architecture == "gemma3n" else n_layer - n_shared
    if not 2 <= n_own < n_layer:
        return ()
    return tuple(layer if layer < n_own else n_own - (2 if has_window[layer] else 1) for layer in range(n_layer))


def _whole(value: Any) -> int | None:
    """None for what is no whole number, which llama.cpp refuses by itself."""
    return value if isinstance(value, int) else None


def _flags(values: list[Any], n_layer: int) -> list[bool]:
    """One for each layer; what the list does not reach is false, as in llama.cpp."""
    return [bool(item) for item in values[:n_layer]] + [False] * (n_layer - len(values))


def _each(value: Any, n_layer: int) -> list[int | None]:
    """One number for all layers or one for each; None where the file does not say."""
    if isinstance(value, list):
        return [*value[:n_layer], *[None] * (n_layer - len(value))]
    return [value] * n_layer
