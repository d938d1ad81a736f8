"""A chat that is killed in the middle of its own saving: the next one answers as if there had never been a cache.

`SWAA_KILLS` (2) is how many are killed in each mode, `SWAA_KILL_SEED` (0) where the random delays begin.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np
import pytest

from tests.support.program import SCHEDULE_OPTIONS, environment

N_KILLS = int(os.environ.get("SWAA_KILLS", "2"))
SEED = int(os.environ.get("SWAA_KILL_SEED", "0"))
LONGEST_SAVE_S = 0.06  # with the files of these models; a kill behind it is one after the save


@pytest.fixture
def model(tiny_model_factory) -> Path:
    """Wide, so that a state is some megabytes and takes its time to be written."""
    return tiny_model_factory(n_head_kv=4, head_dim=128)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(np.random.default_rng(5).choice(list("abcdefgh ."), 1500)))
    return path


def command(model: Path, *args: object) -> list[str]:
    options = ["-t", "1", "-c", "2560", "--temp", "0", "-n", "12", "--json"]
    return [sys.executable, "-m", "swaa_local", "chat", str(model), *options, *map(str, args)]


def home(directory: Path) -> dict[str, str]:
    return environment(XDG_CACHE_HOME=str(directory / "cache"), XDG_STATE_HOME=str(directory / "state"))


def ask(model: Path, directory: Path, *args: object) -> tuple[str, int, str]:
    """The answer, the tokens that came from the cache, and what was said beside it."""
    done = subprocess.run(
        command(model, *args),
        env=home(directory),
        stdin=DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply["answer"], reply["tokens"]["cached"], done.stderr


def kill_in_a_save(model: Path, directory: Path, nth: int, delay_s: float, *args: object) -> bool:
    """Kill a chat so long after the beginning of its nth save; False if it came to its end before."""
    folders = [directory / "cache/swaa-local/states", directory / "state/swaa-local/sessions"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command(model, *args), env=home(directory), stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
    )
    seen: set[str] = set()
    try:
        while process.poll() is None and len(seen) < nth:
            for folder in folders:
                seen |= {name for name in os.listdir(folder) if name.startswith((".swaa-local-", ".swaa-new-"))}
            time.sleep(0.0005)
        time.sleep(delay_s)
        return process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(120 + 60 * N_KILLS)
@pytest.mark.parametrize("name", SCHEDULE_OPTIONS)
def test_a_chat_that_is_killed_while_it_saves(model, book, tmp_path, name):
    """Its saves: what was read of the book, the conversation, and at the end what the conversation's cells are."""
    schedule, dice = SCHEDULE_OPTIONS[name], random.Random(f"{SEED} {name}")
    question = ["--file", book, "-p", "And what then?", *schedule]
    cold, _, _ = ask(model, tmp_path / "cold", *question, "--no-cache")
    killed = 0
    for kill in range(N_KILLS):
        directory = tmp_path / f"{kill}"
        nth, delay_s = 1 + kill % 4, dice.uniform(0, LONGEST_SAVE_S)
        begun = ["--session", "s", "--file", book, "-p", "Who?", *schedule]
        killed += kill_in_a_save(model, directory, nth, delay_s, *begun)
        answer, _, notes = ask(model, directory, *question)
        assert answer == cold, (nth, delay_s)
        assert "a cached state is not used" not in notes  # a file is whole, or it is not there
        # the conversation is there as far as it was kept, or begins
        went_on, _, _ = ask(model, directory, "--session", "s", "-p", "Go on", *schedule)
        turns = json.loads((directory / "state/swaa-local/sessions/s.json").read_text())["turns"]
        assert [turn["text"] for turn in turns][-2:] == ["Go on", went_on]
        assert len(turns) in (2, 4)
    assert killed
