"""A file of JSON objects, one a line, that a stopped program continues: what was written is never done again.

The first line, of kind `config`, says what all others depend on. A line is written whole or, if the program dies in it,
cut off when the file is opened again. Knows files; what the other lines mean, its users know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from swaa_local.errors import SWAAError


class JsonLog:
    """Opens or begins such a file. Use as a context manager.

    config: must be what the file was begun with. on_row: takes each line's kind and its other fields; it raises
    ValueError, KeyError, TypeError or AttributeError for what it does not know. what: such a file's name for messages.
    remedy: what to do with a file that does not fit, the cheapest way first. error: of which class errors are.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        format: int,
        on_row: Callable[[str, dict[str, Any]], None],
        what: str,
        remedy: str,
        error: type[SWAAError] = SWAAError,
    ) -> None:
        self.path = path
        self._format, self._what, self._remedy, self._error = format, what, remedy, error
        self._file = self._open()
        try:
            begun = self._read(on_row)
            if begun is not None:
                self._check(begun, config)
            # Written with the first line behind it, so that what goes wrong before leaves no file.
            self._unwritten = None if begun is not None else {"kind": "config", "format": format} | dict(config)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file; one that has nothing in it goes away."""
        if self._unwritten is not None:
            self.path.unlink()
        self._file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Add a line."""
        self._write({"kind": kind} | dict(fields))

    def _open(self) -> IO[bytes]:
        if self.path.exists() and not self.path.is_file():
            raise self._error(f"{self.path} is not a regular file; {self._remedy}")
        try:
            file = self.path.open("a+b")
        except OSError as error:
            raise self._error(f"{self.path}: {error.strerror}") from None
        if not _lock(file):
            file.close()
            raise self._error(f"{self.path} is in use by another run; wait for it, or {self._remedy.split(',')[0]}")
        return file

    def _read(self, on_row: Callable[[str, dict[str, Any]], None]) -> dict[str, Any] | None:
        self._file.seek(0)
        config: dict[str, Any] | None = None
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                kind = row.pop("kind")
                if number == 1:
                    if kind != "config":
                        raise KeyError
                    config = row
                else:
                    on_row(kind, row)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._error(f"{self.path} line {number} is not of {self._what}; {self._remedy}") from None
        if config is None and whole == 0 and self._file.seek(0, os.SEEK_END) > 0 and not self._is_ours():
            raise self._error(f"{self.path} is not {self._what}; {self._remedy}")
        self._file.truncate(whole)
        return config

    def _is_ours(self) -> bool:
        """True for the beginning of a first line that the program died in."""
        self._file.seek(0)
        ours = b'{"kind": "config", "format": '
        begun = self._file.read(len(ours))
        return ours.startswith(begun)

    def _check(self, begun: dict[str, Any], config: Mapping[str, Any]) -> None:
        if begun.get("format") != self._format:
            raise self._error(
                f"{self.path} has format {begun.get('format')}, and this is {self._format}; {self._remedy}"
            )
        wanted = json.loads(json.dumps(dict(config)))
        differing = [
            f"{name} was {_short(begun.get(name))} and is now {_short(wanted.get(name))}"
            for name in {**begun, **wanted}
            if name != "format" and begun.get(name) != wanted.get(name)
        ]
        if differing:
            raise self._error(f"{self.path} is of another configuration: {'; '.join(differing)}; {self._remedy}")

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._unwritten is not None:
            first, self._unwritten = self._unwritten, None
            self._write(first)
        self._file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) > 40 else text


def _lock(file: IO[bytes]) -> bool:
    """Keep others from writing until the file is closed; True where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
