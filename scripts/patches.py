#!/usr/bin/env python3
"""Turn the series in patches/ into a git tree of upstream and back, so that a patch is edited as code.

    scripts/patches.py checkout DIR     upstream in DIR as one commit, and one commit per patch on top
    scripts/patches.py export DIR       write the commits on top of upstream back as patches/ and patches/series
    scripts/patches.py check            apply strictly, undo, and round-trip byte for byte

A patch file is the commit's message (subject, blank line, paragraphs that begin with `What:`, `Why:`, `Tested by:` and
`Can go when:`), a line `---`, and the diff. Nothing in it depends on the machine, the date or git's configuration.
To move to a new upstream: change patches/upstream.toml, `checkout` the new tree with an empty series, rebase the
commits of the old tree onto it, and `export`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
sys.path.insert(0, str(PATCHES))

from source_tree import DISTRIBUTION, SourceError, apply_patch, read_pin, read_series, unpack_pinned  # noqa: E402
from strict_diff import Patch, PatchError, parse  # noqa: E402

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
        run = subprocess.run(command, env=env, input=(stdin or "").encode(), capture_output=True)
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
    directory.mkdir(parents=True, exist_ok=True)
    unpack_pinned(directory, patches)
    git(directory, "init", "--quiet", "--initial-branch=swaa")
    git(directory, "add", "--all", "--force")
    git(directory, "commit", "--quiet", "--no-verify", "-m", f"{DISTRIBUTION} {read_pin(patches).version}")
    for patch in series:
        apply_patch(patch, directory)
        git(directory, "add", "--all", "--force", "--", *(file.path for file in patch.files))
        git(directory, "commit", "--quiet", "--no-verify", "--cleanup=verbatim", "--file=-", stdin=patch.header)
    return len(series)


def export(tree: Path, patches: Path = PATCHES, base: str | None = None) -> list[str]:
    """Write the commits after `base` (the root commit) as patches; returns their file names."""
    if git(tree, "status", "--porcelain", "--untracked-files=no"):
        raise SourceError(f"{tree} has changes that are not committed; commit them, or amend the commit they belong to")
    if base is None:
        roots = git(tree, "rev-list", "--max-parents=0", "HEAD").split()
        if len(roots) != 1:
            raise SourceError(f"{tree} has {len(roots)} root commits; name upstream's with --base")
        base = roots[0]
    commits = git(tree, "rev-list", "--reverse", f"{base}..HEAD").split()
    files: dict[str, bytes] = {}
    for number, commit in enumerate(commits, 1):
        if len(git(tree, "rev-list", "--parents", "-n1", commit).split()) != 2:
            raise SourceError(f"{commit[:12]} is a merge; the series is a straight line of commits")
        header = git(tree, "log", "-1", "--format=%B", commit).strip("\n") + "\n"
        subject = header.split("\n", 1)[0]
        if subject.startswith(("fixup!", "squash!", "amend!")):
            raise SourceError(f"the commit {subject!r} waits to be squashed: git rebase -i --autosquash")
        diff = git(tree, "diff-tree", *_DIFF_OPTIONS.split(), "--no-commit-id", commit)
        name = f"{number:04d}-{slug(subject)}.patch"
        # index lines carry abbreviated hashes whose length grows with the repository
        diff = re.sub(r"(?m)(^diff --git .*\n(?:(?:new|deleted) file mode \d+\n)?)index .*\n", r"\1", diff)
        files[name] = f"{header}\n---\n{diff}".encode("utf-8", "surrogateescape")
        try:
            parse(name, files[name])
        except PatchError as error:
            raise SourceError(f"the commit {subject!r} cannot be a patch: {error}") from None
    for old in patches.glob("*.patch"):
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        (patches / name).write_bytes(content)
    (patches / "series").write_text("".join(f"{name}\n" for name in files), "utf-8")
    return list(files)


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
    with tempfile.TemporaryDirectory(prefix="swaa-check-") as tmp:
        tree, back = Path(tmp, "tree"), Path(tmp, "patches")
        checkout(tree, patches)
        back.mkdir()
        export(tree, back)
        for name in ["series", *(patch.name for patch in series)]:
            ours, theirs = (patches / name).read_bytes(), back / name
            if not theirs.exists() or theirs.read_bytes() != ours:
                raise SourceError(f"{name} does not survive checkout and export unchanged; export it again")
        for patch in reversed(series):
            apply_patch(patch.reversed(), tree)
        root = git(tree, "rev-list", "--max-parents=0", "HEAD").strip()
        git(tree, "add", "--all", "--force")
        if changed := git(tree, "diff", "--cached", "--name-only", root).split():
            raise SourceError(f"undoing the series does not give back upstream's {changed[0]}")
    return len(series)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with a sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("checkout", help="make a git tree of upstream with one commit per patch")
    command.add_argument("directory", type=Path, metavar="DIR")
    command = commands.add_parser("export", help="write the tree's commits back as patches")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--base", metavar="REV", help="upstream's commit (default: the root commit)")
    commands.add_parser("check", help="verify that the series applies strictly and round-trips")
    options = parser.parse_args(arguments)
    try:
        if options.command == "checkout":
            count = checkout(options.directory)
            print(f"{options.directory}: upstream and {count} commit(s)")
        elif options.command == "export":
            for name in export(options.directory, base=options.base):
                print(name)
                if missing := missing_sections(parse(name, (PATCHES / name).read_bytes())):
                    print(f"note: the header of {name} lacks {', '.join(missing)}", file=sys.stderr)
        else:
            print(f"{check()} patch(es): no fuzz, no offset, round trip byte for byte")
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
