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
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.text.printable import printable

_ERROR, _CONTINUED = 4, 5  # ggml_log_level of ggml.h

# Lines that say that something failed, without why: "llama_model_load_from_file_impl: failed to load model".
_ECHOES = re.compile(r"^(failed to load model|failed to initialize the context: |error loading model( \w+)?: )+")


# While llama.cpp loads a file, its assertions are errors: "qwen3.cpp:57: GGML_ASSERT(a == b) failed".
_ASSERTED = re.compile(r"(?P<where>[\w.-]+\.\w+:\d+): (?:GGML_ASSERT\((?P<condition>.*)\) failed|(?P<reason>.*))")


def _plainly(match: re.Match[str]) -> str:
    what = match["reason"] or f"{match['condition']} does not hold"
    return f"its values do not fit each other or this engine: {what} ({match['where']})"


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
        told = [_ASSERTED.sub(_plainly, text, count=1) for line in lines if (text := _ECHOES.sub("", line).strip())]
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


class _Tap:
    """Takes llama.cpp's log while any thread captures, and gives each thread's lines to its innermost block.

    llama.cpp has one log for all threads. A callback for each block would be called when it is gone: by another thread
    that found it there and put it back.
    """

    def __init__(self) -> None:
        self._threads = _Threads()
        self._open: set[_Capture] = set()
        self._callback = _c.llama_log_callback(self._receive)
        self._previous, self._user_data = _c.llama_log_callback(), ctypes.c_void_p()

    def begin(self, capture: _Capture) -> None:
        # what Ctrl-C has left here between two lines of `end`
        self._threads.captures[:] = [each for each in self._threads.captures if each in self._open]
        self._open.add(capture)
        self._threads.captures.append(capture)
        self._settle()

    def end(self, capture: _Capture) -> None:
        self._open.discard(capture)
        if capture in self._threads.captures:
            self._threads.captures.remove(capture)
        self._settle()

    def _settle(self) -> None:
        """Take the log while there is a block, and give it back after the last. No lock is held: Ctrl-C may come where
        it is left, and Python does not leave it then."""
        while True:
            is_open = bool(self._open)
            found, data = _c.llama_log_callback(), ctypes.c_void_p()
            _c.llama_log_get(ctypes.byref(found), ctypes.byref(data))
            is_taken = _address(found) == _address(self._callback)
            if is_open and not is_taken:
                self._previous, self._user_data = found, data
                _c.llama_log_set(self._callback, ctypes.c_void_p(0))
            elif is_taken and not is_open:
                _c.llama_log_set(self._previous, self._user_data)
            if is_open == bool(self._open):  # else another thread began or ended one meanwhile
                return

    def _receive(self, level: int, text: bytes, _data: int | None) -> None:
        capture = self._threads.captures[-1] if self._threads.captures else None
        if capture:
            capture.receive(level, text.decode("utf-8", errors="replace"))
        if self._previous and (capture is None or capture.verbose):
            self._previous(level, _fit(text), self._user_data)


def _fit(text: bytes) -> bytes:
    """A piece of the log as it may go on: it holds values of the file, and ends a line at its own end alone."""
    body = text.rstrip(b"\n")
    return printable(body.decode("utf-8", errors="replace")).encode() + text[len(body) :]


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


_tap = _Tap()


@contextmanager
def captured(verbose: bool = False) -> Iterator[EngineLog]:
    """Collect this thread's error lines while the block runs; if `verbose`, all lines still go where they went."""
    capture = _Capture(verbose)
    try:
        _tap.begin(capture)
        yield capture.log
    finally:
        _tap.end(capture)
