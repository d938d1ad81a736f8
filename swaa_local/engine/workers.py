"""Workers: other machines, or other processes of this one, that hold and compute layers (llama.cpp's RPC servers).

Knows how a worker is written on a command line, and the first message of the protocol, so that a worker that cannot be
used is an error before a model is loaded. Needs no engine.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from swaa_local.errors import SWAAError

DEFAULT_PORT = 50052
PROTOCOL = (7, 0, 0)
"""The version that the engine speaks: RPC_PROTO_MAJOR_VERSION and so on, of ggml-rpc.h."""

_TIMEOUT_S = 5.0
_HELLO = 14  # RPC_CMD_HELLO
_CAPS_BYTES = 24  # RPC_CONN_CAPS_SIZE: of the transport; zeros are TCP


class WorkerError(SWAAError):
    """A worker cannot be used; the message has its address and says what to do."""


@dataclass(frozen=True)
class WorkerAddress:
    """Where a worker listens. host: a name or an IPv4 address."""

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> WorkerAddress:
        """HOST or HOST:PORT. Raises `WorkerError`."""
        host, colon, port = text.strip().rpartition(":")
        if not colon:
            host, port = port, str(DEFAULT_PORT)
        if ":" in host or host.startswith("["):
            raise WorkerError(f"{text.strip()!r} is no worker's address: llama.cpp reaches workers by IPv4 alone")
        if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise WorkerError(f"{text.strip()!r} is no worker's address, such as 192.168.1.5:{DEFAULT_PORT}")
        return cls(host, int(port))

    @classmethod
    def parse_list(cls, text: str) -> tuple[WorkerAddress, ...]:
        """Addresses separated by commas, each of another worker. Raises `WorkerError`."""
        found = tuple(cls.parse(part) for part in text.split(","))
        for index, address in enumerate(found):
            if address in found[:index]:
                raise WorkerError(f"the worker {address} is given twice")
        return found


def parse_split(text: str) -> tuple[float, ...]:
    """Shares of the layers: 3,1. Raises ValueError."""
    shares = tuple(float(part) for part in text.replace("/", ",").split(","))
    if not all(0 <= share < float("inf") for share in shares) or not sum(shares):
        raise ValueError(text)
    return shares


def check_workers(addresses: Sequence[WorkerAddress], *, timeout_s: float = _TIMEOUT_S) -> None:
    """Raise `WorkerError` unless each worker answers, in time and in this protocol. Errors as of `ask_version`."""
    for address in addresses:
        version = ask_version(address, timeout_s=timeout_s)
        # The engine takes others with the same major version; but graphs are sent as numbers of ops, which differ.
        if version != PROTOCOL:
            theirs, ours = (".".join(map(str, number)) for number in (version, PROTOCOL))
            raise WorkerError(
                f"the worker {address} speaks version {theirs} of the protocol, and this machine {ours}; "
                "install the same version of swaa-local on both"
            )


def ask_version(address: WorkerAddress, *, timeout_s: float = _TIMEOUT_S) -> tuple[int, int, int]:
    """The version of the protocol that a worker speaks.

    A worker serves one program at a time, and answers no other meanwhile. Raises `WorkerError`.
    """
    try:
        with socket.create_connection((address.host, address.port), timeout=timeout_s) as connection:
            connection.sendall(struct.pack("<BQ", _HELLO, _CAPS_BYTES) + bytes(_CAPS_BYTES))
            n_bytes = struct.unpack("<Q", _receive(connection, 8))[0]
            if n_bytes == 4 + _CAPS_BYTES:
                major, minor, patch = _receive(connection, n_bytes)[:3]
                return major, minor, patch
    except TimeoutError:
        raise WorkerError(
            f"the worker {address} does not answer within {timeout_s:g} s: it is switched off, behind a firewall, "
            "or works for another program (it serves one at a time)"
        ) from None
    except socket.gaierror:
        raise WorkerError(f"the worker {address} is not found: no machine is called {address.host!r}") from None
    except ConnectionRefusedError:
        raise WorkerError(
            f"no worker listens at {address}; start one there: swaa-local worker --host {address.host} "
            f"--port {address.port}"
        ) from None
    except ConnectionError:
        pass
    except OSError as error:
        raise WorkerError(f"the worker {address} cannot be reached: {error.strerror or error}") from None
    raise WorkerError(f"what listens at {address} is no worker of this version, or an old one")


def _receive(connection: socket.socket, n_bytes: int) -> bytes:
    received = b""
    while len(received) < n_bytes:
        part = connection.recv(n_bytes - len(received))
        if not part:
            raise ConnectionError
        received += part
    return received
