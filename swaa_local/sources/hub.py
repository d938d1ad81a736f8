"""Models on a Hugging Face hub: what a repository holds, which of its files is meant, and getting it.

Downloads, caching and tokens (HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME) are huggingface-hub's. Taking up what an
ended process has left of a large file, and looking whether it is what it should be, is not (`_fetch_resumably`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.model_file.split import PartName, whole_models
from swaa_local.sources.checkpoint_files import checkpoint_files
from swaa_local.text.printable import printable
from swaa_local.text.units import format_bytes

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_RESUMABLE_BYTES = 10_000_000


class HubError(SWAAError):
    """The hub does not have it, does not give it, or cannot be reached."""


@dataclass(frozen=True)
class HubId:
    """`org/name`, with an optional revision and file: `org/name@revision:file.gguf`."""

    repo: str
    revision: str | None = None
    file: str | None = None
    """A path in the repository, or a weight type such as Q4_K_M that tells one of its GGUFs."""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class HubListing:
    """A repository's files with their sizes (None: not told), from the hub or from the local cache."""

    hub_id: HubId
    sizes: dict[str, int | None]
    cached_at: Path | None = None
    """The snapshot in the cache that was listed because the hub could not be asked."""


@dataclass(frozen=True)
class HubModel:
    """What is to be fetched: a GGUF, which may have several files, or the files of a checkpoint."""

    listing: HubListing
    gguf: str | None
    """The GGUF, or its first file; None for a checkpoint."""
    files: tuple[str, ...]

    @property
    def n_bytes(self) -> int | None:
        """Bytes of all files; None if the hub does not tell."""
        sizes = [self.listing.sizes[name] for name in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def size_text(self) -> str:
        """`n_bytes` for people."""
        return "an unknown number of bytes" if self.n_bytes is None else format_bytes(self.n_bytes)


def parse_hub_id(text: str) -> HubId | None:
    """A hub id, or None if the text cannot be one."""
    match = _ID.fullmatch(text)
    if match is None or match["repo"].startswith((".", "-")) or "/." in match["repo"]:
        return None
    return HubId(match["repo"], match["revision"], match["file"])


def list_repo(hub_id: HubId) -> HubListing:
    """Ask the hub what a repository holds; where it cannot be reached, the cached snapshot, if there is one."""
    from huggingface_hub import HfApi, constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise _offline(hub_id, "HF_HUB_OFFLINE is set")
        with _hub_errors(hub_id):
            info = HfApi().model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True)
    except _Unreachable:
        snapshot = cached_snapshot(hub_id)
        if snapshot is None:
            raise
        sizes: dict[str, int | None] = {
            path.relative_to(snapshot).as_posix(): path.stat().st_size for path in snapshot.rglob("*") if path.is_file()
        }
        return HubListing(hub_id, sizes, cached_at=snapshot)
    names = [file.rfilename for file in info.siblings or []]
    if odd := next((name for name in names if name != printable(name)), None):
        raise HubError(f"{hub_id} has a file with control characters in its name, {odd!r}, so none is downloaded")
    return HubListing(hub_id, {file.rfilename: file.size for file in info.siblings or []})


def choose(listing: HubListing, *, prefer_gguf: bool = False) -> HubModel:
    """Which files of a repository are meant. `HubError` lists the candidates where that is not clear.

    Without a file: the checkpoint if there is one, else the only GGUF. prefer_gguf: the other way round.
    """
    hub_id, names = listing.hub_id, list(listing.sizes)
    models = whole_models(name for name in names if name.endswith(".gguf") and not is_projector(name))
    if hub_id.file is not None:
        return _gguf(listing, *_one_gguf(hub_id, names, models))
    problem = None
    if not (prefer_gguf and models):
        files, problem = checkpoint_files(names)
        if files and problem is None:
            return HubModel(listing, None, files)
    if len(models) == 1:
        return _gguf(listing, *next(iter(models.items())))
    if models:
        raise HubError(
            f"{hub_id} holds {len(models)} GGUF models; name one, as in {hub_id.repo}:{next(iter(models))} or by its "
            f"type: {', '.join(models)}"
        )
    raise HubError(f"{hub_id} holds no GGUF file, and no checkpoint that can be converted: {problem}")


def is_projector(name: str) -> bool:
    """True for the part of a model that sees or hears, which is no model by itself."""
    return "mmproj" in PurePosixPath(name).name.lower()


def _gguf(listing: HubListing, first: str, files: tuple[str, ...]) -> HubModel:
    if missing := [name for name in files if name not in listing.sizes]:
        where = "the cache" if listing.cached_at else "the repository"
        raise HubError(f"{listing.hub_id.repo}: {first} has {len(files)} parts, and {where} lacks {', '.join(missing)}")
    return HubModel(listing, first, files)


def _one_gguf(hub_id: HubId, names: list[str], models: dict[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    wanted = hub_id.file or ""
    by_type = re.compile(rf"(^|[-._/]){re.escape(wanted)}(\.gguf$|[-._])", re.IGNORECASE)
    if part := PartName.parse(wanted):
        wanted = part.all[0]  # any part names the model
    found = [name for name in names if name == wanted]
    found = found or [name for name in models if PurePosixPath(name).name == wanted]
    found = found or [name for name in models if by_type.search(name)]
    if len(found) == 1 and found[0].endswith(".gguf"):
        return found[0], models.get(found[0], (found[0],))
    if found and not found[0].endswith(".gguf"):
        raise HubError(f"{hub_id}: {found[0]} is not a GGUF file; leave it out to convert the checkpoint")
    what = "matches several models" if found else "is not in the repository"
    listed = found or list(models)
    its = f"; its GGUF models are {', '.join(listed)}" if listed else "; it holds no GGUF files"
    raise HubError(f"{hub_id.repo}: {hub_id.file!r} {what}{its}")


def fetch(model: HubModel) -> Path:
    """Download what is missing and return the GGUF, or the checkpoint's directory, in the cache.

    An interrupted download of a large file is taken up where it stopped. Progress bars are huggingface-hub's, on a
    terminal only.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    hub_id = model.listing.hub_id
    if not sys.stderr.isatty():
        disable_progress_bars()
    if model.gguf is not None:
        paths = [fetch_file(hub_id, model.listing, name) for name in model.files]
        return paths[0]
    if model.listing.cached_at is not None:
        return model.listing.cached_at
    with _hub_errors(hub_id):
        for name in model.files:
            if (model.listing.sizes[name] or 0) >= _RESUMABLE_BYTES:
                _fetch_resumably(hub_id, name)
        patterns = [re.sub(r"([\[*?])", r"[\1]", name) for name in model.files]
        return Path(snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=patterns))


def fetch_file(
    hub_id: HubId,
    listing: HubListing,
    name: str,
    *,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """One file of a repository, in the cache or under `local_dir`; in the cache an interrupted download is resumed."""
    from huggingface_hub import hf_hub_download

    if listing.cached_at is not None and local_dir is None:
        return listing.cached_at / name
    with _hub_errors(hub_id):
        if local_dir is None and cache_dir is None and (listing.sizes.get(name) or 0) >= _RESUMABLE_BYTES:
            _fetch_resumably(hub_id, name)
        return Path(
            hf_hub_download(hub_id.repo, name, revision=hub_id.revision, local_dir=local_dir, cache_dir=cache_dir)
        )


def _fetch_resumably(hub_id: HubId, name: str) -> None:
    """Put a file's content where huggingface-hub's cache will find it, through a part file that survives Ctrl-C.

    huggingface-hub 2.4 resumes within one process only, and of what it got by HTTP it looks at the size and not at the
    hash. A download of 100 MiB that is stopped at 60 takes 100 more from it, by plain HTTP and by Xet (also with
    hf-xet's chunk cache), and 40 more from this. Can go when huggingface_hub's issue 4196 (no resuming) is mended.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if isinstance(try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision), str):
        return
    url = hf_hub_url(hub_id.repo, name, revision=hub_id.revision)
    about = get_hf_file_metadata(url)
    limit = getattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 50_000_000_000)
    if about.etag is None or about.size is None or about.size > limit:
        return  # not to be had by plain HTTP; huggingface-hub knows other ways
    blob = cache_folder(hub_id) / "blobs" / about.etag
    if blob.exists():
        return
    # huggingface-hub's own lock of this file, so that its downloads keep out too.
    lock = Path(constants.HF_HUB_CACHE, ".locks", blob.parent.parent.name, f"{about.etag}.lock")
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{about.etag}.swaa-local.incomplete")
    try:
        with FileLock(lock, timeout=0):
            with open(part, "ab") as file:
                done = file.tell()
                if done < about.size:
                    http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=about.size)
            _check_content(part, about.etag, about.size, f"{hub_id.repo}:{name}")
            os.replace(part, blob)
    except Timeout:
        raise HubError(f"{hub_id.repo}:{name} is being downloaded by another process; wait for it") from None


def _check_content(path: Path, etag: str, size: int, what: str) -> None:
    """A part file that was taken up again must be the whole file; the etag of a large file is its SHA-256."""
    from huggingface_hub.utils.sha import sha_fileobj

    is_whole = path.stat().st_size == size
    if is_whole and re.fullmatch(r"[0-9a-f]{64}", etag):
        with open(path, "rb") as file:
            is_whole = sha_fileobj(file).hex() == etag
    if not is_whole:
        path.unlink()
        raise HubError(f"the download of {what} is damaged and was thrown away; start it again")


def fetch_small_file(hub_id: HubId, listing: HubListing, name: str) -> Path:
    """A small file, such as config.json, in the cache; without a progress bar."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return fetch_file(hub_id, listing, name)
    finally:
        if not were_disabled:
            enable_progress_bars()


def cache_folder(hub_id: HubId) -> Path:
    """Where huggingface-hub keeps this repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub_id.repo, repo_type="model"))


def cached_snapshot(hub_id: HubId) -> Path | None:
    """The snapshot of this revision in the cache, complete or not; None if there is none."""
    folder, revision = cache_folder(hub_id), hub_id.revision or "main"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def cached_repos() -> Iterator[tuple[str, Path]]:
    """Repositories of models in the cache, each with its latest snapshot there."""
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
        snapshot = cached_snapshot(HubId(repo)) or max(snapshots, key=lambda path: path.stat().st_mtime, default=None)
        if snapshot is not None:
            yield repo, snapshot


class _Unreachable(HubError):
    """The hub could not be asked."""


def _offline(hub_id: HubId, why: str) -> _Unreachable:
    return _Unreachable(
        f"cannot ask the hub for {hub_id} ({why}), and it is not in the cache ({cache_folder(hub_id)}); "
        "go online, or name a local file or directory"
    )


@contextmanager
def _hub_errors(hub_id: HubId) -> Iterator[None]:
    """huggingface-hub's errors as sentences."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{hub_id.repo} is gated: accept its terms on its page at the hub, then log in (hf auth login) or set "
            "HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{hub_id.repo} has no revision {hub_id.revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{hub_id.repo} is not on the hub, or private: check the name, or log in (hf auth login) or set HF_TOKEN; "
            "it is no local file or directory either"
        ) from None
    except errors.HFValidationError as error:
        raise HubError(f"{hub_id.repo} is not a hub id: {error}") from None
    except errors.OfflineModeIsEnabled:
        raise _offline(hub_id, "HF_HUB_OFFLINE is set") from None
    except errors.LocalEntryNotFoundError as error:
        raise _offline(hub_id, _first_cause(error)) from None
    except errors.EntryNotFoundError as error:
        raise HubError(f"{hub_id}: {_one_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise HubError(f"the hub refused {hub_id}: {_one_line(error)}") from None
    except Exception as error:
        # What the HTTP client raises; which client it is depends on huggingface-hub's version.
        if type(error).__module__.partition(".")[0] in _HTTP_CLIENTS:
            raise _offline(hub_id, _one_line(error)) from None
        raise


def _first_cause(error: BaseException) -> str:
    cause: Any = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return _one_line(cause)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
