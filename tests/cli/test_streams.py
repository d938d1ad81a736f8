"""Every command with a standard stream that is closed, full, or read by nobody: what is lost, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.program import environment
from tests.support.scripted import thinker
from tests.support.tiny import ALWAYS, FULL, ScheduleKeys, write_tiny_gguf

SPEAKERS = ["--version", "--help", "inspect", "convert --list-presets", "chat", "bench", "eval", "demo"]
"""Commands whose product goes to stdout."""
WORKERS = ["inspect", "convert", "chat", "bench", "eval", "demo"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    thinker(folder / "thinker.gguf")
    write_tiny_gguf(folder / "tiny.gguf", n_layer=2, schedule=ScheduleKeys(64, 4, [FULL, ALWAYS]))
    return folder


@pytest.fixture
def start(models, tmp_path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """`start(name, *redirections, **streams)`: a command in an empty folder, redirected as a shell does it."""
    commands = {
        "inspect": ["inspect", models / "tiny.gguf"],
        "convert": ["convert", models / "tiny.gguf", "-o", tmp_path / "out.gguf", "--window", "32"],
        "chat": ["chat", models / "thinker.gguf", "-t", "1", "-c", "512", "-p", "Is it?"],
        "bench": ["bench", models / "tiny.gguf", "-t", "1", "-p", "64", "-n", "2", "-r", "1"],
        "eval": ["eval", models / "tiny.gguf", "-t", "1", "-n", "1", "--length", "512", "--variants", "full"],
        "demo": ["demo", "-n", "1", "--length", "1024", "-t", "1"],
    }

    def run(name: str, *redirections: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
        words: Sequence[object] = commands.get(name, name.split())
        pipes: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | streams
        return subprocess.run(
            [
                "sh",
                "-c",
                f'exec "$@" {" ".join(redirections)}',
                "sh",
                sys.executable,
                "-m",
                "swaa_local",
                *map(str, words),
            ],
            env=environment(),
            cwd=tmp_path,
            check=False,
            timeout=120,
            **pipes,
        )

    return run


@pytest.fixture
def unread_pipe():
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("name", SPEAKERS)
def test_a_closed_or_full_stdout_is_one_error(start, name):
    closed, full = start(name, ">&-"), start(name, ">/dev/full")
    for done in (closed, full):
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr
    assert b"swaa-local: error: standard output" in closed.stderr
    assert full.stderr.splitlines()[-1] == b"swaa-local: error: standard output: No space left on device"


@pytest.mark.parametrize("name", ["chat", "bench", "eval", "demo"])
def test_what_takes_long_finds_out_before_the_work(start, name, tmp_path):
    assert len(start(name, ">&-").stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WORKERS)
def test_a_closed_stderr_or_stdin_changes_nothing(start, name, tmp_path):
    for redirections in (["<&-", "2>&-"], ["2>/dev/full"]):
        for left in tmp_path.iterdir():
            left.unlink()
        done = start(name, *redirections)
        assert done.returncode == 0, (redirections, done.stderr)
        assert b"Traceback" not in done.stderr
        assert (done.stdout == b"") == (name == "convert")


def test_nothing_that_is_printed_lands_in_a_file_of_the_user(start, tmp_path):
    """The next file to be opened would get the number of a closed stream, and with it what llama.cpp logs there."""
    assert start("convert", "<&-", ">&-", "2>&-").returncode == 0
    alone = (tmp_path / "out.gguf").read_bytes()
    (tmp_path / "out.gguf").unlink()
    assert start("convert").returncode == 0
    assert alone == (tmp_path / "out.gguf").read_bytes()
    assert start("eval", "<&-", "2>&-").returncode == 0
    [log] = tmp_path.glob("*.jsonl")
    for line in log.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("name", SPEAKERS)
def test_a_reader_of_stdout_that_left_ends_it_as_sigpipe_would(start, name, unread_pipe):
    done = start(name, stdout=unread_pipe)
    assert done.returncode == 141
    assert b"rror" not in done.stderr


@pytest.mark.parametrize("name", ["convert", "chat", "bench", "eval", "demo", "inspect nope.gguf", "nonsense"])
def test_a_reader_of_stderr_that_left_ends_it_as_sigpipe_would(start, name, unread_pipe, tmp_path):
    assert start(name, stderr=unread_pipe).returncode == 141
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name or path.name.startswith(".")] == []


def test_a_server_needs_no_streams(models):
    """As a service manager starts it; where it listens is known beforehand then."""
    command = [sys.executable, "-m", "swaa_local", "serve", str(models / "thinker.gguf"), "--port", "0", "-c", "512"]
    with subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command], env=environment(), stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        assert any("OpenAI API http://127.0.0.1:" in line for line in server.stderr)
        server.terminate()
        assert "Traceback" not in server.stderr.read()
    assert server.returncode == 0


def test_what_an_encoding_lacks_is_escaped(models, tmp_path):
    name = tmp_path / "caf\u00e9.gguf"
    name.write_bytes((models / "tiny.gguf").read_bytes())
    for encoding in ("ascii", "latin-1"):
        done = subprocess.run(
            [sys.executable, "-m", "swaa_local", "inspect", name, "--json"],
            env=environment(PYTHONIOENCODING=encoding),
            capture_output=True,
            check=True,
        )
        assert json.loads(done.stdout)["path"] == str(name)
