"""Copies a GGUF with another schedule, or none: every other byte of metadata and all tensor data stay as they are.

What was split becomes one file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from swaa_local.model_file.header import MAGIC, GGUFFile, iter_chunks
from swaa_local.model_file.schedule_keys import KEY_PREFIX, encode_schedule
from swaa_local.model_file.split import KEY_PREFIX as SPLIT_PREFIX
from swaa_local.model_file.split import SplitGGUF
from swaa_local.schedule.config import Schedule


def copy_gguf(
    source: GGUFFile,
    target: Path,
    schedule: Schedule | None,
    *,
    calibration: str | None = None,
    on_header: Callable[[], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write `source` to `target` with `schedule`, and what it was found with, in place of any `swaa.*` keys it has.

    Data are streamed. on_header: called when the header is there and the file has its full length, before the data:
    the engine can already judge it. on_bytes: bytes of data written so far. A partial target is the caller's to remove.
    """
    header = encode_header(source, schedule, calibration)
    with open(target, "wb") as file:
        file.write(header)
        file.truncate(len(header) + source.data_size)
        file.flush()
        if on_header is not None:
            on_header()
        done = 0
        for segment in source.segments:
            for chunk in iter_chunks(segment.path, segment.offset, segment.length):
                file.write(chunk)
                done += len(chunk)
                if on_bytes is not None:
                    on_bytes(done)
            file.write(bytes(segment.padding))
            done += segment.padding


def encode_header(source: GGUFFile, schedule: Schedule | None, calibration: str | None = None) -> bytes:
    """All that precedes the data section, padding included."""
    left_out = (KEY_PREFIX, SPLIT_PREFIX) if isinstance(source, SplitGGUF) else (KEY_PREFIX,)
    entries = [source.raw(key) for key in source.keys if not key.startswith(left_out)]
    if schedule is not None:
        entries += encode_schedule(schedule, calibration)
    counts = struct.pack("<IQQ", source.version, len(source.tensors), len(entries))
    # Tensor offsets count from the start of the data section, so they hold as they are.
    header = MAGIC + counts + b"".join(entries) + source.raw_tensor_infos()
    return header + bytes(-len(header) % source.alignment)
