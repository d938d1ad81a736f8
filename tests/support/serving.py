"""Runs `swaa-local serve` as a user does, and asks it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from tests.support.service import Service, running


class Running(Service):
    """A server that answers at `url`."""

    @property
    def url(self) -> str:
        return self.address

    def post(self, path: str, body: Any, *, key: str | None = None, timeout: float = 120) -> tuple[int, Any]:
        """Status and JSON of a POST; `body` is sent as it is if it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask(urllib.request.Request(self.url + path, data=data, method="POST"), key, timeout)

    def get(self, path: str, *, key: str | None = None) -> tuple[int, Any]:
        return self._ask(urllib.request.Request(self.url + path), key, 30)

    def _ask(self, request: urllib.request.Request, key: str | None, timeout: float) -> tuple[int, Any]:
        request.add_header("Content-Type", "application/json")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def stream(self, path: str, body: Any, timeout: float = 120) -> Generator[Any, None, None]:
        """The JSON of each server-sent event. Closing the iterator closes the connection."""
        request = urllib.request.Request(self.url + path, data=json.dumps(body | {"stream": True}).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=timeout) as response:
            for line in response:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])

    def complete(self, prompt: Any, n_predict: int = 12, **options: Any) -> dict[str, Any]:
        """llama-server's own endpoint, greedy: `tokens`, `content` and `timings` among others."""
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "return_tokens": True} | options
        status, answer = self.post("/completion", body, timeout=300)
        assert status == 200, answer
        return answer


def serving(model: Path | str | None, *args: object, **env: str) -> AbstractContextManager[Running]:
    """A server on a free port, one thread; gone when the block is left."""
    words = [*([] if model is None else [str(model)]), "--port", "0", "-t", "1", *map(str, args)]
    return running(Running, "serve", *words, **env)


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these started."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def is_running(pid: int) -> bool:
    """True unless the process ended (a zombie has)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(done: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.02)


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call all at once; their results in order."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return results
