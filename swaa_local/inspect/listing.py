"""The models on this machine: GGUF files of directories and of the hub's cache, with what their headers say.

Knows headers and folders; nothing of the engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swaa_local.errors import SWAAError
from swaa_local.files.user_input import user_path
from swaa_local.model_file.adapter import AdapterInfo, read_adapter
from swaa_local.model_file.model_info import ModelInfo, model_info_of
from swaa_local.model_file.schedule_keys import KEY_CALIBRATION, schedule_of
from swaa_local.model_file.split import open_gguf, whole_models
from swaa_local.schedule.config import Schedule
from swaa_local.sources import hub

_MOST_DEPTH = 4  # folders below one that is named


class NoSuchDirectory(SWAAError):
    """What was named is neither a directory nor a file."""


@dataclass(frozen=True)
class ListedModel:
    """One model, or an adapter for `--lora`. name: as `chat` takes it. Where `problem` says why it cannot be read, the
    other fields are None."""

    name: str
    path: Path
    n_bytes: int
    info: ModelInfo | None = None
    schedule: Schedule | None = None
    is_calibrated: bool = False
    adapter: AdapterInfo | None = None
    problem: str | None = None


def list_models(places: Sequence[str]) -> list[ListedModel]:
    """The models in these directories and below; without any, those here and in the hub's cache.

    Raises `NoSuchDirectory`.
    """
    if not places:
        return [*_in_directory(Path(), deep=False), *list_cached()]
    found: list[ListedModel] = []
    for place in places:
        path = user_path(place)
        if path.is_dir():
            found += _in_directory(path)
        elif path.is_file():
            found.append(_look_at(path, str(path)))
        else:
            raise NoSuchDirectory(f"{place}: no such directory or file")
    return found


def _in_directory(directory: Path, *, deep: bool = True) -> Iterator[ListedModel]:
    for folder, folders, names in os.walk(directory, onerror=lambda _error: None):
        depth = len(Path(folder).relative_to(directory).parts)
        folders[:] = sorted(name for name in folders if deep and depth < _MOST_DEPTH and not name.startswith("."))
        for first in _models_of(names):
            path = Path(folder) / first
            yield _look_at(path, str(path))


def _models_of(names: Sequence[str]) -> list[str]:
    ggufs = (
        name for name in names if name.endswith(".gguf") and not name.startswith(".") and not hub.is_projector(name)
    )
    present = set(names)
    return sorted(first for first in whole_models(ggufs) if first in present)


def list_cached() -> Iterator[ListedModel]:
    """The models of the hub's cache; their names are `org/name:file.gguf`."""
    for repo, snapshot in hub.cached_repos():
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
        for first in _models_of(names):
            yield _look_at(snapshot / first, f"{repo}:{first}")


def _look_at(path: Path, name: str) -> ListedModel:
    try:
        with open_gguf(path) as file:
            info = model_info_of(file)
            return ListedModel(
                name, path, info.file_bytes, info, schedule_of(file), is_calibrated=KEY_CALIBRATION in file.keys
            )
    except SWAAError as error:
        size = path.stat().st_size if path.exists() else 0
        with contextlib.suppress(SWAAError):
            return ListedModel(name, path, size, adapter=read_adapter(path))
        return ListedModel(name, path, size, problem=str(error).removeprefix(f"{path}: "))
