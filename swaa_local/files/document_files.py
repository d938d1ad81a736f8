"""The documents that a path stands for: a file, a directory, a pattern, or a PDF's text.

Knows files; nothing of models.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

from swaa_local.files.document import Document, DocumentError, decode_document, read_document
from swaa_local.files.input_file import read_input
from swaa_local.files.user_input import user_path
from swaa_local.text.extras import install
from swaa_local.text.printable import printable

_MOST_FILES = 1000
_PDF_S = 120.0


def read_documents(path: str, say: Callable[[str], None] = lambda _text: None) -> list[Document]:
    """The texts of a file, of all files in a directory and below, or of those that a pattern (`src/**/*.py`) names.

    `-` reads standard input. In a directory, hidden files and those that are no text are left out, and `say` tells of
    them. Raises `DocumentError`, also where there is no text at all.
    """
    place = user_path(path)
    if path != "-" and not os.path.lexists(place) and glob.has_magic(path):
        names = sorted(glob.glob(str(place), recursive=True))
        files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            raise DocumentError(f"no file matches {path}")
        return [_read(file, str(file)) for file in _bounded(files, path)]
    if path != "-" and place.is_dir():
        return _of_directory(place, path, say)
    return [_read(place, path) if path != "-" and place.is_file() else read_document(path)]


def _of_directory(directory: Path, path: str, say: Callable[[str], None]) -> list[Document]:
    documents, left_out = [], []
    for file in _bounded(list(_visible_files(directory)), path):
        try:
            document = _read(file, str(file))
        except DocumentError:
            left_out.append(file.name)
            continue
        documents.append(Document(printable(file.relative_to(directory.parent)), document.text))
    if not documents:
        raise DocumentError(f"{path} is a directory without a text in it")
    if left_out:
        shown = ", ".join(map(printable, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        say(f"{len(left_out)} files of {path} are no texts and were left out: {shown}")
    return documents


def _visible_files(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _bounded(files: list[Path], path: str) -> list[Path]:
    if len(files) > _MOST_FILES:
        raise DocumentError(
            f"{path} stands for {len(files)} files, and {_MOST_FILES} are the most; name a part of them"
        )
    return files


def _read(file: Path, path: str) -> Document:
    try:
        with file.open("rb") as data:
            is_pdf = data.read(5) == b"%PDF-"
    except OSError:
        is_pdf = False  # `read_document` says why
    if not is_pdf:
        return read_document(path)
    name = printable(file.name)
    text = _pdf_text(read_input(file, path), name)
    return decode_document(name, text.encode(errors="replace"))


def _pdf_text(data: bytes, name: str) -> str:
    """By pypdf, or pdftotext, whichever is there. Raises `DocumentError`."""
    try:
        from pypdf import PdfReader
    except ImportError:
        text = _by_pdftotext(data, name)
    else:
        try:
            logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it would write its own lines
            text = "\n\n".join(page.extract_text() for page in PdfReader(BytesIO(data)).pages)
        except Exception as error:  # of a damaged file, whatever its code runs into
            raise DocumentError(f"{name} is a PDF that cannot be read: {error}") from None
    if not text.strip():
        raise DocumentError(f"{name} is a PDF without any text, perhaps of scanned pages; make its text first, by OCR")
    return text


def _by_pdftotext(data: bytes, name: str) -> str:
    program = shutil.which("pdftotext")
    if program is None:
        raise DocumentError(f"{name} is a PDF; its text can be read with pypdf ({install('pdf')}) or pdftotext")
    try:
        done = subprocess.run([program, "-", "-"], input=data, capture_output=True, check=False, timeout=_PDF_S)
    except subprocess.TimeoutExpired:
        raise DocumentError(f"{name} is a PDF that pdftotext has not read in {_PDF_S:.0f} s") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it gave no reason"]
        raise DocumentError(f"{name} is a PDF that pdftotext cannot read: {printable(reason[0])}")
    return done.stdout.decode(errors="replace")
