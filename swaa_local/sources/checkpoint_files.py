"""Which files of a folder or a repository make up a checkpoint, by their names alone; it opens none."""

from __future__ import annotations

import re
from collections.abc import Iterable

WEIGHTS = (".safetensors", ".bin")


_SETTINGS = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")


_TOKENIZER = re.compile(r"tokenizer\.json|tekken\.json|vocab\..*|merges\.txt|.*\.model|.*\.tiktoken|rwkv_vocab.*\.txt")


_SHARD = re.compile(r"(?P<stem>.*-)(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\.safetensors|\.bin)")


def checkpoint_files(names: Iterable[str]) -> tuple[tuple[str, ...], str | None]:
    """(the files that upstream's converter reads, why there is no checkpoint): one of them is empty.

    names: with their paths in the repository; only those at its top count. What is hidden does not, nor does what macOS
    writes beside a file on foreign disks (`._model.safetensors`).
    """
    top = [name for name in names if "/" not in name and not name.startswith(".")]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    own = [name for name in safetensors if not name.startswith(("consolidated", "adapter_"))]
    # With an index, the converter goes by the names in it.
    weights = own if "model.safetensors.index.json" in top else [name for name in own if name.startswith("model")]
    weights = weights or [name for name in top if re.fullmatch(r"pytorch_model.*\.bin", name)]
    if problem := _why_no_checkpoint(top, weights):
        return (), problem
    return (*weights, *(name for name in top if name.endswith(_SETTINGS))), None


def _why_no_checkpoint(top: list[str], weights: list[str]) -> str | None:
    if not weights and ({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} & set(top)):
        return "it is a LoRA adapter; merge it into its base model: convert that one with --lora and the adapter's GGUF"
    if "config.json" not in top:
        ggufs = [name for name in top if name.endswith(".gguf")]
        if ggufs:
            return f"it is no checkpoint but holds GGUF files; name one of them: {', '.join(sorted(ggufs))}"
        return "it has no config.json, so it is no Hugging Face checkpoint"
    if not weights:
        others = sorted(name for name in top if name.endswith(WEIGHTS))
        if any(name.startswith("consolidated") for name in others):
            return (
                "its weights are in Mistral's own format alone (consolidated.safetensors); take the checkpoint in the "
                "format of transformers"
            )
        if others:
            return (
                f"its weights have names that upstream's converter does not read ({', '.join(others)}); it reads "
                "model*.safetensors and pytorch_model*.bin"
            )
        return "it has a config.json but no weights (model*.safetensors or pytorch_model*.bin); download them too"
    if missing := _missing_shard(weights):
        return f"{missing} is missing; download it too"
    if not any(_TOKENIZER.fullmatch(name) for name in top):
        return "it has no tokenizer (tokenizer.json, tokenizer.model or the like); download it too"
    return None


def _missing_shard(weights: list[str]) -> str | None:
    """The name of the first part that is not there, of weights in numbered parts."""
    for name in weights:
        if match := _SHARD.fullmatch(name):
            count, width = int(match["count"]), len(match["number"])
            for number in range(1, min(count, 10_000) + 1):
                part = f"{match['stem']}{number:0{width}d}-of-{match['count']}{match['suffix']}"
                if part not in weights:
                    return part
    return None
