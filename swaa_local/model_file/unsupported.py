"""Why a model cannot have a schedule, as far as its metadata tell; the engine has the last word on an architecture.

Knows llama.cpp's architectures; nothing of files: it is asked before one is written, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_READS_OWN_WINDOW = frozenset(
    (
        "afmoe",
        "cohere2",
        "cohere2moe",
        "deepseek4",
        "dflash",
        "dots3note",
        "exaone-moe",
        "gemma-embedding",
        "gemma2",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4-assistant",
        "gpt-oss",
        "granite_swa",
        "laguna",
        "lfm2",
        "lfm2moe",
        "llama4",
        "maple",
        "mellum",
        "mimo2",
        "modern-bert",
        "muse-glimmer",
        "olmo2",
        "plamo3",
        "smallthinker",
        "spark2_5",
        "step35",
    )
)


# Windows that are in upstream's code and not in the file: Gemma 2's width, Llama 4's chunks.
_DEFAULT_WINDOW = {"gemma2": 4096, "llama4": 8192}


_RECURRENT_KEYS = ("ssm.", "wkv.", "kda.", "shortconv.", "attention.recurrent_layers")


_NOT_CAUSAL = frozenset(
    (
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "t5",
        "t5encoder",
    )
)


_ALIBI = frozenset(("bloom", "jais", "jina-bert-v2", "mpt", "refact"))


_M_ROPE = frozenset(("paddleocr", "qwen2vl", "qwen35", "qwen35moe", "qwen3vl", "qwen3vlmoe", "qwen4exp"))


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
