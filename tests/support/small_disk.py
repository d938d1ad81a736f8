"""A disk that is really full: a file system of a few blocks or files, in memory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest


def mounted(folder: Path, options: str) -> Callable[[], None]:
    """Mount a tmpfs with these options (`size=2m`, `nr_inodes=4`); gives what takes it away. Skips where it may not."""
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    def unmount() -> None:
        subprocess.run(["umount", "-l", str(folder)], check=True)

    return unmount


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """`small_disk(name, options)`: the folder of a file system of its own, gone when the test is over."""
    with ExitStack() as stack:

        def make(name: str, options: str) -> Path:
            stack.callback(mounted(tmp_path / name, options))
            return tmp_path / name

        yield make
