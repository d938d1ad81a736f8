"""Runs a command that stays, as a user does, and stops it: one process, one address, every wait with an end."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from tests.support.program import environment

STOP_S = 30.0


@dataclass
class Service:
    """A command that answers at `address`, its first line. `log` holds what it wrote to stderr so far."""

    process: subprocess.Popen[str]
    address: str
    log_file: Path

    start_s: ClassVar[float] = 120.0

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal as a service manager would, to the command alone; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=STOP_S)


Kind = TypeVar("Kind", bound=Service)


@contextmanager
def running(kind: type[Kind], *words: str, **env: str) -> Iterator[Kind]:
    """`swaa-local WORDS`; gone when the block is left."""
    with tempfile.TemporaryDirectory(prefix=f"swaa-{words[0]}-") as tmp:
        log, out = Path(tmp, "stderr"), Path(tmp, "stdout")
        with open(log, "w") as stderr, open(out, "w") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-m", "swaa_local", *words],
                env=environment(**env),
                stdout=stdout,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + kind.start_s
            while not (address := out.read_text()).endswith("\n"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"no address after {kind.start_s} s: {log.read_text()}"
                time.sleep(0.02)
            yield kind(process, address.strip(), log)
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=STOP_S)
        finally:
            if process.poll() is None:
                process.kill()  # what it started goes with it
                process.wait()
