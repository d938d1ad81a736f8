"""Catches what llama.cpp logs as errors, so that an exception can carry the engine's own reason.

Knows llama.cpp's log interface and the shape of its lines; nothing of models or schedules.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from llama_cpp import llama_cpp as _c

_ERROR, _CONTINUED = 4, 5  # ggml_log_level of ggml.h

# Lines that say that something failed, without why: "llama_model_load_from_file_impl: failed to load model".
_ECHOES = re.compile(r"^(failed to load model|failed to initialize the context: |error loading model( \w+)?: )+")


class EngineLog:
    """The last error lines of one `captured()` block."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=20)

    def add(self, text: str, *, continued: bool) -> None:
        if continued and self._lines:
            self._lines[-1] += text
        else:
            self._lines.append(text)

    @property
    def reason(self) -> str | None:
        """What went wrong in llama.cpp's words, without its function names; None if it said nothing.

        The first line that explains wins: llama.cpp logs the cause first and then each caller's consequence.
        """
        lines = [re.sub(r"^\w+: ", "", line.strip()) for line in self._lines]
        told = [text for line in lines if (text := _ECHOES.sub("", line).strip())]
        return told[0] if told else (lines[-1] if lines else None)


@contextmanager
def captured(verbose: bool = False) -> Iterator[EngineLog]:
    """Collect error lines while the block runs; if `verbose`, all lines also go where they went before."""
    log = EngineLog()
    previous, user_data = _c.llama_log_callback(), ctypes.c_void_p()
    _c.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
    level_of_line = 0

    def receive(level: int, text: bytes, data: int | None) -> None:
        nonlocal level_of_line
        continued = level == _CONTINUED
        if not continued:
            level_of_line = level
        if level_of_line == _ERROR:
            log.add(text.decode("utf-8", errors="replace"), continued=continued)
        if verbose and previous:
            previous(level, text, user_data)

    callback = _c.llama_log_callback(receive)
    _c.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield log
    finally:
        _c.llama_log_set(previous, user_data)
