"""The API keys of a server, read in one place: from a file and from the environment, as people write them.

The server gets what was read here, and never reads the file itself, so that both know the same keys.
"""

from __future__ import annotations

import contextlib
import csv
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from swaa_local.errors import SWAAError
from swaa_local.files.input_file import InputTooLarge, read_input

_MAX_BYTES = 1 << 20


class KeyFileError(SWAAError):
    """The keys cannot be read, or cannot be sent in a request. No message shows a key."""


def keys_of_file(path: Path) -> tuple[str, ...]:
    """One key a line; blanks around it, a byte order mark, any line ends, and lines that begin with # do not count.

    Raises `KeyFileError`, also where there is no key at all.
    """
    try:
        text = read_input(path, str(path), most=_MAX_BYTES).decode("utf-8-sig")
    except InputTooLarge as error:
        raise KeyFileError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise KeyFileError(f"the API keys in {path} cannot be read: {reason}") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not keys:
        raise KeyFileError(f"{path} holds no API key: one on each line, lines with # are comments")
    for number, key in keys:
        _check(key, f"the API key in line {number} of {path}")
    return tuple(key for _, key in keys)


def keys_of_variable(name: str, value: str) -> tuple[str, ...]:
    """Keys apart by commas or lines, and in quotes where one holds a comma. Raises `KeyFileError`."""
    rows: Iterable[Sequence[str]] = csv.reader(value.splitlines(), skipinitialspace=True)
    keys = tuple(key.strip() for row in rows for key in row if key.strip())
    if not keys:
        raise KeyFileError(f"{name} is set and empty; put a key into it, or unset it to serve without one")
    for key in keys:
        _check(key, f"an API key in {name}")
    return keys


def _check(key: str, where: str) -> None:
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(f"{where} has characters that no request can carry; a key is made of printable ASCII")


@contextlib.contextmanager
def handed_over(keys: Sequence[str]) -> Iterator[int]:
    """A file descriptor for a child process to read the keys from, one a line: neither arguments nor disk show them."""
    reading, writing = os.pipe()

    def write() -> None:
        # A child that ends early reads nothing.
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w", encoding="ascii") as pipe:
            pipe.write("".join(f"{key}\n" for key in keys))

    threading.Thread(target=write, daemon=True).start()
    try:
        yield reading
    finally:
        os.close(reading)
