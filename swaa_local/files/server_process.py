"""A server as a child process: started, waited for, signalled, and never left behind.

Knows processes, signals and ports; nothing of what is served.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import IO, Any

from swaa_local.errors import SWAAError
from swaa_local.files.output_tail import OutputTail
from swaa_local.files.signals import LESS_MEMORY, ended_by
from swaa_local.text.printable import printable_lines

_POLL_S = 0.1
_LINE_CHARS = 2000  # of the log: it may quote a whole request
_END_S = 8.0  # from a signal to the end; the server itself takes 5 s at most
_SAME_S = 0.3  # between signals that are one: `timeout` sends its own to the process and to the group
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Time, level and place of a line in llama-server's log; or what it says of its arguments.
_CONTROL = re.compile(r"\x1b\[[\d;]*m|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ERROR = re.compile(r"^(?:[\d.]+ E (?:\w+ +)?(?:\w+: )*|error: |(?=error ))")
# A server that does not know SIGHUP would die of it in the middle of its answers.
_FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
if hasattr(signal, "SIGHUP"):
    _FORWARDED[signal.SIGHUP] = signal.SIGTERM


class ServerError(SWAAError):
    """The server cannot listen, or ended before it was ready."""


class ServerDied(ServerError):
    """A signal that did not come from here ended the server, `what`."""

    def __init__(self, number: int, what: str, reason: str, memory: str = LESS_MEMORY) -> None:
        super().__init__(ended_by(number, what, reason=reason, memory=memory))
        self.exit_code = 128 + number


def claim_port(host: str, port: int) -> int:
    """The port to listen on at this host, a free one for port 0. Raises `ServerError` if it is taken, or not ours.

    Asked before the server starts: it would find out only later, and whoever has the port would answer for it.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServerError(
                f"{host}:{port} is taken by another program; choose another port with --port, "
                "or --port 0 for any free one"
            ) from None
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


class ServerProcess:
    """Context manager: the server runs inside the block, and is gone behind it.

    A SIGINT, SIGTERM or SIGHUP that this process gets goes to the server, and the second one kills it, as does a server
    that has not ended 8 s after the first. The server's output goes to stderr; until it is ready only if `echo`.
    pass_fds: file descriptors that it inherits. what: it is, for messages. less_memory: how it is made to take less.
    is_noise: whether a line of its output is left out all the same when it is ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        echo: bool = False,
        pass_fds: Sequence[int] = (),
        what: str = "the server",
        less_memory: str = LESS_MEMORY,
        is_noise: Callable[[str], bool] = lambda line: False,
    ) -> None:
        self._what, self._less_memory, self._is_noise = what, less_memory, is_noise
        self._command, self._env, self._echo, self._pass_fds = command, env, echo, pass_fds
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._tail: deque[str] = deque(maxlen=40)
        self._output = OutputTail()
        self._handlers: dict[int, Any] = {}
        self._received: int | None = None
        self._received_at_s = 0.0
        self._ready = False

    def __enter__(self) -> ServerProcess:
        if threading.current_thread() is threading.main_thread():
            for number in _FORWARDED:
                # Where a shell made us deaf to it, as with nohup, the server stays deaf too.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._forward)
        try:
            self._process = subprocess.Popen(
                self._command,
                env=dict(self._env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to the whole group, and twice means "at once" to the server.
                start_new_session=True,
                pass_fds=self._pass_fds,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except BaseException:
            self._restore_handlers()
            raise
        if self._received is not None:
            self._process.send_signal(_FORWARDED[signal.Signals(self._received)])
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._reader is not None
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        # What the server started itself may hold its output open.
        self._reader.join(timeout=1)
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        second = self._received is not None
        if second and now_s - self._received_at_s < _SAME_S:
            return
        self._received, self._received_at_s = number, now_s
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL if second else _FORWARDED[signal.Signals(number)])

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = _printable(line.decode(errors="replace").rstrip())
            if self._echo or (self._ready and not self._is_noise(text)):
                print(printable_lines(text), file=sys.stderr, flush=True)
            if text and not self._ready:
                self._tail.append(text)
            self._output.add(text)

    def wait_ready(self, is_ready: Callable[[], bool]) -> bool:
        """Wait until the server is, of which it is asked about ten times a second; False if a signal ended it before.

        Raises `ServerError` if it ends by itself.
        """
        assert self._process is not None
        while True:
            try:
                self._process.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                pass
            else:
                if self._received is not None:
                    return False
                self._fail()
            if is_ready():
                break
        self._ready = True
        while self._tail and not self._echo:
            if not self._is_noise(line := self._tail.popleft()):
                print(printable_lines(line), file=sys.stderr, flush=True)
        return True

    def _fail(self) -> None:
        assert self._process is not None
        assert self._reader is not None
        self._reader.join(timeout=1)
        said = list(self._tail)
        reason = next((line for line in said if _ERROR.match(line)), said[-1] if said else "")
        last_words = self._output.last_words
        for line in said:
            if (line != reason or last_words) and not self._echo:
                print(printable_lines(line), file=sys.stderr)
        code = self._process.returncode
        why = last_words or _ERROR.sub("", reason)
        if code < 0:
            raise ServerDied(-code, f"{self._what}, which was not ready yet,", why, self._less_memory)
        raise ServerError(
            f"{self._what} did not start (exit code {code}): {why or 'it gave no reason; -v shows its log'}"
        )

    @property
    def was_asked_to_end(self) -> bool:
        """Whether a signal was handed on to it."""
        return self._received is not None

    def wait(self) -> int:
        """Wait until the server ends; its exit code, 128 + n if signal n, which was asked for, ended it.

        Raises `ServerDied` for a signal that was not.
        """
        assert self._process is not None
        # A signal may reach another thread. Its handler runs in this one, which must not wait in one piece.
        while (code := self._process.poll()) is None:
            if self._received is not None and time.monotonic() - self._received_at_s > _END_S:
                self._process.kill()
            time.sleep(_POLL_S)
        if code < 0 and self._received is None:
            assert self._reader is not None
            self._reader.join(timeout=1)
            raise ServerDied(-code, self._what, self._output.last_words, self._less_memory)
        return 128 - code if code < 0 else code


def _printable(line: str) -> str:
    """What a client sent is quoted in the log, and must neither fill the terminal nor command it. Colours may."""
    if len(line) > _LINE_CHARS:
        line = f"{line[:_LINE_CHARS]} ... ({len(line):,} characters)"
    return _CONTROL.sub(lambda found: found[0] if len(found[0]) > 1 else f"\\x{ord(found[0]):02x}", line)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
