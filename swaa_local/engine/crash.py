"""What a command says when a signal ends it while the engine works in its process, where no Python code runs any more.

A fault, and what the engine aborts for, is told by a handler in C: the sentinel, a small library beside the engine's.
SIGKILL reaches no handler; it is told by a process that was forked before, and that waits for the end of a pipe. The
command itself stays the process that the shell knows, with its terminal, its signals and its exit code. Nothing is
watched where the library is used without the command.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from swaa_local.files.signals import FAULTS, advice
from swaa_local.text.printable import printable

_STEP_BYTES = 512
_ARMED, _ENDED = b"a", b"e"
_TOLD = (*FAULTS, "SIGILL", "SIGBUS", "SIGSYS", "SIGXCPU")
_QUIET = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2")
"""Whoever sends them knows; they must not be taken for SIGKILL."""


class _Watch:
    """The step that is under way, in memory that the handler in C and the forked process read."""

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, _STEP_BYTES)
        self.pipe = -1
        self.kept: list[Any] = []  # what C holds pointers to

    @property
    def step(self) -> bytes:
        return self.page[:].split(b"\0", 1)[0]

    @step.setter
    def step(self, text: bytes) -> None:
        self.page[:] = text[: _STEP_BYTES - 1].ljust(_STEP_BYTES, b"\0")

    def tell(self, watcher: bytes) -> None:
        with contextlib.suppress(OSError):  # there may be none
            os.write(self.pipe, watcher)


_watch: _Watch | None = None


def watch(doing: str, *, keep_backtrace: bool = False) -> None:
    """From here to the end of the process, a signal that ends it is reported on stderr. Loads the engine.

    doing: what is under way where no `step` is. keep_backtrace: the engine's own, from a debugger, before an abort.
    Raises `EngineMissing`. Does no more than to load the engine where there is no fork, or no sentinel beside it.
    """
    global _watch
    started = None
    if _watch is None and hasattr(os, "fork"):
        started = _Watch()
        started.step = _as_bytes(doing)
        # Before numpy and the engine have threads, which a forked process lacks. Without it SIGKILL is not told.
        with contextlib.suppress(OSError):
            _fork_watcher(started)
    from swaa_local.engine import native

    if started is None:
        return
    if native.sentinel is None:
        started.tell(_ENDED)
        return
    _arm(started, native, keep_backtrace)
    _watch = started


@contextmanager
def step(doing: str) -> Iterator[None]:
    """Name what is under way, as it stands behind `while`: `reading a prompt of 512 tokens`."""
    if _watch is None:
        yield
        return
    before = _watch.step
    _watch.step = _as_bytes(doing)
    try:
        yield
    finally:
        _watch.step = before


@contextmanager
def interruptible_at_once() -> Iterator[None]:
    """In here Ctrl-C ends the process wherever it is, also in a long call of C, and no Python code runs any more. For
    the last thing that a command does, where nothing is broken by it."""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    if _watch is not None:
        _watch.tell(_ENDED)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _as_bytes(text: str) -> bytes:
    return printable(text).encode()


def _sentence(name: str) -> tuple[bytes, bytes]:
    """What stands before and after the step."""
    clean = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides the cursor, and leaves a line
    return f"{clean}swaa-local: error: ended by {name} while ".encode(), f"; {advice(name)}\n".encode()


def _arm(watch: _Watch, native: Any, keep_backtrace: bool) -> None:
    sentinel = native.sentinel
    on_signal = sentinel.llama_cpp_sentinel_last_words
    on_signal.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p]
    where = (ctypes.c_char * _STEP_BYTES).from_buffer(watch.page)
    watch.kept += [where, sentinel]
    told = set()
    for name in (*_TOLD, *_QUIET):
        if not hasattr(signal, name):
            continue
        before, after = words = _sentence(name) if name in _TOLD else (None, None)
        watch.kept += words
        if on_signal(getattr(signal, name), before, ctypes.addressof(where), after) == 0:
            told.add(name)
    sentinel.llama_cpp_sentinel_last_words_fd(watch.pipe)
    if "SIGABRT" in told and not keep_backtrace:
        native.ggml_set_abort_callback(ctypes.cast(sentinel.llama_cpp_sentinel_abort, ctypes.c_void_p))
    watch.tell(_ARMED)
    atexit.register(watch.tell, _ENDED)


# The watcher


def _fork_watcher(watch: _Watch) -> None:
    read_end, write_end = os.pipe()
    # In the watcher they stay blocked: a terminal and a service manager signal the whole group.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        if os.fork() == 0:
            try:
                os.close(write_end)
                _look_on(read_end, watch)
            finally:
                os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(read_end)
    watch.pipe = write_end


def _look_on(read_end: int, watch: _Watch) -> None:
    # Whoever reads the command's output must not wait for this process.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if os.read(read_end, 1) == _ARMED and os.read(read_end, 1) == b"":
        before, after = _sentence("SIGKILL")
        os.write(2, before + watch.step + after)
