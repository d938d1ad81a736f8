"""GGUF files with chosen metadata and few tensors, and changes to a file's bytes, for tests of reading and copying.

Written with struct from the format's description, independent of `swaa_local`; unlike gguf-py's writer it can write
empty and nested arrays.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

import gguf_faults

T: Any = gguf.GGUFValueType


class Typed(NamedTuple):
    """A value with its GGUF type; for arrays also the type of the items, which may be `Typed` arrays themselves."""

    value: Any
    type: gguf.GGUFValueType
    items: gguf.GGUFValueType | None = None


def u32(value: int) -> Typed:
    return Typed(value, T.UINT32)


def i32s(values: list[int]) -> Typed:
    return Typed(values, T.ARRAY, T.INT32)


SWAA: dict[str, Typed] = {
    "swaa.version": u32(1),
    "swaa.window": u32(8),
    "swaa.sinks": u32(2),
    "swaa.layer_modes": i32s([0, 1, 2, 0]),
}


# One value of every type.
ODD_VALUES: dict[str, Typed] = {
    "x.u8": Typed(200, T.UINT8),
    "x.i8": Typed(-3, T.INT8),
    "x.u16": Typed(60000, T.UINT16),
    "x.i16": Typed(-300, T.INT16),
    "x.i32": Typed(-70000, T.INT32),
    "x.u64": Typed(2**63, T.UINT64),
    "x.i64": Typed(-(2**40), T.INT64),
    "x.f32": Typed(0.5, T.FLOAT32),
    "x.f64": Typed(0.1, T.FLOAT64),
    "x.bool": Typed(True, T.BOOL),
    "x.text": Typed("grüße 你好", T.STRING),
    "x.texts": Typed(["", "a", "你好"], T.ARRAY, T.STRING),
    "x.floats": Typed([0.5, -1.0], T.ARRAY, T.FLOAT32),
    "x.bools": Typed([True, False], T.ARRAY, T.BOOL),
    "x.empty": Typed([], T.ARRAY, T.INT32),
    "x.no_texts": Typed([], T.ARRAY, T.STRING),
}


def write_header_model(path: Path, keys: Mapping[str, Typed | None], arch: str = "qwen3", n_layer: int = 4) -> Path:
    """A model's metadata with one small tensor. `keys` add to the basic ones or, with None, take one away."""
    base: dict[str, Typed | None] = {
        f"{arch}.block_count": u32(n_layer),
        f"{arch}.context_length": u32(4096),
        f"{arch}.embedding_length": u32(128),
        f"{arch}.attention.head_count": u32(4),
        f"{arch}.attention.head_count_kv": u32(2),
    }
    entries = {"general.architecture": Typed(arch, T.STRING)} | {k: v for k, v in (base | dict(keys)).items() if v}
    data = b"".join(_string(key) + _typed(typed) for key, typed in entries.items())
    tensor = _string("output_norm.weight") + struct.pack("<IQIQ", 1, 128, gguf.GGMLQuantizationType.F32, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + data + tensor
    alignment = entries["general.alignment"].value if "general.alignment" in entries else 32
    head += bytes(-len(head) % alignment)
    path.write_bytes(head + np.arange(128, dtype=np.float32).tobytes())
    return path


_FORMATS = {
    T.UINT8: "B",
    T.INT8: "b",
    T.UINT16: "H",
    T.INT16: "h",
    T.UINT32: "I",
    T.INT32: "i",
    T.FLOAT32: "f",
    T.BOOL: "?",
    T.UINT64: "Q",
    T.INT64: "q",
    T.FLOAT64: "d",
}


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(typed: Typed) -> bytes:
    return struct.pack("<I", typed.type) + _value(typed)


def _value(typed: Typed) -> bytes:
    if typed.type is T.STRING:
        return _string(typed.value)
    if typed.type is not T.ARRAY:
        return struct.pack("<" + _FORMATS[typed.type], typed.value)
    assert typed.items is not None
    items = [item if isinstance(item, Typed) else Typed(item, typed.items) for item in typed.value]
    return struct.pack("<IQ", typed.items, len(items)) + b"".join(_value(item) for item in items)


def patch_bytes(source: Path, target: Path, offset: int, data: bytes) -> Path:
    content = bytearray(source.read_bytes())
    content[offset : offset + len(data)] = data
    target.write_bytes(content)
    return target


def set_version(source: Path, target: Path, version: int) -> Path:
    return patch_bytes(source, target, 4, struct.pack("<I", version))


def write_split(source: Path, folder: Path, stem: str, n_parts: int, *, empty_first: bool = False) -> list[Path]:
    """A model in parts, as llama.cpp's gguf-split writes it; empty_first: the first has the metadata alone."""
    whole = gguf_faults.take_apart(source.read_bytes())
    tensors = sorted(whole.tensors, key=lambda tensor: tensor.offset)
    ends = [tensor.offset for tensor in tensors[1:]] + [len(whole.data)]
    n_full = n_parts - empty_first
    shares = [len(tensors) * i // n_full for i in range(n_full + 1)]
    placed = list(zip(tensors, ends, strict=True))
    groups = [placed[begin:end] for begin, end in itertools.pairwise(shares)]
    if empty_first:
        groups.insert(0, [])
    paths = []
    for number, group in enumerate(groups):
        start = group[0][0].offset if group else 0
        part = gguf_faults.Parts(
            whole.architecture,
            list(whole.keys) if number == 0 else [],
            [replace(tensor, offset=tensor.offset - start) for tensor, _ in group],
            whole.data[start : group[-1][1]] if group else b"",
        )
        for name, value in (("no", number), ("count", n_parts)):
            part.set(f"split.{name}", gguf_faults.U16, struct.pack("<H", value))
        part.set("split.tensors.count", gguf_faults.I32, struct.pack("<i", len(tensors)))
        paths.append(folder / f"{stem}-{number + 1:05d}-of-{n_parts:05d}.gguf")
        paths[-1].write_bytes(part.encode())
    return paths
