"""One state in one file: a header that says what it is, the tokens, and their cells of the KV cache, as the engine gave
them.

llama-server writes the same format (server-disk-cache.cpp), with the states of its checkpoints behind the cells; what
the header lists of them is its own. Cells are stored as they are: of keys and values in f16, zstd saves 9 % and takes
longer than a disk (docs/cache.md). Knows the format; nothing of directories or engines.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MAGIC, VERSION = b"SWAAKV\r\n", 1
_PREAMBLE = struct.Struct("<8sIII")  # magic, version, bytes of the header, its CRC-32
_MOST_HEADER_BYTES = 1 << 16
_CHUNK_BYTES = 16 << 20

Tokens = npt.NDArray[np.int32]
Cells = npt.NDArray[np.uint8]


class StateFileError(Exception):
    """A file that holds no whole state of this version; the message is the reason."""


@dataclass(frozen=True)
class StateHeader:
    """What a state is. key: of everything that shapes cells but the tokens. model, schedule: for people."""

    key: str
    model: str
    schedule: str
    n_tokens: int
    n_bytes: int
    """Of the cells."""
    tokens_crc: int
    cells_crc: int


def write_state(path: Path, *, key: str, model: str, schedule: str, tokens: Tokens, cells: Cells) -> None:
    """Write a new file that only its owner may read. Raises OSError."""
    tokens = np.ascontiguousarray(tokens, dtype="<i4")
    header = StateHeader(
        key, model, schedule, len(tokens), cells.nbytes, zlib.crc32(tokens.data), zlib.crc32(cells.data)
    )
    text = json.dumps(header.__dict__).encode()
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(_PREAMBLE.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
        file.write(tokens.tobytes())
        view = cells.data
        for start in range(0, cells.nbytes, _CHUNK_BYTES):
            file.write(view[start : start + _CHUNK_BYTES])


def state_bytes(n_tokens: int, n_cell_bytes: int) -> int:
    """Bytes that a file takes, about."""
    return _PREAMBLE.size + 512 + 4 * n_tokens + n_cell_bytes


def read_header(path: Path) -> tuple[StateHeader, Tokens]:
    """What a file is, and its tokens. Raises `StateFileError`, also for a file that is cut, and OSError."""
    with open(path, "rb") as file:
        header = _read_header(file)
        tokens = _read(file, 4 * header.n_tokens).view("<i4").astype(np.int32)
        if zlib.crc32(tokens.astype("<i4").data) != header.tokens_crc:
            raise StateFileError("its tokens are damaged")
        return header, tokens


def read_state(path: Path) -> tuple[StateHeader, Tokens, Cells]:
    """Everything, checked. Raises `StateFileError` and OSError."""
    with open(path, "rb") as file:
        header = _read_header(file)
        tokens = _read(file, 4 * header.n_tokens)
        cells = _read(file, header.n_bytes)
    if zlib.crc32(tokens.data) != header.tokens_crc or zlib.crc32(cells.data) != header.cells_crc:
        raise StateFileError("it is damaged")
    return header, tokens.view("<i4").astype(np.int32), cells


def _read_header(file: IO[bytes]) -> StateHeader:
    preamble = file.read(_PREAMBLE.size)
    if len(preamble) < _PREAMBLE.size:
        raise StateFileError("it is not whole")
    magic, version, length, crc = _PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise StateFileError("it is no state of swaa-local's")
    if version != VERSION:
        raise StateFileError(f"it has version {version}, and this program reads version {VERSION}")
    text = file.read(length) if length <= _MOST_HEADER_BYTES else b""
    if zlib.crc32(text) != crc:
        raise StateFileError("its header is damaged")
    try:
        values: dict[str, Any] = json.loads(text)
        header = StateHeader(**{name: values[name] for name in StateHeader.__dataclass_fields__})
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StateFileError("its header is none of this version") from None
    texts, numbers = (header.key, header.model, header.schedule), (header.n_tokens, header.n_bytes)
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in numbers):
        raise StateFileError("its header is none of this version")
    # before there is memory for them
    if os.fstat(file.fileno()).st_size != file.tell() + 4 * header.n_tokens + header.n_bytes:
        raise StateFileError("it is not whole")
    return header


def _read(file: IO[bytes], n_bytes: int) -> Cells:
    data = np.fromfile(file, np.uint8, n_bytes)
    if data.nbytes != n_bytes:
        raise StateFileError("it is not whole")
    return data
