"""Text that came from outside, made fit for a terminal, a log or a table: one line, and no codes.

A model's name, a file's name or another program's message may hold escape codes that a terminal obeys, or line breaks
that forge a line of ours. Knows characters only.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Controls (C0, DEL, C1), marks that turn the direction of a line, line separators, the byte order mark, and halves of
# surrogate pairs, which are what Python makes of bytes that are no text.
_UNFIT = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_ALL = re.compile(f"[{_UNFIT}]")
_BUT_LINES = re.compile(f"(?![\t\n])[{_UNFIT}]")
_NAMES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BYTE_AS_SURROGATE = range(0xDC80, 0xDD00)  # PEP 383


def printable(text: object) -> str:
    """`str(text)` on one line: what a terminal would act on is spelled out, as in `\\x1b` or `\\n`.

    Everything else, of whatever script, stays as it is. Doing it twice changes nothing.
    """
    return _ALL.sub(_escape, str(text))


def printable_lines(text: object) -> str:
    """`printable` for a text whose lines and tabs are meant; what others gave must have been made printable before."""
    return _BUT_LINES.sub(_escape, str(text))


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


def printable_json(value: Any, **options: Any) -> str:
    """`json.dumps` in ASCII, valid in any locale and fit for a terminal; it stays JSON of the very same value."""
    text = json.dumps(value, **options)
    # What JSON does not escape by itself can only stand in a string, where this spelling means the same.
    return _BUT_LINES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if code in _BYTE_AS_SURROGATE:
        code -= 0xDC00
    return _NAMES.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
