"""Where llama-server listens, and how it is asked. Knows HTTP over TCP and UNIX sockets."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from dataclasses import dataclass, replace

from swaa_local.files.server_process import claim_port

_REQUEST_S = 5.0


@dataclass(frozen=True)
class Address:
    """Where a server listens: a host name, an IP address or the path of a UNIX socket that ends in .sock."""

    host: str
    port: int
    prefix: str = ""
    """Path before every endpoint, without a slash at its end."""
    tls: bool = False

    @property
    def is_socket(self) -> bool:
        return self.host.endswith(".sock")

    @property
    def reachable(self) -> str:
        """The host as this machine reaches it: all addresses are also the loopback's."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        """What a browser on this machine is given."""
        if self.is_socket:
            return f"unix:{self.host}{self.prefix}"
        host = f"[{self.reachable}]" if ":" in self.reachable else self.reachable
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def claim(self) -> Address:
        """The same address, with a free port for port 0. Raises `ServerError` if it is taken or not this machine's."""
        return self if self.is_socket else replace(self, port=claim_port(self.host, self.port))

    def is_ready(self) -> bool:
        """Whether the server answers /health with 200."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get("/health")[0] == 200
        return False

    def get(self, path: str, *, key: str | None = None) -> tuple[int, bytes]:
        """Status and body of a GET; OSError or HTTPException if nobody answers."""
        connection = self._connection()
        headers = {"Accept-Encoding": "gzip"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        try:
            connection.request("GET", self.prefix + path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self.is_socket:
            local = http.client.HTTPConnection("localhost", timeout=_REQUEST_S)
            local.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.sock.settimeout(_REQUEST_S)
            local.sock.connect(self.host)
            return local
        if self.tls:
            # To ourselves, under a name that the certificate need not bear.
            context = ssl._create_unverified_context()
            return http.client.HTTPSConnection(self.reachable, self.port, timeout=_REQUEST_S, context=context)
        return http.client.HTTPConnection(self.reachable, self.port, timeout=_REQUEST_S)
