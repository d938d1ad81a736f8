"""Reading a whole input that may have no end: a device, a pipe, or a file that was meant for something else.

Knows bytes only.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from swaa_local.errors import SWAAError
from swaa_local.text.units import format_bytes

MAX_TEXT_BYTES = 256 << 20
"""More text than any context holds."""
_CHUNK_BYTES = 1 << 20


class InputTooLarge(SWAAError):
    """An input that is larger than what it could be of use for, or that has no end."""


def read_input(source: Path | IO[bytes], what: str, *, most: int = MAX_TEXT_BYTES) -> bytes:
    """All bytes of a file, a pipe such as the shell's <(...), or an open stream; `most` at most.

    what: its name for the message. Raises `InputTooLarge`, and `OSError` as `open` does and for a device.
    """
    if isinstance(source, Path):
        try:
            file = source.open("rb")
        except ValueError as error:  # a zero byte in the path
            raise OSError(errno.EINVAL, str(error)) from None
        with file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                raise OSError(errno.EINVAL, "it is a device, not a file")
            return read_input(file, what, most=most)
    chunks, size = [], 0
    while chunk := source.read(_CHUNK_BYTES):
        size += len(chunk)
        if size > most:
            raise InputTooLarge(
                f"{what} is larger than {format_bytes(most)} or has no end, so it is not read; name another, or a part"
            )
        chunks.append(chunk)
    return b"".join(chunks)
