"""Documents that a chat is about: read from files, and put into a message. Knows nothing of models."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from swaa_local.errors import SWAAError
from swaa_local.files.input_file import read_input
from swaa_local.files.user_input import user_path
from swaa_local.text.printable import printable

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose BOM it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class DocumentError(SWAAError):
    """A file that cannot be read as text; the message names the file and the reason."""


@dataclass(frozen=True)
class Document:
    """A text and the name that the model is told."""

    name: str
    text: str


def read_document(path: str) -> Document:
    """Read a text file; `-` reads standard input.

    UTF-8, or UTF-16/32 with a byte order mark. Raises `DocumentError` for anything else: nothing is guessed or lost.
    """
    if path == "-":
        if sys.stdin is None:
            raise DocumentError("standard input is closed")
        return decode_document("stdin", read_input(sys.stdin.buffer, "standard input"))
    file = user_path(path)
    try:
        data = read_input(file, path)
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror or error}") from None
    return decode_document(printable(file.name), data)


def decode_document(name: str, data: bytes) -> Document:
    """The text of a file's bytes. Raises `DocumentError`."""
    encoding = next((encoding for bom, encoding in _BOMS if data.startswith(bom)), "utf-8")
    if data.startswith(b"%PDF-"):
        raise DocumentError(f"{name} is a PDF; name the file, or extract its text first, for instance with pdftotext")
    if encoding in ("utf-8", "utf-8-sig") and (at := data.find(0)) >= 0:
        raise DocumentError(f"{name} is not a text file (byte {at} is zero); extract its text first")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding.upper()} (byte {error.start} is 0x{data[error.start]:02x}); "
            f"convert it, for instance with: iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise DocumentError(f"{name} is empty")
    return Document(name, text)


def compose_message(text: str, documents: Sequence[Document]) -> str:
    """What the model is given: each document between marks of its own, and the user's words last.

    The order matters under a window: the question is then near the answer.
    """
    return "\n\n".join([*map(marked, documents), text])


def marked(document: Document) -> str:
    """A document between its marks."""
    return f'<document name="{document.name}">\n{document.text.strip()}\n</document>'
