"""Runs swaa-local as a user does: in a process of its own, through `python -m swaa_local`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCHEDULE_OPTIONS: dict[str, list[str]] = {
    "full": [],
    "FA decode": ["--window", "64", "--sinks", "4", "--fa-decode", "--tail", "16"],
    "rings": ["--window", "64", "--sinks", "4"],
}
"""A small window, as options of a command, by what its layers do."""


def environment(**changes: str) -> dict[str, str]:
    """This process's, with the package on the path and without what would change output; `changes` on top."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "COLUMNS"))}
    # absolute, for programs that run in another directory
    path = [str(ROOT), *(os.path.abspath(p) for p in env.get("PYTHONPATH", "").split(os.pathsep) if p)]
    return env | {"PYTHONPATH": os.pathsep.join(path), "NO_COLOR": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | changes


def run(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swaa_local", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False)


def fails(*args: object, code: int = 1, cwd: Path | None = None, **env: str) -> str:
    """Run what must fail; its one line on stderr (the last one, where there were notes before)."""
    done = run(*args, cwd=cwd, **env)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("swaa-local: error: " if code == 1 else "Error: ")
    return last


def succeeds(*args: object, cwd: Path | None = None, **env: str) -> str:
    """Run what must succeed; its stdout."""
    done = run(*args, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def interrupt(*args: object, when: Callable[[], bool], number: int = signal.SIGINT, **env: str) -> int:
    """Start, wait until `when()`, send a signal as a terminal would; the exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "swaa_local", *map(str, args)],
        env=environment(**env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not when():
            assert process.poll() is None, f"it ended before it could be interrupted: {process.communicate()[1]!r}"
            assert time.monotonic() < deadline, "it never came to the point where it should be interrupted"
            time.sleep(0.01)
        os.killpg(process.pid, number)
        error = process.communicate(timeout=60)[1]
        assert b"Traceback" not in error, error
        return process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
