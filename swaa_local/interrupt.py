"""Ctrl-C while llama.cpp computes: the computation stops early, and Python hears of it only after the bookkeeping.

Knows signals and llama.cpp's abort callback; nothing of tokens.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from llama_cpp import llama_cpp as _c


class Shield:
    """Context manager around `llama_decode` and what must follow it undisturbed.

    A SIGINT inside the block reaches the program's handler when the block is left. If that is Python's own, which
    raises KeyboardInterrupt, a running `llama_decode` also returns 2 ("aborted") between two nodes of its graph, where
    the backend supports that (CPU does). In a thread other than the main one, and where Python does not handle SIGINT,
    the block runs as if there were no shield.

    abortable: allow the abort. Costs a Python call a graph node: for prefill, not for one token.
    """

    def __init__(self, ctx: Any, *, abortable: bool) -> None:
        self._ctx = ctx
        self._abortable = abortable
        self._previous: Any = None
        self._received: tuple[int, FrameType | None] | None = None
        self._callback: Any = None

    def __enter__(self) -> Shield:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            return self
        self._previous = signal.signal(signal.SIGINT, self._receive)
        if self._abortable and handler is signal.default_int_handler:
            self._callback = _c.ggml_abort_callback(lambda _data: self._received is not None)
            _c.llama_set_abort_callback(self._ctx, self._callback, None)
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = (signum, frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is None:
            return
        if self._callback is not None:
            _c.llama_set_abort_callback(self._ctx, _c.ggml_abort_callback(), None)
        signal.signal(signal.SIGINT, self._previous)
        if self._received is not None:
            self._previous(*self._received)
