"""Ctrl-C while llama.cpp works: the work stops early where it can, and Python hears of it only after the bookkeeping.

Knows signals and llama.cpp's abort callback; nothing of tokens.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from llama_cpp import llama_cpp as _c


class DeferInterrupt:
    """Context manager around calls of llama.cpp and what must follow them undisturbed.

    A SIGINT inside the block reaches the program's handler when the block is left. Without this it would be raised in
    whichever callback llama.cpp calls next, its log for one, and be lost there. In a thread other than the main one,
    and where Python does not handle SIGINT, the block runs as if there were no shield.

    abort: a `llama_context_p` whose running `llama_decode` is to return 2 ("aborted") between two nodes of its graph,
    where the backend supports that (CPU does). It costs a Python call a node: for prefill, not for one token.
    """

    def __init__(self, abort: Any = None) -> None:
        self._ctx = abort
        self._previous: Any = None
        self._received: tuple[int, FrameType | None] | None = None
        self._callback: Any = None

    @property
    def raises(self) -> bool:
        """True if leaving the block will raise KeyboardInterrupt, so that the work may be given up."""
        return self._received is not None and self._previous is signal.default_int_handler

    def __enter__(self) -> DeferInterrupt:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            return self
        self._previous = signal.signal(signal.SIGINT, self._receive)
        if self._ctx is not None and handler is signal.default_int_handler:
            self._callback = _c.ggml_abort_callback(lambda _data: self.raises)
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
