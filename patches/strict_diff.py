"""Parse and apply unified diffs strictly: every hunk at its very line, every context line equal, or an error.

Needs neither git nor patch(1). Knows text files that are modified, created or deleted; renames, mode changes and binary
files are refused. It does not know where the patches or the tree come from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path, PurePosixPath

_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: .*)?\n$", re.DOTALL)
_FILE = re.compile(r"^diff --git a/(\S+) b/(\S+)$")
_NO_NEWLINE = b"\\ No newline at end of file\n"


class PatchError(Exception):
    """One sentence that names the patch, the file and the line."""


class Change(Enum):
    MODIFY = "modify"
    CREATE = "create"
    DELETE = "delete"


@dataclass(frozen=True)
class Hunk:
    """`old` and `new` are whole lines with their endings; starts are 1-based as in the diff."""

    old_start: int
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class FileDiff:
    path: str
    change: Change
    executable: bool
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """`header` is the text before the `---` line: the subject, a blank line, paragraphs."""

    name: str
    header: str
    files: tuple[FileDiff, ...]

    @property
    def subject(self) -> str:
        return self.header.split("\n", 1)[0]

    def reversed(self) -> Patch:
        """The patch that undoes this one."""
        swap = {Change.CREATE: Change.DELETE, Change.DELETE: Change.CREATE, Change.MODIFY: Change.MODIFY}
        files = (
            replace(
                file,
                change=swap[file.change],
                hunks=tuple(Hunk(h.new_start, h.old_start, h.new, h.old) for h in file.hunks),
            )
            for file in self.files
        )
        return replace(self, files=tuple(files))


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their endings; only LF ends a line, as in git."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


class _Lines:
    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.lines = split_lines(data)
        self.at = 0

    def peek(self) -> bytes | None:
        return self.lines[self.at] if self.at < len(self.lines) else None

    def take(self) -> bytes:
        line = self.peek()
        if line is None:
            raise self.error("it ends in the middle")
        self.at += 1
        return line

    def error(self, what: str) -> PatchError:
        return PatchError(f"patch {self.name} is damaged at its line {min(self.at + 1, len(self.lines))}: {what}")


def parse(name: str, data: bytes) -> Patch:
    """Read one patch file; PatchError where it is damaged or uses what is not supported."""
    lines = _Lines(name, data)
    header: list[str] = []
    while True:
        if lines.peek() is None:
            raise lines.error("no '---' line ends the header")
        line = lines.take()
        if line == b"---\n":
            break
        try:
            header.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise lines.error("the header is not UTF-8") from None
    files: list[FileDiff] = []
    while lines.peek() is not None:
        files.append(_parse_file(lines))
    if not files:
        raise lines.error("it changes no file")
    paths = [file.path for file in files]
    for path in paths:
        if paths.count(path) > 1:
            raise lines.error(f"it changes {path} twice")
    return Patch(name, "".join(header), tuple(files))


def _parse_file(lines: _Lines) -> FileDiff:
    line = lines.take().decode("utf-8", "replace").rstrip("\n")
    match = _FILE.match(line)
    if not match or match[1] != match[2]:
        raise lines.error(f"expected 'diff --git a/PATH b/PATH', found {line!r}")
    path = match[1]
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or ".git" in parts or "\\" in path or ":" in path:
        raise lines.error(f"{path} leaves the tree")
    change, executable = Change.MODIFY, False
    while (line_b := lines.peek()) is not None and not line_b.startswith((b"--- ", b"diff --git ")):
        extended = lines.take().decode("utf-8", "replace").rstrip("\n")
        if extended in ("new file mode 100644", "new file mode 100755"):
            change, executable = Change.CREATE, extended.endswith("755")
        elif extended in ("deleted file mode 100644", "deleted file mode 100755"):
            change, executable = Change.DELETE, extended.endswith("755")
        else:
            raise lines.error(f"{extended!r} is not supported")
    hunks: list[Hunk] = []
    if (line_b := lines.peek()) is not None and line_b.startswith(b"--- "):
        expected = (
            b"--- /dev/null\n" if change is Change.CREATE else f"--- a/{path}\n".encode(),
            b"+++ /dev/null\n" if change is Change.DELETE else f"+++ b/{path}\n".encode(),
        )
        for want in expected:
            if (got := lines.take()) != want:
                raise lines.error(f"expected {want.decode().rstrip()!r}, found {got.decode('utf-8', 'replace')!r}")
        while (line_b := lines.peek()) is not None and not line_b.startswith(b"diff --git "):
            hunks.append(_parse_hunk(lines))
    if change is Change.MODIFY and not hunks:
        raise lines.error(f"it changes nothing in {path}")
    return FileDiff(path, change, executable, tuple(hunks))


def _parse_hunk(lines: _Lines) -> Hunk:
    head = lines.take()
    match = _HUNK.match(head)
    if not match:
        raise lines.error(f"expected a hunk, found {head.decode('utf-8', 'replace').rstrip()!r}")
    old_start, new_start = int(match[1]), int(match[3])
    old_left, new_left = int(match[2] or 1), int(match[4] or 1)
    old: list[bytes] = []
    new: list[bytes] = []
    last = b""
    while old_left or new_left or lines.peek() == _NO_NEWLINE:
        line = lines.take()
        mark, text = line[:1], line[1:]
        if line == _NO_NEWLINE:
            sides = {b" ": (old, new), b"-": (old,), b"+": (new,)}.get(last, ())
            for side in sides:
                side[-1] = side[-1].removesuffix(b"\n")
            continue
        if mark not in (b" ", b"-", b"+") or not text.endswith(b"\n"):
            raise lines.error("the hunk is shorter than it says")
        if mark in (b" ", b"-"):
            old.append(text)
            old_left -= 1
        if mark in (b" ", b"+"):
            new.append(text)
            new_left -= 1
        if old_left < 0 or new_left < 0:
            raise lines.error("the hunk is longer than it says")
        last = mark
    return Hunk(old_start, new_start, tuple(old), tuple(new))


def apply(patch: Patch, root: Path) -> None:
    """Apply `patch` to the tree at `root`, whole or not at all; PatchError where a line differs."""
    results: list[tuple[Path, FileDiff, bytes | None]] = []
    for file in patch.files:
        target = root / file.path
        if file.change is Change.CREATE:
            if target.exists():
                raise PatchError(f"patch {patch.name} does not apply: {file.path}, which it creates, exists already")
            old = b""
        elif not target.is_file():
            raise PatchError(f"patch {patch.name} does not apply: there is no file {file.path}")
        else:
            old = target.read_bytes()
        new = _apply_hunks(patch, file, old)
        if file.change is Change.DELETE and new:
            raise PatchError(f"patch {patch.name} does not apply: {file.path}, which it deletes, holds more lines")
        results.append((target, file, None if file.change is Change.DELETE else new))
    for target, file, content in results:
        if content is None:
            target.unlink()
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        if file.change is Change.CREATE:
            target.chmod(0o755 if file.executable else 0o644)


def _apply_hunks(patch: Patch, file: FileDiff, old: bytes) -> bytes:
    source = split_lines(old)
    out: list[bytes] = []
    at = 0

    def fail(line: int, what: str) -> PatchError:
        return PatchError(f"patch {patch.name} does not apply at {file.path}:{line}: {what}")

    for hunk in file.hunks:
        # "-N,0" puts an insertion after line N
        start = hunk.old_start - 1 if hunk.old else hunk.old_start
        if start < at or start > len(source):
            raise fail(hunk.old_start, f"the file has {len(source)} lines")
        out += source[at:start]
        if len(out) != (hunk.new_start - 1 if hunk.new else hunk.new_start):
            raise fail(hunk.old_start, f"the hunk says +{hunk.new_start}, but it lands on line {len(out) + 1}")
        for i, want in enumerate(hunk.old):
            got = source[start + i] if start + i < len(source) else None
            if got != want:
                raise fail(start + i + 1, f"expected {_show(want)}, found {_show(got)}")
        out += hunk.new
        at = start + len(hunk.old)
    return b"".join([*out, *source[at:]])


def _show(line: bytes | None) -> str:
    return "the end of the file" if line is None else repr(line.decode("utf-8", "replace").rstrip("\n"))
