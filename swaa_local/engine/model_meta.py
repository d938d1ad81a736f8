"""What a loaded model's metadata say; lists are not held."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from llama_cpp import llama_cpp as _c


def is_recurrent(model: Any) -> bool:
    """Whether some layers are recurrent."""
    return bool(_c.llama_model_is_recurrent(model) or _c.llama_model_is_hybrid(model))


def text(model: Any, key: str) -> str | None:
    """As llama.cpp writes it; None where the file does not say."""
    buffer = ctypes.create_string_buffer(256)
    read: Callable[..., int] = _c.llama_model_meta_val_str
    return buffer.value.decode() if read(model, key.encode(), buffer, len(buffer)) >= 0 else None


def number(model: Any, key: str) -> int | None:
    """A whole number that is not negative; None where it is none or the file does not say."""
    said = text(model, key)
    return int(said) if said is not None and said.isdecimal() else None
