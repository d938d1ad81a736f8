"""The bundled model's tokenizer: byte-level BPE over Qwen2's pre-tokenization, and a fast encoder for the data workers.

llama.cpp knows this pre-tokenization by the name `qwen2`; every digit is a token of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PRE_TOKENIZER = "qwen2"
VOCAB_SIZE = 2048
ENDOFTEXT, IM_START, IM_END, THINK, END_THINK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"
SPECIALS = (ENDOFTEXT, IM_START, IM_END, THINK, END_THINK)

# Qwen2's and Qwen3's own expression, by which llama.cpp splits too.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens; the special ones have the last ids. The texts decide all of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for name in SPECIALS:
        # The marks of a thought are not special: programs have to see them.
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=name not in (THINK, END_THINK))])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, not {vocab_size}; train on more of them")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write what transformers and llama.cpp's converter read."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": ENDOFTEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


class Encoder:
    """The tokenizer, many times faster on texts that repeat their words.

    A text is cut where no pre-token can straddle (before a space, around a digit, behind line breaks) and the pieces
    are remembered, so the result is the tokenizer's own.
    """

    _PIECE = re.compile(r"[0-9]| ?[^ \n0-9]+\n*|\n+| +(?= )| ")
    _LIMIT = 200_000

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.special: dict[str, int] = {name: tokenizer.token_to_id(name) or 0 for name in SPECIALS}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        known = self._known
        tokens: list[int] = []
        for piece in self._PIECE.findall(text):
            ids = known.get(piece)
            if ids is None:
                if len(known) >= self._LIMIT:
                    known.clear()
                ids = known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
            tokens += ids
        return tokens

    def count(self, text: str) -> int:
        return len(self.encode(text))
