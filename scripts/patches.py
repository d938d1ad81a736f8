#!/usr/bin/env python3
"""Turn the series in patches/ into a git tree of upstream and back, so that a patch is edited as code.

    scripts/patches.py checkout DIR     upstream in DIR as one commit, and one commit per patch on top
    scripts/patches.py export DIR       write the commits on top of upstream back as patches/ and patches/series
    scripts/patches.py check            apply strictly, undo, and round-trip byte for byte
    scripts/patches.py try [VERSION]    say of each patch whether it applies to another release of upstream
    scripts/patches.py move DIR [VERSION]   checkout, and rebase the patches onto another release

A patch file is the commit's message (subject, blank line, paragraphs that begin with `What:`, `Why:`, `Tested by:` and
`Can go when:`), a line `---`, and the diff. Nothing in it depends on the machine, the date or git's configuration.

A patch changes upstream's files. A file that upstream does not have is our own and lies whole in patches/src/, under
its path in the tree. The patches that call it say so in their header, one line `Calls: src/PATH` for each file:

- `checkout` adds a file of our own, as it is at the end of the series, to the commit of the first patch that names it.
- `export` writes the files of our own as they are at the end of the tree and removes from patches/src/ what the tree no
  longer has: edit a file there or in the tree, not in both. The commit that adds a file gets its `Calls:` line. A
  commit that changes nothing but files of our own becomes no patch.
- `check` also names a file in patches/src/ that no patch calls, and a missing one that a patch does call.

`try` and `move` take the newest release that pip's index has, if it is newer than the pin, or VERSION, or --sdist FILE.

- `try` prints a line for each patch: `exact`; `offset` (the same lines, elsewhere); `merge` (lines beside them differ,
  git merges it); `made` (the release has the change); `conflict`, with files and the number of places in each. It ends
  with 0 if there is no conflict and 3 if there is one; 1 is an error. Without a newer release it says nothing.
- `move` stops at the first conflict, with 3: resolve it in DIR, and `git rebase --continue`. With `export` the release
  that DIR is made of becomes the pin: patches/upstream.toml, and the versions in both pyproject.toml (CONTRIBUTING.md).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from patch_move import Conflict, Fit, Tried, is_newer, start_move, stopped_at, try_series, write_pin
from patch_tree import PATCHES, check, checkout, export, missing_sections
from source_tree import DISTRIBUTION, SourceError, fetch_release, newest_version, own_files, pin_of, read_pin
from strict_diff import parse

CONFLICTS = 3


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, 1 with a sentence on stderr, or CONFLICTS."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "checkout":
            count = checkout(options.directory)
            print(f"{options.directory}: upstream and {count} commit(s)")
        elif options.command == "export":
            _export(options.directory, options.base)
        elif options.command == "check":
            count = check()
            files = len(own_files(PATCHES))
            print(f"{count} patch(es), {files} file(s) of our own: no fuzz, no offset, round trip byte for byte")
        else:
            with tempfile.TemporaryDirectory(prefix="swaa-release-") as tmp:
                sdist = _release(options.version, options.sdist, Path(tmp))
                if options.command == "move":
                    return _move(sdist, options.directory)
                return _try(sdist, Path(tmp)) if sdist else 0
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("checkout", help="make a git tree of upstream with one commit per patch")
    command.add_argument("directory", type=Path, metavar="DIR")
    command = commands.add_parser("export", help="write the tree's commits back as patches")
    command.add_argument("directory", type=Path, metavar="DIR")
    command.add_argument("--base", metavar="REV", help="upstream's commit (default: the root commit)")
    commands.add_parser("check", help="verify that the series applies strictly and round-trips")
    for name, what in (
        ("try", "say of each patch whether it applies to another release"),
        ("move", "make a git tree of another release with one commit per patch"),
    ):
        command = commands.add_parser(name, help=what)
        if name == "move":
            command.add_argument("directory", type=Path, metavar="DIR")
        which = command.add_mutually_exclusive_group()
        which.add_argument("version", nargs="?", metavar="VERSION", help="a release (default: the newest)")
        which.add_argument("--sdist", type=Path, metavar="FILE", help="its source archive, instead of a download")
    return parser


def _export(directory: Path, base: str | None) -> None:
    exported = export(directory, base=base)
    for subject in exported.absorbed:
        print(f"note: {subject!r} changes files of our own alone: no patch, its files are in src/", file=sys.stderr)
    for name in exported.patches:
        print(name)
        if missing := missing_sections(parse(name, (PATCHES / name).read_bytes())):
            print(f"note: the header of {name} lacks {', '.join(missing)}", file=sys.stderr)
    if exported.base and exported.base != read_pin():
        for path in write_pin(exported.base):
            print(f"note: {path} pins {DISTRIBUTION} {exported.base.version} now", file=sys.stderr)


def _release(version: str | None, sdist: Path | None, directory: Path) -> Path | None:
    """The source archive that is asked for; None: nobody asked for one, and none is newer than the pin."""
    if sdist:
        return sdist
    if version is None:
        version = newest_version()
        if not is_newer(version, read_pin().version):
            return None
    return fetch_release(version, directory)


def _try(sdist: Path, directory: Path) -> int:
    version = pin_of(sdist).version
    print(f"{DISTRIBUTION} {version}, and the series for {read_pin().version}")
    tried = try_series(sdist, directory / "tree")
    for one in tried:
        print(f"{one.fit.value:8}  {one.patch}{'  ' if one.conflicts else ''}{_list(one.conflicts)}")
    counts = Counter(one.fit for one in tried)
    print(", ".join(f"{counts[fit]} {fit.value}" for fit in Fit))
    failed: list[Tried] = [one for one in tried if one.fit is Fit.CONFLICT]
    if not failed:
        return 0
    first = failed[0]
    print(
        f"error: {len(failed)} of {len(tried)} patches conflict with {DISTRIBUTION} {version}; "
        f"the first is {first.patch}: {_list(first.conflicts)}",
        file=sys.stderr,
    )
    return CONFLICTS


def _move(sdist: Path | None, directory: Path) -> int:
    pinned = read_pin().version
    if not sdist:
        raise SourceError(f"there is no newer release than {DISTRIBUTION} {pinned}, which is pinned; name a version")
    version = pin_of(sdist).version
    if conflicts := start_move(sdist, directory):
        print(
            f"error: {stopped_at(directory)!r} conflicts with {DISTRIBUTION} {version} in {_list(conflicts)}; "
            f"resolve it in {directory}, then git add and git rebase --continue there, "
            f"and at the end scripts/patches.py export {directory}",
            file=sys.stderr,
        )
        return CONFLICTS
    print(f"{directory}: {DISTRIBUTION} {version} and the patches; scripts/patches.py export {directory} takes them")
    return 0


def _list(conflicts: tuple[Conflict, ...]) -> str:
    return ", ".join(map(str, conflicts))


if __name__ == "__main__":
    sys.exit(main())
