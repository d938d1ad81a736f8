"""Standard streams as a program may find them: closed, full, with nobody at the other end, or in another encoding.

Knows file descriptors; nothing of commands.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

from swaa_local.errors import SWAAError

_STDIN, _STDOUT, _STDERR = range(3)


class OutputClosed(SWAAError):
    """Standard output is closed, and what was asked for would go there."""


class _Results(io.FileIO):
    """Its errors name it, as those of files do."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


class _Notes(io.FileIO):
    """Takes what cannot be written as written: no work ends for a note on a full disk or a terminal that is gone.

    Nobody at the other end of a pipe is still an error: there it means that the program should stop.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            return len(data)


def prepare() -> None:
    """Make the three streams safe to use, once, before anything is opened.

    A closed descriptor would be given to the next file that is opened, and what libraries print would land in it. So a
    closed stdin becomes an empty one, a closed stderr drops what it gets, and writing to a closed stdout stays an
    error. No character is an error: what a stream's encoding lacks is escaped, as Python does on stderr, and bytes of
    stdin that are no text become surrogates, as in the arguments.
    """
    for number, mode in ((_STDIN, os.O_RDONLY), (_STDOUT, os.O_RDONLY), (_STDERR, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(_STDIN, encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout = _text(_Results(_STDOUT, "w", closefd=False), like=sys.stdout)
    sys.stderr = _text(_Notes(_STDERR, "w", closefd=False), like=sys.stderr)


def _text(raw: io.FileIO, like: TextIO | None) -> io.TextIOWrapper:
    """A text stream in the encoding of Python's own; line by line on stderr and on terminals."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.fileno() == _STDERR or raw.isatty(),
    )


def need_stdout() -> None:
    """Raise `OutputClosed` if nothing can be written to stdout, before work that would be for nothing."""
    if not stdout_is_open():
        raise OutputClosed(
            "standard output is closed, and the result would go there; send it to a file, or to /dev/null"
        )


def stdout_is_open() -> bool:
    """Whether stdout was there when the program started."""
    import fcntl

    return fcntl.fcntl(_STDOUT, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def finish() -> None:
    """Write what is held back; where that cannot be done, drop it, so that Python's own flush at exit is quiet."""
    for stream, number in ((sys.stdout, _STDOUT), (sys.stderr, _STDERR)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
