"""Folders with only some of the engine's libraries, for LLAMA_CPP_LIB_PATH."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def linked(libraries: Path, folder: Path, wanted: Callable[[str], bool]) -> Path:
    """A new folder inside `folder` with links to those files of `libraries` whose names are wanted."""
    made = folder / "llama_cpp" / "lib"
    made.mkdir(parents=True)
    for file in libraries.iterdir():
        if wanted(file.name):
            (made / file.name).symlink_to(file)
    # what auditwheel added to a wheel is found from there
    for added in libraries.parents[1].glob("llama_cpp_python.libs"):
        (folder / added.name).symlink_to(added)
    return made
