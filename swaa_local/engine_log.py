"""Catches what llama.cpp logs as errors, so that an exception can carry the engine's own reason.

Knows llama.cpp's log interface and the shape of its lines; nothing of models or schedules.
"""

from __future__ import annotations

import ctypes
import re
import threading
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


class _Capture:
    """One `captured()` block: its log, and whether all lines also go on to where they went before."""

    def __init__(self, verbose: bool) -> None:
        self.log = EngineLog()
        self.verbose = verbose
        self._level = 0

    def receive(self, level: int, text: str) -> None:
        continued = level == _CONTINUED
        if not continued:
            self._level = level
        if self._level == _ERROR:
            self.log.add(text, continued=continued)


class _Threads(threading.local):
    def __init__(self) -> None:
        self.captures: list[_Capture] = []


_threads = _Threads()
_lock = threading.Lock()
_n_blocks = 0
_previous, _previous_data = _c.llama_log_callback(), ctypes.c_void_p()


# llama.cpp has one log for all threads: this callback lives as long as the program, and each block gets the lines of
# its own thread. A callback for each block would be called when it is gone, by another thread's.
@_c.llama_log_callback
def _receive(level: int, text: bytes, _data: int | None) -> None:
    capture = _threads.captures[-1] if _threads.captures else None
    if capture:
        capture.receive(level, text.decode("utf-8", errors="replace"))
    if _previous and (capture is None or capture.verbose):
        _previous(level, text, _previous_data)


@contextmanager
def captured(verbose: bool = False) -> Iterator[EngineLog]:
    """Collect this thread's error lines while the block runs; if `verbose`, all lines also go where they went before."""
    global _n_blocks
    capture = _Capture(verbose)
    with _lock:
        if _n_blocks == 0:
            _c.llama_log_get(ctypes.byref(_previous), ctypes.byref(_previous_data))
            _c.llama_log_set(_receive, ctypes.c_void_p(0))
        _n_blocks += 1
    _threads.captures.append(capture)
    try:
        yield capture.log
    finally:
        _threads.captures.remove(capture)
        with _lock:
            _n_blocks -= 1
            if _n_blocks == 0:
                _c.llama_log_set(_previous, _previous_data)
