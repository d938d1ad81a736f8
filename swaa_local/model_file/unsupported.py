"""Why a model cannot have a schedule, as far as its metadata tell; the engine has the last word on an architecture.

Knows llama.cpp's architectures; nothing of files: it is asked before one is written, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swaa_local.model_file.layer_kinds import SHARES_KV, layer_kinds, own_window

# Their windows are no sliding ones, or more stands in their way than the window.
_OTHER_ATTENTION = {
    "llama4": "attends in chunks of 8192 tokens, which do not slide",
    "deepseek4": "attends to compressed keys",
    "dots3note": "has multi-head latent attention (MLA)",
    "dflash": "drafts for another model",
    "gemma4-assistant": "drafts for another model",
}


_RECURRENT_KEYS = ("ssm.", "wkv.", "kda.", "shortconv.", "attention.recurrent_layers")


# Whose layers that are not recurrent attend plainly.
_HYBRID = frozenset(
    (
        "falcon-h1",
        "granitehybrid",
        "jamba",
        "lfm2",
        "lfm2moe",
        "minimax-01",
        "nemotron_h",
        "nemotron_h_moe",
        "plamo2",
        "qwen35",
        "qwen35moe",
        "qwen3next",
    )
)


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


def unsupported_reason(architecture: str, keys: Mapping[str, Any], get: Callable[[str], Any]) -> str | None:
    """Why no schedule can apply to this architecture, or None if metadata show no reason.

    A schedule needs layers with plain causal attention over a KV cache. `keys` holds the file's keys, `get` gives a
    value or None; both may also come from metadata that are not written yet.
    """

    def value(name: str) -> Any:
        return get(f"{architecture}.{name}")

    def because(what: str) -> str:
        return f"architecture {architecture!r} {what}"

    prefix = architecture + "."
    recurrent = any(key.startswith(prefix) and key[len(prefix) :].startswith(_RECURRENT_KEYS) for key in keys)
    if recurrent and architecture not in _HYBRID:
        return because("has recurrent layers, and no others that are known to attend plainly")
    if recurrent and value("attention.sliding_window"):
        return because("has recurrent layers beside a sliding window of its own")
    if architecture in _OTHER_ATTENTION and (architecture != "llama4" or own_window(architecture, value)):
        return because(_OTHER_ATTENTION[architecture])
    if value("attention.key_length_mla") or value("attention.kv_lora_rank"):
        return because("has multi-head latent attention (MLA)")
    if architecture in _NOT_CAUSAL or value("attention.causal") is False:
        return because("does not use causal attention")
    if architecture in _ALIBI or value("attention.max_alibi_bias"):
        return because("uses ALiBi instead of RoPE")
    if value("attention.shared_kv_layers") and architecture not in SHARES_KV:
        return because("shares KV caches between layers")
    n_layer = value("block_count")
    if isinstance(n_layer, int) and n_layer > 0:
        layers = layer_kinds(architecture, n_layer - (value("nextn_predict_layers") or 0), get)
        if not layers.sliding:
            return because(f"has no layer that can slide: {layers.kinds_in_words}")
    return None
