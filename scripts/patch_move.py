"""The series on another release of upstream: which patches apply there, and the tree in which they are moved.

What `scripts/patches.py try` and `move` run. Both work on a tree that has both releases as commits without a parent, so
that git merges what no longer fits. Every failure is a SourceError, one sentence. It does not know whether what
applies also compiles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from patch_tree import BRANCH, PATCHES, checkout, commit_release, git
from source_tree import (
    DISTRIBUTION,
    Pin,
    SourceError,
    add_own_file,
    apply_patch,
    own_files_by_patch,
    pin_of,
    read_pin,
    read_series,
    unpack,
)
from strict_diff import Patch

RELEASE = "release"


class Fit(Enum):
    """How a patch goes onto another release."""

    EXACT = "exact"  # at its very lines
    OFFSET = "offset"  # at other lines, which are the same
    MERGE = "merge"  # lines beside its own differ, and git can tell what is meant
    MADE = "made"  # the release has the change
    CONFLICT = "conflict"  # somebody has to say what is meant


@dataclass(frozen=True)
class Conflict:
    """places: how many in this file, 0 if one side has no such file."""

    path: str
    places: int

    def __str__(self) -> str:
        return f"{self.path} ({self.places or 'a file that one side lacks'})"


@dataclass(frozen=True)
class Tried:
    patch: str
    fit: Fit
    conflicts: tuple[Conflict, ...] = ()


def is_newer(version: str, than: str) -> bool:
    """Compare releases by their numbers."""
    return [int(part) for part in re.findall(r"\d+", version)] > [int(part) for part in re.findall(r"\d+", than)]


def add_release(tree: Path, sdist: Path) -> Pin:
    """Commit the release in `sdist` to `tree`, without a parent, as the branch RELEASE, and leave that checked out."""
    pin = pin_of(sdist)
    git(tree, "checkout", "--quiet", "--orphan", RELEASE)
    git(tree, "rm", "-r", "--quiet", "--force", ".")
    unpack(sdist, tree)
    commit_release(tree, pin)
    return pin


def try_series(sdist: Path, tree: Path, patches: Path = PATCHES) -> list[Tried]:
    """Put each patch onto the release in `sdist`, in `tree`, an empty folder.

    A conflict is resolved as the patch has it, so that what comes after is judged by itself: there may be more
    conflicts where it is resolved otherwise.
    """
    series = read_series(patches)
    own = own_files_by_patch(series, patches)
    checkout(tree, patches)
    commits = git(tree, "rev-list", "--reverse", BRANCH).split()[1:]
    add_release(tree, sdist)
    tried = []
    for patch, commit in zip(series, commits, strict=True):
        if _apply(patch, own[patch.name], tree, patches):
            git(tree, "add", "--all", "--force")
            git(tree, "commit", "--quiet", "--no-verify", "--allow-empty", f"--reuse-message={commit}")
            tried.append(Tried(patch.name, Fit.EXACT))
        else:
            tried.append(_merge(patch.name, commit, tree))
    return tried


def _apply(patch: Patch, own: list[str], tree: Path, patches: Path) -> bool:
    """Apply at the very lines, or leave the tree as it is."""
    if any((tree / path).exists() for path in own):
        return False
    try:
        apply_patch(patch, tree)
    except SourceError:
        return False
    for path in own:
        add_own_file(path, tree, patches)
    return True


def _merge(name: str, commit: str, tree: Path) -> Tried:
    diff = git(tree, "diff-tree", "--patch", "--binary", "--no-commit-id", commit)
    same_lines = _succeeds(tree, "apply", "--check", "-", stdin=diff)
    pick = ("cherry-pick", "--keep-redundant-commits", "--allow-empty")
    if _succeeds(tree, *pick, commit):
        made = not git(tree, "diff", "--name-only", "HEAD~", "HEAD")
        return Tried(name, Fit.MADE if made else Fit.OFFSET if same_lines else Fit.MERGE)
    conflicts = unmerged(tree)
    git(tree, "cherry-pick", "--abort")
    if not _succeeds(tree, *pick, "--strategy-option=theirs", commit):
        for path in (conflict.path for conflict in unmerged(tree)):
            # a file that one side deleted
            if not _succeeds(tree, "checkout", "--theirs", "--", path):
                (tree / path).unlink(missing_ok=True)
        git(tree, "add", "--all", "--force")
        git(tree, "commit", "--quiet", "--no-verify", "--allow-empty", f"--reuse-message={commit}")
    return Tried(name, Fit.CONFLICT, conflicts)


def unmerged(tree: Path) -> tuple[Conflict, ...]:
    """Where the work tree has conflicts now; at least one, or SourceError: git has stopped for another reason."""
    paths = [path for path in git(tree, "diff", "--name-only", "--diff-filter=U", "-z").split("\0") if path]
    if not paths:
        raise SourceError(f"git stopped in {tree} without a conflict; look at git status there")
    return tuple(Conflict(path, _places(tree / path)) for path in sorted(set(paths)))


def _places(path: Path) -> int:
    return len(re.findall(rb"^<<<<<<< ", path.read_bytes(), re.MULTILINE)) if path.is_file() else 0


def _succeeds(tree: Path, *arguments: str, stdin: str | None = None) -> bool:
    try:
        git(tree, *arguments, stdin=stdin)
    except SourceError:
        return False
    return True


def start_move(sdist: Path, tree: Path, patches: Path = PATCHES) -> tuple[Conflict, ...]:
    """Make `tree` with the series on its own release, and rebase it onto the one in `sdist`.

    Returns where it stopped, nothing if the series is there. git goes on from then on (`git rebase --continue`).
    """
    checkout(tree, patches)
    old = git(tree, "rev-list", "--max-parents=0", BRANCH).strip()
    add_release(tree, sdist)
    settings = {
        # for those who have told git nothing of themselves; export drops names and dates
        "user.name": "swaa-local",
        "user.email": "swaa-local@localhost",
        "merge.conflictStyle": "diff3",  # shows what the patch was made for
        "rerere.enabled": "true",  # a rebase that is begun again resolves what was resolved before
        "core.autocrlf": "false",
    }
    for key, value in settings.items():
        git(tree, "config", key, value)
    if _succeeds(tree, "rebase", "--quiet", "--onto", RELEASE, old, BRANCH):
        return ()
    return unmerged(tree)


def stopped_at(tree: Path) -> str:
    """The subject of the commit that a rebase stopped at."""
    return git(tree, "log", "-1", "--format=%s", "REBASE_HEAD").strip()


def write_pin(pin: Pin, patches: Path = PATCHES) -> list[Path]:
    """Pin this release where another is pinned; returns the files that changed."""
    old = re.escape(read_pin(patches).version)
    texts: dict[Path, str] = {}
    for path, pattern, line in (
        (patches / "upstream.toml", rf'^version = "{old}"$', f'version = "{pin.version}"'),
        (patches / "upstream.toml", r'^sha256 = "[0-9a-fA-F]{64}"$', f'sha256 = "{pin.sha256}"'),
        (patches / "pyproject.toml", rf'^version = "{old}\+', f'version = "{pin.version}+'),
        (patches.parent / "pyproject.toml", rf'"{DISTRIBUTION}=={old}"', f'"{DISTRIBUTION}=={pin.version}"'),
    ):
        text = texts[path] if path in texts else path.read_text("utf-8")
        texts[path], count = re.subn(pattern, line, text, flags=re.MULTILINE)
        if count != 1:
            raise SourceError(
                f"{path} has {count} lines that match {pattern}, and one was expected; write the pin there"
            )
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    return list(texts)
