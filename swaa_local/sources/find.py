"""A model as a user names it, a file or a hub id, to a GGUF file on this machine. Knows nothing of the engine."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from swaa_local.errors import SWAAError
from swaa_local.files.user_input import user_path
from swaa_local.model_file.split import whole_models
from swaa_local.sources import hub


class ModelNotFound(SWAAError, ValueError):
    """There is no such GGUF; the message says what to do."""


def find_gguf(model: str) -> Path:
    """The file of `PATH`, `org/name` or `org/name:file.gguf`, the first of a model in parts; downloads what is missing.

    A directory or a repository stands for the only GGUF in it. Raises `ModelNotFound` or `hub.HubError`, also for a
    checkpoint, which must be converted first.
    """
    path = user_path(model)
    if path.is_file():
        return path
    if model and path.is_dir():
        return _only_gguf(model, path)
    if model and path.exists():
        raise ModelNotFound(f"{model} is not a regular file")
    hub_id = hub.parse_hub_id(model)
    if hub_id is None or (model.endswith((".gguf", "/")) and ":" not in model):
        raise ModelNotFound(f"{model}: no such file, and not a hub id (org/name or org/name:file.gguf)")
    found = hub.choose(hub.list_repo(hub_id), prefer_gguf=True)
    if found.gguf is None:
        raise _needs_conversion(model, "a checkpoint")
    return hub.fetch(found)


def _only_gguf(model: str, directory: Path) -> Path:
    """The one model in a directory, as the one in a repository."""
    names = sorted(file.name for file in directory.glob("[!.]*.gguf"))
    found = whole_models(name for name in names if not hub.is_projector(name))
    if len(found) == 1:
        return directory / next(iter(found))
    if found:
        raise ModelNotFound(f"{model} is a directory with {len(found)} models; name one of {', '.join(found)}")
    raise _needs_conversion(model, "a directory")


def _needs_conversion(model: str, what: str) -> ModelNotFound:
    return ModelNotFound(
        f"{model} is {what}, not a GGUF file; make one first: swaa-local convert {model} -o model.gguf"
    )


def fetch_matching(
    repo_id: str,
    patterns: Sequence[str],
    *,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Download one file of a hub repository for each glob pattern, or all parts of one model; the first one's path.

    Raises `ModelNotFound` for a pattern that matches nothing or several, and `hub.HubError`.
    """
    hub_id = hub.HubId(repo_id)
    listing = hub.list_repo(hub_id)
    names: list[str] = []
    for pattern in patterns:
        matching = fnmatch.filter(listing.sizes, pattern)
        parts = list(whole_models(matching).values())
        if len(parts) != 1:
            what = f"several files match {pattern!r}: {', '.join(matching)}" if matching else f"no file is {pattern!r}"
            raise ModelNotFound(f"{repo_id}: {what}; its files are {', '.join(listing.sizes)}")
        if missing := [name for name in parts[0] if name not in listing.sizes]:
            raise ModelNotFound(
                f"{repo_id}: {parts[0][0]} has {len(parts[0])} parts; {', '.join(missing)} is not there"
            )
        names += parts[0]
    paths = [hub.fetch_file(hub_id, listing, name, local_dir=local_dir, cache_dir=cache_dir) for name in names]
    return paths[0]
