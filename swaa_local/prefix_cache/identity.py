"""What a file is, without reading all of it: states that were made with one model must never meet another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from swaa_local.model_file.header import GGUFFile
from swaa_local.model_file.split import SplitGGUF, open_gguf

_SAMPLE_BYTES = 4096
_DIGEST_BYTES = 16


def model_identity(path: str | os.PathLike[str]) -> str:
    """A digest of a model, of all its parts: sizes, times of change, headers, and a sample of each tensor.

    A copy that keeps the time is the same model; a file that was changed in place is another one. Raises `GGUFError`.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with open_gguf(path) as model:
        for part in model.parts if isinstance(model, SplitGGUF) else [model]:
            _add_file(digest, part)
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, file: GGUFFile) -> None:
    with open(file.path, "rb") as data:
        digest.update(f"{file.size} {os.fstat(data.fileno()).st_mtime_ns}\n".encode())
        digest.update(data.read(file.tensor_info_span[1]))
        for tensor in file.tensors:
            start, length = file.data_offset + tensor.offset, tensor.n_bytes or _SAMPLE_BYTES
            for place in (start, start + max(0, length // 2), start + max(0, length - _SAMPLE_BYTES)):
                data.seek(place)
                digest.update(data.read(min(_SAMPLE_BYTES, length)))


def file_identity(path: str | os.PathLike[str]) -> str:
    """A digest of everything in a small file, such as a LoRA adapter."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
