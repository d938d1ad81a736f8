"""Text to tokens with a loaded model's vocabulary, in a buffer of the text's size."""

from __future__ import annotations

from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.errors import SWAAError

_TOO_MANY = -(1 << 31)


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
