"""Who may use a `Llama` now: one thread at a time, its callbacks only to look, and nobody after `close()`.

llama.cpp's context is for one thread, and its model must outlive whoever reads it. Knows threads and when to free what
they use; nothing of tokens.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from enum import Enum
from types import FrameType, TracebackType
from typing import Any

from llama_cpp.llama_tokenizer import LlamaTokenizer

from swaa_local.errors import BusyError, ClosedError, OutOfRange


class Kind(Enum):
    READ = "of what never changes: sizes, the vocabulary. Any number of threads"
    LOOK = "at the context as it is now. One thread, also from a callback"
    WORK = "that is made of steps: a completion, a generator's next token. One thread"
    STEP = "that changes the context, and whose callbacks must not. One thread"


class Guard:
    """Admits calls to one object. Use `with guard.step():` and its like around them.

    Raises `ClosedError` after `close()`, and `BusyError` for a call of another thread, or of a callback inside a step.
    Refusing was chosen over waiting: a prompt may be read for minutes, and whoever waits for the thread that runs its
    callback would wait for ever.
    """

    def __init__(self) -> None:
        # Reentrant: a finalizer or a signal handler may run anywhere.
        self._lock = threading.RLock()
        self._calls: list[_Call] = []
        self._closed = False
        self._free: Callable[[], object] | None = None

    def read(self) -> _Call:
        return _Call(self, Kind.READ)

    def look(self) -> _Call:
        return _Call(self, Kind.LOOK)

    def work(self) -> _Call:
        return _Call(self, Kind.WORK)

    def step(self) -> _Call:
        return _Call(self, Kind.STEP)

    def check_open(self) -> None:
        if self._closed:
            raise ClosedError

    def close(self, free: Callable[[], object]) -> None:
        """Admit no more calls, and free: now, or when the last call that still runs has ended."""
        with self._lock:
            if not self._closed:
                self._closed, self._free = True, free
        self._free_if_idle()

    def _begin(self, call: _Call) -> None:
        with self._lock:
            self._drop_dead()
            self._calls.append(call)  # before the checks, so that nothing is freed meanwhile
            refusal = self._refusal(call)
            if refusal is not None:
                self._calls.remove(call)
        if refusal is not None:
            self._free_if_idle()
            raise refusal

    def _end(self, call: _Call) -> None:
        with self._lock:
            if call in self._calls:
                self._calls.remove(call)
        if self._closed:
            self._free_if_idle()

    def _refusal(self, call: _Call) -> Exception | None:
        if self._closed:
            return ClosedError()
        if call.kind is Kind.READ:
            return None
        for other in self._calls:
            if other is call or other.kind is Kind.READ:
                continue
            if other.thread is not call.thread:
                return BusyError(
                    f"this Llama works for the thread {other.thread.name!r}; it serves one call at a time: put a lock "
                    "around your calls, or make a Llama for each thread"
                )
            if other.kind is Kind.STEP and call.kind is not Kind.LOOK:
                return BusyError(
                    "this Llama is in the middle of a call, and a callback of it (on_prefill, a logits processor, a "
                    "stopping criterion) can only look; raise an exception to stop, and call it after that"
                )
        return None

    def _free_if_idle(self) -> None:
        with self._lock:
            self._drop_dead()
            if self._calls or self._free is None:
                return
            free, self._free = self._free, None
        free()

    def _drop_dead(self) -> None:
        """Ctrl-C can cut off a call between two instructions, before it ends here. What another thread that lives left
        so is found by that thread alone: its stack may change while one looks at it."""
        if self._calls:
            here = threading.current_thread()
            self._calls = [
                call for call in self._calls if (call.is_below() if call.thread is here else call.thread.is_alive())
            ]


class _Call:
    """One admitted call: a context manager."""

    __slots__ = ("_frame", "_guard", "kind", "thread")

    def __init__(self, guard: Guard, kind: Kind) -> None:
        self._guard = guard
        self.kind = kind
        self.thread = threading.current_thread()
        self._frame: FrameType | None = None

    def __enter__(self) -> None:
        self._frame = sys._getframe(1)
        self._guard._begin(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frame = None
        self._guard._end(self)

    def is_below(self) -> bool:
        """True if its block is being run by this thread."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def reads(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an object with a `_guard`, as a call of kind `READ`."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._guard.read():
            return method(self, *args, **kwargs)

    return guarded


class GuardedTokenizer(LlamaTokenizer):  # type: ignore[misc]
    """llama_cpp's tokenizer. It reads the model's memory, and may be kept longer than its `Llama`."""

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self._guard: Guard = llama._guard

    tokenize = reads(LlamaTokenizer.tokenize)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Upstream's `detokenize`. Raises `OutOfRange` for a token that is none, which would abort the process."""
        with self._guard.read():
            n_vocab = self._model.n_vocab()
            if len(tokens) and not (min(tokens) >= 0 and max(tokens) < n_vocab):
                wrong = next(token for token in tokens if not 0 <= token < n_vocab)
                raise OutOfRange(f"invalid token {wrong}; the vocabulary has {n_vocab}")
            text: bytes = super().detokenize(tokens, prev_tokens, special)
            return text
