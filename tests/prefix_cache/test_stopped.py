"""Ctrl-C while a chat reads: the same command goes on behind what was read, and answers as if it had not been stopped.

A second Ctrl-C, while that is written, ends the program at once and leaves a cache that is whole.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import IO

import numpy as np
import pytest

from tests.support.program import SCHEDULE_OPTIONS, environment, succeeds
from tests.support.tiny_hybrid import write_tiny_hybrid

N_CHARACTERS = 9000  # a token each
PARTS = 20  # of 128 tokens, that are read before it is stopped


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("".join(np.random.default_rng(5).choice(list("abcdefgh ."), N_CHARACTERS)))
    return path


def start(model: Path, home: Path, *args: object) -> subprocess.Popen[str]:
    options = ["-t", "1", "-c", "10240", "-ub", "128", "--temp", "0", "-n", "12", "-p", "Who?", *map(str, args)]
    return subprocess.Popen(
        [sys.executable, "-m", "swaa_local", "chat", str(model), *options],
        env=environment(XDG_CACHE_HOME=str(home), XDG_STATE_HOME=str(home / "state")),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        text=True,
    )


def ask(model: Path, home: Path, *args: object) -> tuple[str, int]:
    """The answer, and the tokens that came from the cache."""
    answer, errors = (process := start(model, home, *args, "--json")).communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    reply = json.loads(answer)
    return reply["answer"], reply["tokens"]["cached"]


def stop_while_it_reads(process: subprocess.Popen[str]) -> None:
    """llama.cpp logs a line before each part of a prompt, and one for the context before."""
    errors: IO[str] | None = process.stderr
    assert errors is not None
    seen = -1
    while seen < PARTS:
        seen += "set_abort_callback" in errors.readline()
        assert process.poll() is None
    process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("name", SCHEDULE_OPTIONS)
@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_the_same_command_goes_on_behind_what_was_read(tiny_model, book, tmp_path, kind, name):
    model = tiny_model if kind == "plain" else write_tiny_hybrid(tmp_path / "hybrid.gguf")
    args = ["--file", book, *SCHEDULE_OPTIONS[name]]
    cold, _ = ask(model, tmp_path / "cold", *args, "--no-cache")
    home = tmp_path / "home"
    stop_while_it_reads(process := start(model, home, *args, "--verbose"))
    answer, errors = process.communicate(timeout=60)
    assert (process.returncode, answer) == (130, "")
    assert "Traceback" not in errors
    told = re.findall(r"stopped before the answer began; ([\d,]+) of ([\d,]+) tokens are read and kept", errors)
    assert told, errors
    [(n_kept, n_prompt)] = [(int(kept.replace(",", "")), int(n.replace(",", ""))) for kept, n in told]
    assert 256 <= n_kept < N_CHARACTERS < n_prompt
    assert f"{n_kept} tokens" in succeeds("cache", "list", XDG_CACHE_HOME=str(home)).replace(",", "")
    assert ask(model, home, *args) == (cold, n_kept)
    again, n_cached = ask(model, home, *args)
    assert again == cold
    assert n_cached > N_CHARACTERS


def test_without_the_cache_nothing_is_kept_or_promised(tiny_model, book, tmp_path):
    stop_while_it_reads(process := start(tiny_model, tmp_path, "--file", book, "--no-cache", "--verbose"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped before the answer began" in errors.splitlines()  # and no more
    assert "0 states" in succeeds("cache", "list", XDG_CACHE_HOME=str(tmp_path))


@pytest.fixture(scope="module")
def wide_model(tiny_model_factory) -> Path:
    """Of which a state takes its time to be written."""
    return tiny_model_factory(n_head_kv=4, head_dim=128)


@pytest.fixture(scope="module")
def answer_of_wide_model(wide_model, book, tmp_path_factory) -> str:
    return ask(wide_model, tmp_path_factory.mktemp("cold"), "--file", book, "--no-cache")[0]


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03])
def test_a_second_ctrl_c_ends_the_saving_and_leaves_the_cache_whole(
    wide_model, answer_of_wide_model, book, tmp_path, delay_s
):
    model, home, args = wide_model, tmp_path / "home", ["--file", book]
    states = home / "swaa-local" / "states"
    stop_while_it_reads(process := start(model, home, *args, "--verbose"))
    # From its name on: a folder that has none yet stays for an hour.
    while process.poll() is None and not list(states.glob(".swaa-local-*")) and not list(states.glob("*.prefix")):
        time.sleep(0.0005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # to a shell, both are 130
    assert "Traceback" not in errors
    assert "SIGKILL" not in errors
    assert ask(model, home, *args)[0] == answer_of_wide_model
    assert [path.suffix for path in states.iterdir()] == [".prefix"]  # what was left behind is gone
