"""From the pin to a patched source tree: fetch upstream's sdist, verify it, unpack it, apply the series, add our files.

Files of our own lie whole in src/, under the path that they get in the tree; the header of a patch that calls one says
`Calls: src/PATH`, and the file comes with the first patch that does. One that no patch names stays out: a shorter
series is a tree without it.

Shared by the build backend and scripts/patches.py. Every failure is a SourceError, one sentence. It knows nothing about
compilers and wheels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pip_download import DownloadError, pip_download, pip_newest
from strict_diff import Patch, PatchError, apply, parse

HERE = Path(__file__).resolve().parent
SOURCES = "src"
CALLS = f"Calls: {SOURCES}/"
DISTRIBUTION = "llama-cpp-python"
SDIST_ENV = "SWAA_UPSTREAM_SDIST"


class SourceError(Exception):
    """One sentence that names the pin, the patch or the file."""


@dataclass(frozen=True)
class Pin:
    version: str
    sha256: str


def read_pin(directory: Path = HERE) -> Pin:
    """The upstream release that `directory`/upstream.toml pins."""
    path = directory / "upstream.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
        pin = Pin(str(data["version"]), str(data["sha256"]).lower())
    except (OSError, KeyError, ValueError) as error:
        raise SourceError(f"{path} does not pin upstream by version and sha256: {error}") from None
    if not re.fullmatch(r"[0-9a-f]{64}", pin.sha256):
        raise SourceError(f"the pin in {path} is no sha256: {pin.sha256!r}")
    return pin


def read_series(directory: Path = HERE) -> list[Patch]:
    """The patches in the order of `directory`/series; a patch beside it that it does not list is an error."""
    path = directory / "series"
    try:
        names = [line for raw in path.read_text("utf-8").splitlines() if (line := raw.split("#")[0].strip())]
    except OSError as error:
        raise SourceError(f"cannot read the series: {error}") from None
    present = {file.name for file in directory.glob("*.patch")}
    for name in names:
        if name not in present or names.count(name) > 1:
            raise SourceError(f"{path} lists {name} {'twice' if name in present else 'but there is no such patch'}")
    if unlisted := sorted(present - set(names)):
        raise SourceError(f"{path} does not list {unlisted[0]}")
    try:
        return [parse(name, (directory / name).read_bytes()) for name in names]
    except PatchError as error:
        raise SourceError(str(error)) from None


def fetch_sdist(pin: Pin, directory: Path) -> Path:
    """The verified sdist: the file that SWAA_UPSTREAM_SDIST names, or one that pip downloads into `directory`."""
    local = os.environ.get(SDIST_ENV)
    if local:
        sdist = Path(local)
        if not sdist.is_file():
            raise SourceError(f"{SDIST_ENV} names {local}, which is no file")
    else:
        sdist = _download(pin, directory)
    if (got := _sha256(sdist)) != pin.sha256:
        raise _wrong_checksum(pin, str(sdist), got)
    return sdist


def newest_version() -> str:
    """The newest release that the user's index has."""
    try:
        return pip_newest(DISTRIBUTION)
    except DownloadError as error:
        sys.stderr.write(error.log)
        raise SourceError(str(error)) from None


def fetch_release(version: str, directory: Path) -> Path:
    """The sdist of a release that nothing pins yet, downloaded by pip, which runs its code to ask for its metadata."""
    options = ["--no-binary", ":all:", f"{DISTRIBUTION}=={version}"]
    try:
        return pip_download(f"the sdist of {DISTRIBUTION} {version}", _without_isolation(options), directory)
    except DownloadError as error:
        sys.stderr.write(error.log)
        raise SourceError(str(error)) from None


def pin_of(sdist: Path) -> Pin:
    """What would pin this sdist, whose name says its version as all sdists' names do."""
    name = re.fullmatch(rf"{DISTRIBUTION.replace('-', '[-_]')}-(.+)\.tar\.gz", sdist.name)
    if not name or not sdist.is_file():
        what = "is no file" if name else f"is not called {DISTRIBUTION.replace('-', '_')}-VERSION.tar.gz"
        raise SourceError(f"{sdist} {what}; name a source archive of {DISTRIBUTION}")
    return Pin(name[1], _sha256(sdist))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _wrong_checksum(pin: Pin, what: str, got: str) -> SourceError:
    return SourceError(
        f"{what} does not match the pin of {DISTRIBUTION} {pin.version} in upstream.toml: "
        f"expected sha256 {pin.sha256}, got {got}"
    )


def _download(pin: Pin, directory: Path) -> Path:
    requirements = directory / "requirements.txt"
    # pip checks the hash before it runs any code of the sdist (it asks a downloaded sdist for its metadata)
    requirements.write_text(f"{DISTRIBUTION}=={pin.version} --hash=sha256:{pin.sha256}\n", "utf-8")
    options = ["--no-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    try:
        return pip_download(f"the sdist of {DISTRIBUTION} {pin.version}", _without_isolation(options), directory)
    except DownloadError as error:
        if mismatch := re.search(r"Got\s+([0-9a-f]{64})", error.log):
            raise _wrong_checksum(pin, "the sdist that pip downloaded", mismatch[1]) from None
        sys.stderr.write(error.log)
        raise SourceError(f"{error}, or set {SDIST_ENV} to a local copy") from None


def _without_isolation(options: list[str]) -> list[str]:
    """pip makes an environment for upstream's build backend, which is not needed where there is one."""
    return [*options, "--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else options


def unpack(sdist: Path, target: Path) -> None:
    """Unpack regular files below the sdist's one top folder into `target`; links and paths outside are refused.

    Upstream's sdist carries stray `.git` folders and files, which are left out.
    """
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
                    raise SourceError(f"{sdist.name} holds a path outside its folder: {member.name}")
                inner = path.parts[1:]
                if member.isdir() or not inner or ".git" in inner:
                    continue
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    raise SourceError(f"{sdist.name} holds something that is not a plain file: {member.name}")
                out = target.joinpath(*inner)
                out.parent.mkdir(parents=True, exist_ok=True)
                with content, out.open("wb") as file:
                    shutil.copyfileobj(content, file)
                out.chmod(0o755 if member.mode & 0o100 else 0o644)
                # as packed: generators compare times, and a new time for each build helps nobody
                os.utime(out, (member.mtime, member.mtime))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"cannot unpack {sdist}: {error}") from None


def apply_patch(patch: Patch, tree: Path) -> None:
    """Apply one patch to the tree, strictly."""
    try:
        apply(patch, tree)
    except PatchError as error:
        raise SourceError(str(error)) from None


def calls(header: str) -> list[str]:
    """The files of our own that a patch's header names, as paths in the tree."""
    return [line.removeprefix(CALLS).strip() for line in header.splitlines() if line.startswith(CALLS)]


def own_files(directory: Path = HERE) -> list[str]:
    """What lies in `directory`/src/, as sorted paths in the tree; anything but plain files is an error."""
    root = directory / SOURCES
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise SourceError(f"{path} is not a plain file")
        if path.is_file():
            found.append(path.relative_to(root).as_posix())
    return found


def own_files_by_patch(series: list[Patch], directory: Path = HERE) -> dict[str, list[str]]:
    """The name of each patch -> the files of our own that come with it: those that no patch before it calls."""
    present = set(own_files(directory))
    came: set[str] = set()
    result: dict[str, list[str]] = {}
    for patch in series:
        if overlap := sorted({file.path for file in patch.files} & present):
            raise SourceError(
                f"patch {patch.name} changes {overlap[0]}, a file of our own; edit {SOURCES}/{overlap[0]} instead"
            )
        named = calls(patch.header)
        for path in named:
            if path not in present:
                raise SourceError(f"patch {patch.name} calls {SOURCES}/{path}, but there is no such file")
        result[patch.name] = [path for path in dict.fromkeys(named) if path not in came]
        came.update(named)
    return result


def add_own_file(path: str, tree: Path, directory: Path = HERE) -> None:
    """Copy `directory`/src/`path` into the tree, where nothing may have its name."""
    target = tree / path
    if target.exists():
        raise SourceError(f"{SOURCES}/{path} has the name of a file of upstream's; rename it, or patch upstream's")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = directory / SOURCES / path
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def unpack_pinned(target: Path, directory: Path = HERE) -> None:
    """Upstream's pristine tree in `target`."""
    with tempfile.TemporaryDirectory(prefix="swaa-sdist-") as tmp:
        unpack(fetch_sdist(read_pin(directory), Path(tmp)), target)


def prepare(target: Path, directory: Path = HERE) -> None:
    """Upstream's tree in `target` with the series applied and our files added."""
    series = read_series(directory)
    own = own_files_by_patch(series, directory)
    unpack_pinned(target, directory)
    for patch in series:
        apply_patch(patch, target)
        for path in own[patch.name]:
            add_own_file(path, target, directory)
