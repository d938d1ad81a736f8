"""A stand-in for a Hugging Face hub: the endpoints that huggingface-hub asks, over files in memory."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """`repos`: repository -> path -> content. `gated`: repositories that want a token.

    `served`: what is sent for a file instead of its content, which its size and hash tell.
    `stall_after`: bytes of a file's body after which the connection hangs until it is set to None.
    """

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    served: dict[tuple[str, str], bytes] = field(default_factory=dict)
    stall_after: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) of every request."""
    url: str = ""

    def bodies(self) -> list[tuple[str, str | None]]:
        """Files whose content was asked for, with the Range header."""
        found = [
            (re.search(r"/resolve/[^/]+/(.*)", path), span) for method, path, span in self.requests if method == "GET"
        ]
        return [(match[1], span) for match, span in found if match]

    @contextmanager
    def serve(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(_Handler):
            fake = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stall_after = None
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if self._may_read(match[1], match[2]):
                self._info(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            if self._may_read(match[1], match[2]):
                self._json([_entry(name, data) for name, data in self.fake.repos[match[1]].items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._may_read(match[1], match[2]):
                self._file(match[1], match[3], with_body=with_body)
        else:
            self._error(404, "EntryNotFound", "no such endpoint")

    def _may_read(self, repo: str, revision: str | None) -> bool:
        if repo not in self.fake.repos:
            self._error(404, "RepoNotFound", "Repository not found")
        elif repo in self.fake.gated and self.headers.get("Authorization") != "Bearer hf_good":
            self._error(403, "GatedRepo", "Access to this model is restricted")
        elif revision not in (None, "main", "v2", COMMIT):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _info(self, repo: str) -> None:
        files = self.fake.repos[repo]
        siblings = [{"rfilename": name, "size": len(data), "blobId": _etag(data)} for name, data in files.items()]
        self._json({"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _file(self, repo: str, name: str, *, with_body: bool) -> None:
        data = self.fake.repos[repo].get(name)
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not with_body:
            return
        data = self.fake.served.get((repo, name), data)
        stall = self.fake.stall_after
        if stall is not None and stall < len(data):
            self.wfile.write(data[start:stall])
            self.wfile.flush()
            while self.fake.stall_after is not None:
                time.sleep(0.05)
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
