"""What users type or paste: paths, what is found there, and text that may not be UTF-8."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import unquote

from swaa_local.errors import SWAAError

_CONTEXT = 20  # characters of a text that show where it goes wrong


class TextError(SWAAError, ValueError):
    """A text with bytes that are no UTF-8; the message names the first one."""


def user_path(text: str) -> Path:
    """A path with `~` or `~user` at its beginning replaced, as a shell does: a name that is nobody's stays as it is."""
    return Path(os.path.expanduser(text))


def pasted_path(text: str) -> str:
    """A path as it was typed or as a terminal pastes a dropped file: quoted, with backslashes, or as a file:// address.

    What is there under the name as it stands is meant. Blanks in a typed path need no quotes.
    """
    text = text.strip()
    if os.path.lexists(os.path.expanduser(text)):
        return text
    for address in ("file:///", "file://localhost/"):
        if text.startswith(address):
            return unquote(text[len(address) - 1 :], errors="surrogateescape")
    try:
        words = shlex.split(text)
    except ValueError:  # a quote or a backslash that is part of the name
        return text
    return words[0] if len(words) == 1 else text


def require_utf8(text: str, what: str) -> str:
    """The text. Raises `TextError` if it has what Python makes of bytes that are no UTF-8 (a surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - _CONTEXT) : error.start]
        place = f"after {before!r}" if before else "at its beginning"
        code = ord(text[error.start])
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the surrogate {code:#x}"
        raise TextError(
            f"{what} is not UTF-8: {found} {place}. Set the terminal to UTF-8, or convert the text with iconv; "
            "a text that is cut must be cut between two characters"
        ) from None
    return text
