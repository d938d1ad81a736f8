"""Runs `swaa-local worker` as a user does, and stands between a worker and whoever uses it."""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from tests.support.service import STOP_S, Service, running
from tests.support.serving import descendants

if TYPE_CHECKING:
    from typing_extensions import Self

HELLO = b"\x0e" + struct.pack("<Q", 24) + bytes(24)
"""The first message of whoever uses a worker, by ggml-rpc.cpp; zeros: over TCP."""


class Worker(Service):
    """A worker that answers at `address`, HOST:PORT."""

    start_s = 60.0

    def kill(self) -> None:
        """End the program that computes, without a word."""
        for pid in descendants(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=STOP_S)


def worker(*args: object, **env: str) -> AbstractContextManager[Worker]:
    """A worker of one thread on a free port; gone when the block is left."""
    return running(Worker, "worker", "--port", "0", "-t", "1", *map(str, args), **env)


@contextmanager
def workers(n: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        yield [stack.enter_context(worker()) for _ in range(n)]


class _Listening(ABC):
    """Takes connections at `address`, HOST:PORT, and serves each in a thread of its own, until the block is left."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    @abstractmethod
    def _serve(self, connection: socket.socket) -> None: ...

    @staticmethod
    def _end(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._end(self._listener)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Proxy(_Listening):
    """Stands between a worker and one that uses it, and counts. sent, received: bytes to the worker, and from it.

    on_sent: called with `sent` after each piece that went to the worker.
    """

    def __init__(self, target: str, on_sent: Callable[[int], None] = lambda sent: None) -> None:
        self.sent = self.received = 0
        self._target, self._on_sent = target, on_sent
        self._ends: list[socket.socket] = []
        super().__init__()

    def _serve(self, connection: socket.socket) -> None:
        host, port = self._target.split(":")
        try:
            far = socket.create_connection((host, int(port)))
        except OSError:
            connection.close()
            return
        for end in (connection, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ends += [connection, far]
        threading.Thread(target=self._pump, args=(far, connection, False), daemon=True).start()
        self._pump(connection, far, True)

    def _pump(self, source: socket.socket, sink: socket.socket, to_worker: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                if to_worker:
                    self.sent += len(data)
                    self._on_sent(self.sent)
                else:
                    self.received += len(data)
                sink.sendall(data)
        self._end(source, sink)

    def cut(self) -> None:
        """End all connections, as a worker's death does."""
        self._end(*self._ends)

    def close(self) -> None:
        super().close()
        self.cut()


class Answering(_Listening):
    """Answers the first message of each connection so, and ends it."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply
        super().__init__()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.recv(len(HELLO), socket.MSG_WAITALL)  # what is left unread would cut the answer off
            connection.sendall(self._reply)


def hello(version: Sequence[int]) -> bytes:
    """What a worker of this version of the protocol answers to the first message, by ggml-rpc.cpp."""
    return struct.pack("<Q", 28) + bytes([*version, 0]) + bytes(24)


# Of enum rpc_cmd in ggml-rpc.cpp.
_ALIGNMENT, _MAX_SIZE, _MEMORY, _ALLOC_SIZE, _HELLO, _DEVICE_COUNT = 1, 2, 11, 13, 14, 15
_N_TENSORS, _QUANTIZED = 11, {2, 8}  # a result and its sources; Q4_0, Q8_0


class ConvertingDevice(_Listening):
    """Speaks for a worker whose device puts F16 copies of quantized sources behind a result, as CUDA's attention does.

    It tells sizes, and holds and computes nothing. n_asked: how often it was asked for one.
    """

    def __init__(self, version: Sequence[int]) -> None:
        self.n_asked = 0
        self._version = version
        super().__init__()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, struct.error), connection:
            while True:
                command, size = struct.unpack("<BQ", connection.recv(9, socket.MSG_WAITALL))
                message = connection.recv(size, socket.MSG_WAITALL) if size else b""
                body = self._reply(command, message)
                connection.sendall(struct.pack("<Q", len(body)) + body)

    def _reply(self, command: int, message: bytes) -> bytes:
        if command == _HELLO:
            return hello(self._version)[8:]
        if command == _ALLOC_SIZE:
            self.n_asked += 1
            return struct.pack("<Q", sum(_bytes_of(message[4:], i) for i in range(_N_TENSORS)))
        numbers = {_ALIGNMENT: ("Q", 128), _MAX_SIZE: ("Q", 1 << 40), _MEMORY: ("QQ", 1 << 34, 1 << 34)}
        kind, *values = {**numbers, _DEVICE_COUNT: ("I", 1)}[command]
        return struct.pack(f"<{kind}", *values)


def _bytes_of(tensors: bytes, index: int) -> int:
    """By the fields id, type, buffer and ne of struct rpc_tensor; of the first, the result, in F32."""
    start = len(tensors) // _N_TENSORS * index
    kind, *shape = struct.unpack_from("<8xI8x4I", tensors, start)
    n = math.prod(shape)
    return 4 * n if index == 0 else 2 * n if kind in _QUANTIZED else 0
