"""What a killed program left beside its output goes away with the next one, and what a living one writes does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_local.files.output_file import workplace
from tests.support.program import environment, interrupt, succeeds

fcntl = pytest.importorskip("fcntl", reason="this system has no locks that end with the process")

OPTIONS = ("--window", 8, "--fa-decode")
WORK = (
    "import sys, time; from pathlib import Path; from swaa_local.files.output_file import workplace\n"
    "with workplace(Path(sys.argv[1])) as folder:\n"
    "    (folder / 'result.gguf').write_bytes(b'half')\n"
    "    print(folder, flush=True)\n"
    "    sys.stdin.read()\n"
)


def folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.startswith(".swaa"))


class Worker:
    """A program at work on an output, until it is told to end."""

    def __init__(self, output: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, str(output)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())
        assert (self.folder / "result.gguf").exists()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        self.process.communicate("")
        assert self.process.returncode == 0


def test_the_dead_are_tidied_away_and_the_living_left_alone(tmp_path):
    living, dead = Worker(tmp_path / "a.gguf"), Worker(tmp_path / "b.gguf")
    dead.kill()
    assert folders(tmp_path) == sorted([living.folder, dead.folder])
    with workplace(tmp_path / "c.gguf") as mine:
        assert folders(tmp_path) == sorted([living.folder, mine])
        assert (living.folder / "result.gguf").read_bytes() == b"half"
    living.end()
    assert folders(tmp_path) == []


def test_a_link_is_not_followed_and_other_folders_stay(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / ".swaa-local-link").symlink_to(precious)
    (tmp_path / ".swaa-localized").mkdir()
    with workplace(tmp_path / "out.gguf"):
        pass
    assert (precious / "file").exists()
    assert [path.name for path in folders(tmp_path)] == [".swaa-local-link", ".swaa-localized"]


def test_a_killed_convert_leaves_nothing_for_long(tmp_path, tiny_model):
    source = tmp_path / "large.gguf"
    source.write_bytes(tiny_model.read_bytes())
    os.truncate(source, 1 << 30)  # a hole, which takes time to copy and no room here
    out = tmp_path / "out.gguf"

    def is_writing() -> bool:
        return any(file.stat().st_size for file in tmp_path.glob(".swaa-local-*/result.gguf"))

    arguments = ("convert", source, "-o", out, *OPTIONS)
    assert interrupt(*arguments, when=is_writing, number=signal.SIGKILL) == -signal.SIGKILL
    assert len(folders(tmp_path)) == 1
    succeeds("convert", tiny_model, "-o", out, *OPTIONS)
    assert folders(tmp_path) == []
