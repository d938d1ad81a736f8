"""Work in a child process that can be stopped at any moment: C code that ignores Ctrl-C, and upstream's converter.

The parent sends one JSON request and gets JSON events; everything that the child prints goes to stderr, which is kept
for the error message. Knows processes; nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from swaa_local.errors import SWAAError
from swaa_local.files.output_tail import OutputTail
from swaa_local.files.signals import ENGINE, ended_by
from swaa_local.text.printable import printable_lines

Event = dict[str, Any]

_TICK_S = 0.1
_LESS_MEMORY = "close other programs, or do this on a machine with more"
# The child must not import what happens to lie in the user's folder, which `python -m` would put first on the path.
_BOOTSTRAP = (
    "import sys\n"
    "if sys.path and sys.path[0] == '': del sys.path[0]\n"
    "if sys.argv[2] not in sys.path: sys.path.insert(0, sys.argv[2])\n"
    "import runpy\n"
    "runpy.run_module(sys.argv[1], run_name='__main__')\n"
)


class ChildError(SWAAError):
    """The child failed. last_words: why it gave up, if by an assertion or the like. signal: what ended it, or 0."""

    def __init__(self, message: str, last_words: str = "", signal: int = 0) -> None:
        super().__init__(message)
        self.last_words = last_words
        self.signal = signal


def run_child(
    module: str,
    request: Mapping[str, Any],
    *,
    what: str,
    on_event: Callable[[Event], None] | None = None,
    on_tick: Callable[[], None] | None = None,
    env: Mapping[str, str] | None = None,
    echo: bool = False,
    culprit: str = ENGINE,
) -> list[Event]:
    """Run `python -m module` with a request; return its events.

    what: what is being done, for messages. on_event: called with each event. on_tick: called about ten times a second.
    echo: pass the child's stderr on. culprit: the code that runs there. Whatever ends this call early, Ctrl-C too,
    kills the child and waits for it.

    Raises `ChildError` if it fails: with the `error` event's text if it sent one, else with the signal's name or its
    last words.
    """
    package_home = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", _BOOTSTRAP, module, package_home, json.dumps(dict(request))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    events: list[Event] = []
    inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    tail = OutputTail()
    readers = [
        threading.Thread(target=_read_events, args=(process.stdout, inbox), daemon=True),
        threading.Thread(target=_read_log, args=(process.stderr, tail, echo), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        while True:
            try:
                event = inbox.get(timeout=_TICK_S)
            except queue.Empty:
                event = {}
            if event is None:
                break
            if event:
                events.append(event)
                if on_event is not None:
                    on_event(event)
            if on_tick is not None:
                on_tick()
        code = process.wait()
        readers[1].join()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for reader, stream in zip(readers, (process.stdout, process.stderr), strict=True):
            # Ctrl-C may have come before this reader ran; then it ends with the child, if it ever begins.
            with contextlib.suppress(RuntimeError):
                reader.join()
                stream.close()
    if code != 0:
        told = next((event["error"] for event in events if "error" in event), None)
        raise ChildError(told or _how(what, code, tail, culprit), tail.last_words, signal=max(0, -code))
    return events


def _read_events(stream: IO[bytes], inbox: queue.SimpleQueue[Event | None]) -> None:
    for line in stream:
        inbox.put(json.loads(line))
    inbox.put(None)


def _read_log(stream: IO[bytes], tail: OutputTail, echo: bool) -> None:
    for line in stream:
        text = line.decode(errors="replace").rstrip()
        tail.add(text)
        if echo:
            print(printable_lines(text), file=sys.stderr, flush=True)


def _how(what: str, code: int, tail: OutputTail, culprit: str) -> str:
    if code < 0:
        return ended_by(-code, what, reason=tail.last_words, memory=_LESS_MEMORY, culprit=culprit)
    return f"{what} failed: {tail.reason}" if tail.reason else f"{what} failed with exit code {code}"


# In the child


def child_main(handle: Callable[[dict[str, Any], Callable[..., None]], None]) -> None:
    """Entry point of a child module: `handle(request, emit)`, where `emit(**event)` reports to the parent.

    A `SWAAError` becomes the `error` event.
    """
    import signal

    # Neither C code nor a long numpy call would hear of a Python-level KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def emit(**event: Any) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    try:
        handle(json.loads(sys.argv[3]), emit)
    except SWAAError as error:
        emit(error=str(error))
        sys.exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
