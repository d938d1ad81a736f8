"""Tiny random HF checkpoints, for the comparison with transformers and for `convert`.

`write_checkpoint` makes a directory as a hub download leaves it: config.json, safetensors, a SentencePiece
`tokenizer.model`. Weights are scaled like those of `tiny.tiny_weights`, so that masks matter. Needs PyTorch and
transformers; knows nothing of `swaa_local`.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers
import torch
import transformers

from tests.support.tiny import HEAD_DIM
from tests.support.tiny_hf_own import (
    BPE_KINDS,
    BYTE_FALLBACK_KINDS,
    CONFIG_CLASSES,
    OWN_KINDS,
    adjusted,
    missing_tensors,
    published_settings,
)

N_LAYER = 4
SIZES = {
    "hidden_size": 4 * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": HEAD_DIM}),
    "qwen3, wide heads": ("Qwen3", {"head_dim": 2 * HEAD_DIM, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
    "llama, no GQA": ("Llama", {"num_key_value_heads": 4}),
    "llama, llama3 RoPE": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "qwen2, YaRN": ("Qwen2", {"rope_parameters": _YARN_ROPE}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": HEAD_DIM,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": HEAD_DIM}),
    "olmo2": ("Olmo2", {}),
    "glm4": ("Glm4", {"head_dim": HEAD_DIM, "attention_bias": True}),
    "granite": ("Granite", {"embedding_multiplier": 0.8, "attention_multiplier": 0.2, "residual_multiplier": 0.9}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {}),
}
"""Name -> transformers' class prefix and what its config has beside the common sizes."""


# Upstream's converter takes no SentencePiece vocabulary for these.
_BPE_KINDS = ("qwen3-moe", "olmo2", "glm4", *BPE_KINDS)

_WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "quietly", "forge", "boxes")


def _text() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(_WORDS, 12)) for _ in range(200)]


def write_sentencepiece(directory: Path) -> int:
    """tokenizer.model with byte fallback; its number of tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_text()),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def write_bpe(directory: Path) -> int:
    """tokenizer.json of a byte-level BPE, which upstream's converter knows only by name; its number of tokens."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|user|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(_text(), vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_byte_fallback(directory: Path) -> int:
    """tokenizer.json of a BPE that falls back to bytes; its number of tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    parts = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer.decoder = tokenizers.decoders.Sequence(parts)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def checkpoints(root: Path, kinds: Iterable[str]) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and GGUF of each kind.

    Their names are numbers: a model that is called phi3 is given Phi-3's special tokens by the engine, which this one
    has not.
    """
    made = {kind: (write_checkpoint(root / str(i), kind), root / f"{i}.gguf") for i, kind in enumerate(kinds)}
    convert_all(dict(made.values()))
    return made


def write_checkpoint(directory: Path, kind: str, *, seed: int = 0) -> Path:
    """One of KINDS or OWN_KINDS, float32."""
    directory.mkdir(parents=True)
    kinds_of_vocabulary = {write_bpe: _BPE_KINDS, write_byte_fallback: BYTE_FALLBACK_KINDS}
    write_vocabulary = next((f for f, kinds in kinds_of_vocabulary.items() if kind in kinds), write_sentencepiece)
    n_vocab = write_vocabulary(directory)
    prefix, special = (KINDS | OWN_KINDS)[kind]
    sizes = {**SIZES, "vocab_size": n_vocab, **special}
    if "hidden_size_per_layer_input" in special:
        sizes["vocab_size_per_layer_input"] = n_vocab
    config = getattr(transformers, CONFIG_CLASSES.get(prefix, f"{prefix}Config"))(**sizes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = random_weight(rng, name, tuple(parameter.shape))
            if prefix in ("Olmo2", "Glm4") and "post_" in name:  # norms of what a layer adds: its share of the residual
                weight *= 0.3
            if kind in OWN_KINDS:
                weight = adjusted(prefix, name, weight)
            parameter.copy_(torch.from_numpy(weight))
    model.save_pretrained(directory)
    weights = directory / "model.safetensors"
    present = safetensors.numpy.load_file(weights)
    settings = directory / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | published_settings(prefix, special)))
    if missing := missing_tensors(prefix, special, present):
        safetensors.numpy.save_file({**present, **missing}, weights, metadata={"format": "pt"})
    return directory


_GAINS = {
    r"o_proj": 0.6,
    r"down_proj": 0.3,
    r"mlp\.gate\.weight": 24.0,  # a decided router, so that rounding rarely flips an expert
}


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if "norm" in name:
        return (1 + 0.1 * noise).astype(np.float32)
    if name.endswith("bias"):
        return (0.2 * noise).astype(np.float32)
    if "embed_tokens" in name:
        return noise.astype(np.float32)
    if "experts" in name and len(shape) == 3:  # alike, so that a flip costs little
        noise = noise[:1] + 0.06 * noise
    gain = next((g for pattern, g in _GAINS.items() if re.search(pattern, name)), 1.0)
    return (gain * noise / np.sqrt(shape[-1])).astype(np.float32)


def converter_folder() -> Path:
    """Where upstream's converters are."""
    return Path(llama_cpp.__file__).parent / "convert"


def convert_all(checkpoints: Mapping[Path, Path]) -> None:
    """Checkpoint directory -> GGUF with float32 weights, by upstream's own converter, amended as `convert` does, in one
    process."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf
from conversion.base import TextModel
from swaa_local.convert.children.amend import amend_converter
amend_converter()
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"  # home-made ones are known by no hash
for source, target in list(zip(sys.argv[2::2], sys.argv[3::2])):
    sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", "f32"]
    convert_hf_to_gguf.main()
"""
    paths = [str(path) for pair in checkpoints.items() for path in pair]
    done = subprocess.run([sys.executable, "-c", code, str(converter_folder()), *paths], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"upstream's converter failed:\n{done.stderr[-4000:]}")
