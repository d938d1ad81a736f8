"""The series in patches/ as a git tree of upstream, one commit for each patch, and back. What scripts/patches.py runs.

Every failure is a SourceError, one sentence. It knows nothing of other releases than the one it is told.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
sys.path.insert(0, str(PATCHES))

from source_tree import (  # noqa: E402
    CALLS,
    DISTRIBUTION,
    SOURCES,
    Pin,
    SourceError,
    add_own_file,
    apply_patch,
    calls,
    own_files,
    own_files_by_patch,
    read_pin,
    read_series,
    unpack_pinned,
)
from strict_diff import Patch, PatchError, parse  # noqa: E402

BRANCH = "swaa"
SECTIONS = ("What:", "Why:", "Tested by:", "Can go when:")
_DIFF_OPTIONS = (
    "--patch --unified=3 --inter-hunk-context=0 --no-renames --no-color --no-ext-diff --no-textconv --text "
    "--diff-algorithm=myers --indent-heuristic --src-prefix=a/ --dst-prefix=b/ --no-relative"
)


def git(tree: Path, *arguments: str, stdin: str | None = None) -> str:
    """Run git in `tree`, deaf to the user's and the machine's configuration; SourceError with git's own words."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", GIT_ATTR_NOSYSTEM="1", LC_ALL="C")
    for role in ("AUTHOR", "COMMITTER"):
        env[f"GIT_{role}_NAME"] = "swaa-local"
        env[f"GIT_{role}_EMAIL"] = "swaa-local@localhost"
        env[f"GIT_{role}_DATE"] = "2000-01-01T00:00:00+0000"
    command = ["git", "-c", "core.autocrlf=false", "-c", "core.quotePath=false", "-C", str(tree), *arguments]
    try:
        sent = (stdin or "").encode("utf-8", "surrogateescape")
        run = subprocess.run(command, env=env, input=sent, capture_output=True)
    except FileNotFoundError:
        raise SourceError("git is needed to turn the series into a tree and back; install git") from None
    if run.returncode:
        said = run.stderr.decode("utf-8", "replace").strip().splitlines()
        raise SourceError(f"git {arguments[0]} failed in {tree}: {said[-1] if said else run.returncode}")
    # surrogateescape: upstream's sources hold a few bytes that are no UTF-8
    return run.stdout.decode("utf-8", "surrogateescape")


def checkout(directory: Path, patches: Path = PATCHES) -> int:
    """Make the git tree; returns the number of patches."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SourceError(f"{directory} exists and is not an empty folder; choose another")
    series = read_series(patches)
    own = own_files_by_patch(series, patches)
    directory.mkdir(parents=True, exist_ok=True)
    unpack_pinned(directory, patches)
    git(directory, "init", "--quiet", f"--initial-branch={BRANCH}")
    commit_release(directory, read_pin(patches))
    for patch in series:
        apply_patch(patch, directory)
        for path in own[patch.name]:
            add_own_file(path, directory, patches)
        git(directory, "add", "--all", "--force", "--", *(file.path for file in patch.files), *own[patch.name])
        git(directory, "commit", "--quiet", "--no-verify", "--cleanup=verbatim", "--file=-", stdin=patch.header)
    return len(series)


def commit_release(directory: Path, pin: Pin) -> None:
    """Commit what was unpacked in `directory` as the release that `pin` is about."""
    git(directory, "add", "--all", "--force")
    message = f"{DISTRIBUTION} {pin.version}\n\nsha256: {pin.sha256}\n"
    git(directory, "commit", "--quiet", "--no-verify", "--file=-", stdin=message)


def committed_release(tree: Path, commit: str) -> Pin | None:
    """The release that `commit_release` made this commit of, None if it is some other commit."""
    message = git(tree, "log", "-1", "--format=%B", commit)
    match = re.fullmatch(rf"{DISTRIBUTION} (\S+)\n\nsha256: ([0-9a-f]{{64}})\n+", message)
    return Pin(match[1], match[2]) if match else None


@dataclass(frozen=True)
class Exported:
    """patches: the names of the series. absorbed: the subjects of the commits that changed files of our own alone.

    base: the release below them, None where its commit does not say.
    """

    patches: list[str]
    absorbed: list[str]
    base: Pin | None


def export(tree: Path, patches: Path = PATCHES, base: str | None = None) -> Exported:
    """Write the commits after `base` (the root commit) as patches, and our own files as they are at their end."""
    if git(tree, "status", "--porcelain", "--untracked-files=no"):
        raise SourceError(f"{tree} has changes that are not committed; commit them, or amend the commit they belong to")
    if base is None:
        roots = git(tree, "rev-list", "--max-parents=0", "HEAD").split()
        if len(roots) != 1:
            raise SourceError(f"{tree} has {len(roots)} root commits; name upstream's with --base")
        base = roots[0]
    upstream = set(git(tree, "ls-tree", "-r", "-z", "--name-only", base).split("\0"))
    own = own_modes(tree, upstream)
    commits = git(tree, "rev-list", "--reverse", f"{base}..HEAD").split()
    files: dict[str, bytes] = {}
    absorbed: list[str] = []
    named: set[str] = set()
    for commit in commits:
        if len(git(tree, "rev-list", "--parents", "-n1", commit).split()) != 2:
            raise SourceError(f"{commit[:12]} is a merge; the series is a straight line of commits")
        header = git(tree, "log", "-1", "--format=%B", commit).strip("\n") + "\n"
        subject = header.split("\n", 1)[0]
        if subject.startswith(("fixup!", "squash!", "amend!")):
            raise SourceError(f"the commit {subject!r} waits to be squashed: git rebase -i --autosquash")
        diff = of_upstream(git(tree, "diff-tree", *_DIFF_OPTIONS.split(), "--no-commit-id", commit), upstream)
        names = ("diff-tree", "-r", "-z", "--no-renames", "--name-only", "--no-commit-id")
        added = git(tree, *names, "--diff-filter=A", commit).split("\0")
        brings = [path for path in sorted(added) if path in own and path not in named]
        if not diff and git(tree, *names, commit):
            if brings:
                raise SourceError(
                    f"the commit {subject!r} adds {brings[0]} and changes no file of upstream's; "
                    "squash it into the commit that calls the file"
                )
            absorbed.append(subject)
            continue
        for path in calls(header):
            if path not in own:
                raise SourceError(f"the commit {subject!r} calls {SOURCES}/{path}, but the tree ends without that file")
        named.update(calls(header))
        if unnamed := [path for path in brings if path not in named]:
            header += ("" if calls(header) else "\n") + "".join(f"{CALLS}{path}\n" for path in unnamed)
            named.update(unnamed)
        name = f"{len(files) + 1:04d}-{slug(subject)}.patch"
        # index lines carry abbreviated hashes whose length grows with the repository
        diff = re.sub(r"(?m)(^diff --git .*\n(?:(?:new|deleted) file mode \d+\n)?)index .*\n", r"\1", diff)
        files[name] = f"{header}\n---\n{diff}".encode("utf-8", "surrogateescape")
        try:
            parse(name, files[name])
        except PatchError as error:
            raise SourceError(f"the commit {subject!r} cannot be a patch: {error}") from None
    sources = {path: git(tree, "cat-file", "blob", f"HEAD:{path}").encode("utf-8", "surrogateescape") for path in own}
    for old in patches.glob("*.patch"):
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        (patches / name).write_bytes(content)
    (patches / "series").write_text("".join(f"{name}\n" for name in files), "utf-8")
    write_own_files(patches / SOURCES, sources, own)
    return Exported(list(files), absorbed, committed_release(tree, base))


def own_modes(tree: Path, upstream: set[str]) -> dict[str, int]:
    """The files that HEAD has and `upstream` has not -> 0o644 or 0o755."""
    own = {}
    for entry in filter(None, git(tree, "ls-tree", "-r", "-z", "HEAD").split("\0")):
        about, path = entry.split("\t", 1)
        if path not in upstream:
            mode = about.split()[0]
            if mode not in ("100644", "100755"):
                raise SourceError(f"{path} in {tree} is not a plain file")
            own[path] = int(mode[-3:], 8)
    return own


def of_upstream(diff: str, upstream: set[str]) -> str:
    """The part of a diff that is about upstream's files."""
    # no line of a hunk begins so
    parts = re.split(r"(?m)^(?=diff --git )", diff)
    ours = re.compile(r"diff --git a/(.*) b/\1\n")
    return "".join(part for part in parts if not (match := ours.match(part)) or match[1] in upstream)


def write_own_files(directory: Path, contents: dict[str, bytes], modes: dict[str, int]) -> None:
    """Make `directory` hold these files and no other."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in contents:
            path.unlink()
    for name, content in contents.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(modes[name])


def slug(subject: str) -> str:
    """`llama: add the SWAA schedule` -> `llama-add-the-swaa-schedule`, cut at a word."""
    words = re.findall(r"[a-z0-9]+", subject.lower())
    text = words[0] if words else "patch"
    for word in words[1:]:
        if len(text) + 1 + len(word) > 50:
            break
        text += f"-{word}"
    return text


def missing_sections(patch: Patch) -> list[str]:
    """The header's parts that a patch lacks: a subject apart from the body, and the four paragraphs."""
    lines = patch.header.split("\n")
    missing = [] if len(lines) > 2 and lines[0].strip() and not lines[1] else ["a subject line"]
    return missing + [section for section in SECTIONS if not any(line.startswith(section) for line in lines)]


def check(patches: Path = PATCHES) -> int:
    """Verify the series; returns the number of patches. SourceError names the first thing that is wrong."""
    series = read_series(patches)
    for patch in series:
        if missing := missing_sections(patch):
            raise SourceError(f"the header of {patch.name} lacks {', '.join(missing)}")
    own = own_files(patches)
    brought = {path for paths in own_files_by_patch(series, patches).values() for path in paths}
    if unnamed := [path for path in own if path not in brought]:
        raise SourceError(f"no patch says '{CALLS}{unnamed[0]}' in its header; name the file, or remove it")
    with tempfile.TemporaryDirectory(prefix="swaa-check-") as tmp:
        tree, back = Path(tmp, "tree"), Path(tmp, "patches")
        checkout(tree, patches)
        back.mkdir()
        export(tree, back)
        for name in ["series", *(patch.name for patch in series)]:
            ours, theirs = (patches / name).read_bytes(), back / name
            if not theirs.exists() or theirs.read_bytes() != ours:
                raise SourceError(f"{name} does not survive checkout and export unchanged; export it again")
        if own_files(back) != own or any(identity(patches, path) != identity(back, path) for path in own):
            raise SourceError(f"{SOURCES}/ does not survive checkout and export unchanged")
        for path in own:
            (tree / path).unlink()
        for patch in reversed(series):
            apply_patch(patch.reversed(), tree)
        root = git(tree, "rev-list", "--max-parents=0", "HEAD").strip()
        git(tree, "add", "--all", "--force")
        if changed := git(tree, "diff", "--cached", "--name-only", root).split():
            raise SourceError(f"undoing the series does not give back upstream's {changed[0]}")
    return len(series)


def identity(patches: Path, path: str) -> tuple[bytes, bool]:
    """A file of our own: its content, and whether it can be run."""
    file = patches / SOURCES / path
    return file.read_bytes(), bool(file.stat().st_mode & 0o100)
