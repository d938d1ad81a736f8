"""Conversations that go on in another run: named, the last one, and saved ones."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import environment
from tests.support.scripted import thinker


@pytest.fixture
def model(tmp_path) -> Path:
    """Answers "Yes!", whatever it is asked."""
    return thinker(tmp_path / "thinker.gguf")


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text("A book. " * 60)
    return tmp_path / "book.txt"


def chat(*args: object, home: Path) -> subprocess.CompletedProcess[str]:
    env = environment(XDG_CACHE_HOME=str(home / "cache"), XDG_STATE_HOME=str(home / "state"))
    command = [sys.executable, "-m", "swaa_local", "chat", *map(str, args), "-t", "1", "-c", "2048"]
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
    )


def turns(home: Path, name: str) -> list[str]:
    data = json.loads((home / "state" / "swaa-local" / "sessions" / f"{name}.json").read_text())
    return [turn["text"] for turn in data["turns"]]


def cached(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    words = done.stderr.replace(",", "").split()
    return int(words[words.index("cached)") - 1].lstrip("(")) if "cached)" in words else 0


def test_a_session_goes_on_and_reads_only_what_is_new(model, book, tmp_path):
    first = chat(model, "--session", "thesis", "--file", book, "-p", "Is it?", home=tmp_path)
    assert (first.stdout, cached(first)) == ("Yes!\n", 0)
    assert turns(tmp_path, "thesis") == ["Is it?", "Yes!"]
    second = chat(model, "--session", "thesis", "-p", "And that?", home=tmp_path)
    n_book = len(book.read_text())
    assert cached(second) > n_book + len("Is it?")  # its answer too: it was written in the same conversation
    third = chat("--continue", "-p", "Sure?", home=tmp_path)  # the model is the conversation's
    assert cached(third) > n_book + len("Is it?And that?")
    assert turns(tmp_path, "thesis") == ["Is it?", "Yes!", "And that?", "Yes!", "Sure?", "Yes!"]


def test_a_conversation_that_the_cache_has_lost_is_read_again(model, book, tmp_path):
    chat(model, "--session", "thesis", "--file", book, "-p", "Is it?", home=tmp_path)
    for path in (tmp_path / "cache" / "swaa-local" / "states").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    done = chat(model, "--session", "thesis", "-p", "And that?", home=tmp_path)
    assert (done.stdout, cached(done)) == ("Yes!\n", 0)
    assert "a cached state is not used" in done.stderr
    assert len(turns(tmp_path, "thesis")) == 4


def test_only_the_owner_may_read_a_session(model, tmp_path):
    chat(model, "--session", "thesis", "-p", "Is it?", home=tmp_path)
    file = tmp_path / "state" / "swaa-local" / "sessions" / "thesis.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_system_message_is_kept_and_can_be_replaced(model, tmp_path):
    def system() -> str:
        return json.loads((tmp_path / "state/swaa-local/sessions/s.json").read_text())["system"]

    chat(model, "--session", "s", "-s", "Be brief.", "-p", "Is it?", home=tmp_path)
    chat(model, "--session", "s", "-p", "And that?", home=tmp_path)
    assert system() == "Be brief."
    chat(model, "--session", "s", "-s", "Be long.", "-p", "And that?", home=tmp_path)
    assert system() == "Be long."


def test_what_cannot_be_gone_on_with_is_one_line(model, tmp_path):
    for args, error in (
        ([model, "--continue", "-p", "x"], "there is no conversation to go on with"),
        ([model, "--session", "nope", "--continue", "-p", "x"], "there is no session 'nope'"),
        ([model, "--session", "../x", "-p", "x"], "a session's name is made of"),
    ):
        done = chat(*args, home=tmp_path)
        assert done.returncode == 1
        assert error in done.stderr
        assert "Traceback" not in done.stderr
    sessions = tmp_path / "state" / "swaa-local" / "sessions"
    sessions.mkdir(parents=True)
    (sessions / "torn.json").write_text('{"format": "swaa-local-chat", "ver')
    assert "torn.json is not a saved conversation" in chat(model, "--session", "torn", "-p", "x", home=tmp_path).stderr


def test_a_session_that_cannot_be_written_still_answers(model, tmp_path):
    (tmp_path / "state").write_text("in the way")
    done = chat(model, "--session", "s", "-p", "Is it?", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Yes!\n")
    assert done.stderr.count("the conversation is not kept") == 1
