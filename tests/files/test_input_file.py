"""Inputs without an end are refused in a sentence, and pipes, which have one, are read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swaa_local.chat.store import StoreError, load_conversation
from swaa_local.files.input_file import InputTooLarge, read_input
from tests.support.program import environment, fails
from tests.support.scripted import thinker

pytestmark = pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")

ZERO = "/dev/zero"
FAST = ("-t", "1", "-c", "256")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return thinker(tmp_path_factory.mktemp("input") / "thinker.gguf")


def test_as_much_as_is_allowed_and_no_more():
    assert read_input(io.BytesIO(b"x" * 3000), "it", most=3000) == b"x" * 3000
    with pytest.raises(InputTooLarge, match=r"it is larger than 2\.9 KiB or has no end"):
        read_input(io.BytesIO(b"x" * 3001), "it", most=3000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("chat", "-f", ZERO, "-p", "x"), "cannot read /dev/zero: it is a device, not a file"),
        (("chat", "-f", ZERO, "-f", ZERO, "-p", "x"), "it is a device"),
        (("eval", "--results", ZERO), "/dev/zero is not a regular file; name another file with --results"),
        (("eval", "--dataset", ZERO), "/dev/zero is not a regular file"),
        (("eval", "--task", "niah_single_2", "--haystack", ZERO), "it is a device, not a file"),
        (("serve", "--api-key-file", ZERO), "it is a device, not a file"),
    ],
)
def test_devices_are_not_read_without_end(model, words, message):
    assert message in fails(words[0], model, *words[1:])


@pytest.mark.parametrize("command", [("chat", "-p", "x"), ("bench",), ("eval",), ("serve",), ("inspect",)])
def test_a_device_is_no_model(command):
    assert "/dev/zero" in (message := fails(command[0], ZERO, *command[1:]))
    assert "not a regular file" in message


def test_standard_input_without_an_end(model):
    for words in (["-p", "x", "-f", "-"], []):
        with open(ZERO, "rb") as zero:
            command = [sys.executable, "-m", "swaa_local", "chat", str(model), *FAST, *words]
            done = subprocess.run(command, stdin=zero, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "standard input is larger than 256.0 MiB or has no end" in done.stderr


def test_a_conversation_is_no_device():
    with pytest.raises(StoreError, match="it is a device, not a file"):
        load_conversation(ZERO)


@pytest.fixture
def pipe(tmp_path) -> Path:
    """A pipe that somebody writes one text to, as `<(command)` makes it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_bytes(b"a key or a text\n"), daemon=True).start()
    return path


def test_a_pipe_is_read(model, pipe):
    command = [sys.executable, "-m", "swaa_local", "chat", str(model), *FAST, "-f", str(pipe), "-p", "Is it?"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "Yes!\n"


def test_results_do_not_go_to_a_pipe(model, pipe):
    assert "pipe is not a regular file" in fails("eval", model, "--results", pipe)
    pipe.read_bytes()


def test_json_that_nests_without_end(model, tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 100_000 + "\n")
    assert "line 1 nests JSON too deeply" in fails("eval", model, "--dataset", path)
