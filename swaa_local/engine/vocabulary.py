"""A loaded model's vocabulary, as llama.cpp gives it: text to tokens, tokens to text, and which tokens are special."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.errors import SWAAError

_TOO_MANY = -(1 << 31)
_SPECIAL = _c.LLAMA_TOKEN_ATTR_CONTROL | _c.LLAMA_TOKEN_ATTR_UNKNOWN


def tokenize(vocab: Any, text: bytes, add_bos: bool, special: bool) -> list[int]:
    """`llama_tokenize`. Upstream's own makes room for the context that the file names, whatever it says.

    Raises `SWAAError` where the tokens cannot be counted.
    """
    size = len(text) + 2  # a token is a byte at least, but for those that mark both ends
    for _ in range(2):
        tokens = (_c.llama_token * size)()
        n = _c.llama_tokenize(vocab, text, len(text), tokens, size, add_bos, special)
        if n >= 0:
            return tokens[:n]
        if n == _TOO_MANY:
            break
        size = -n
    raise SWAAError(f"the vocabulary cannot take a text of {len(text)} bytes apart")


def token_bytes(vocab: Any, token: int) -> bytes:
    """The text that a token stands for; empty for a control token."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = _c.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def special_tokens(vocab: Any) -> dict[str, int]:
    """The texts that the tokenizer may take for one special token, with the attributes of that token
    (llama-vocab.cpp, tokenizer_st_partition)."""
    found: dict[str, int] = {}
    for token in range(_c.llama_vocab_n_tokens(vocab)):
        attributes = _c.llama_vocab_get_attr(vocab, token)
        if attributes & _SPECIAL and (text := _c.llama_vocab_get_text(vocab, token)):
            with suppress(UnicodeDecodeError):  # no text has it then
                found[text.decode()] = attributes
    return found
