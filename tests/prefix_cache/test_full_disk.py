"""Disks that are full while a chat saves: one line, the answer, and nothing that is torn."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import environment
from tests.support.scripted import thinker
from tests.support.small_disk import small_disk

__all__ = ["small_disk"]


@pytest.fixture
def model(tmp_path) -> Path:
    """Answers "Yes!", whatever it is asked."""
    return thinker(tmp_path / "thinker.gguf")


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text("A book. " * 80)
    return tmp_path / "book.txt"


def chat(model: Path, *args: object, **env: Path) -> str:
    """What was said beside the answer, which must be there."""
    done = subprocess.run(
        [sys.executable, "-m", "swaa_local", "chat", str(model), "-t", "1", "-c", "2048", *map(str, args)],
        env=environment(**{name: str(value) for name, value in env.items()}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "Yes!\n"), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def fill(path: Path) -> None:
    """Write until there is no room for more."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def test_a_cache_on_a_small_disk(small_disk, model, book):
    disk = small_disk("disk", "size=64m")
    said = chat(model, "--file", book, "-p", "Is it?", XDG_CACHE_HOME=disk)
    assert said.count("is not kept") == 1
    assert f"the disk of {disk}" in said
    assert "left" in said
    assert files(disk / "swaa-local" / "states") == []
    assert "cached" not in chat(model, "--file", book, "-p", "Is it?", XDG_CACHE_HOME=disk)


@pytest.mark.parametrize("n_files", [2, 3, 4, 5, 6])
def test_a_disk_that_takes_no_further_file(small_disk, model, book, n_files):
    """Whichever file or folder is the one too many, of those that a save makes on its way."""
    disk = small_disk("disk", f"size=4g,nr_inodes={n_files}")
    said = chat(model, "--file", book, "-p", "Is it?", XDG_CACHE_HOME=disk)
    left = files(disk / "swaa-local" / "states")
    if not left:
        assert said.count("is not kept: ") == 1
        assert "No space left on device" in said
    assert [path.suffix for path in left] in ([], [".prefix"])
    assert ("cached" in chat(model, "--file", book, "-p", "Is it?", XDG_CACHE_HOME=disk)) == bool(left)


def test_a_session_on_a_full_disk_keeps_what_it_had(small_disk, model, book, tmp_path):
    disk = small_disk("disk", "size=64k")
    homes = {"XDG_STATE_HOME": disk, "XDG_CACHE_HOME": tmp_path / "cache"}
    chat(model, "--session", "s", "-p", "Is it?", **homes)
    session = disk / "swaa-local" / "sessions" / "s.json"
    before = session.read_bytes()
    fill(disk / "filler")
    said = chat(model, "--session", "s", "--file", book, "-p", "And that?", **homes)
    assert said.count("the conversation is not kept: ") == 1
    assert "No space left on device" in said
    assert session.read_bytes() == before
    assert {path.name for path in files(disk)} == {"filler", "s.json"}
    (disk / "filler").unlink()
    chat(model, "--session", "s", "-p", "And that?", **homes)
    assert [turn["text"] for turn in json.loads(session.read_text())["turns"]] == [
        "Is it?",
        "Yes!",
        "And that?",
        "Yes!",
    ]
