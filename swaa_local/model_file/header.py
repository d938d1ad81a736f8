"""The header of a GGUF file: every key's place and value, every tensor's place; nothing of schedules or models.

gguf-py's own reader makes several numpy objects for each string of a vocabulary, six to ten seconds for a model of
today; this one steps over what nobody asks for, so a header takes milliseconds. It keeps byte spans, so that a copy
can carry metadata over byte for byte. Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from swaa_local.errors import GGUFError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
KEY_ALIGNMENT = "general.alignment"
_MAX_ARRAY_DEPTH = 4


class ValueType(IntEnum):
    """Types of metadata values, by their number in the file; the name in lower case is how messages call them."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


_SCALARS = {
    ValueType.U8: "B",
    ValueType.I8: "b",
    ValueType.U16: "H",
    ValueType.I16: "h",
    ValueType.U32: "I",
    ValueType.I32: "i",
    ValueType.F32: "f",
    ValueType.BOOL: "?",
    ValueType.U64: "Q",
    ValueType.I64: "q",
    ValueType.F64: "d",
}


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry. `span` covers the whole entry in the file: key, type and value."""

    key: str
    type: ValueType
    span: tuple[int, int]
    value_offset: int
    item_type: ValueType | None = None
    """Type of an array's items."""
    n_items: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `offset` counts from the start of the data section; `n_bytes` is None for a type we don't know."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int | None

    @property
    def n_elements(self) -> int:
        n = 1
        for dim in self.dims:
            n *= dim
        return n


@dataclass(frozen=True)
class Segment:
    """A stretch of tensor data: bytes of a file, and zeros behind them."""

    path: Path
    offset: int
    length: int
    padding: int = 0


@dataclass
class GGUFFile:
    """An open header; a context manager. Values are decoded on demand (`get`)."""

    path: Path
    version: int = 0
    size: int = 0
    """Bytes of the whole file."""
    keys: dict[str, KeyValue] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    tensor_info_span: tuple[int, int] = (0, 0)
    alignment: int = DEFAULT_ALIGNMENT
    data_offset: int = 0

    _map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Raises `GGUFError` for a missing, truncated or foreign file."""
        self = cls(Path(path))
        try:
            if self.path.exists() and not self.path.is_dir() and not self.path.is_file():
                raise self._error("not a regular file")
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 4 or file.read(4) != MAGIC:
                    raise self._error(f"not a GGUF file ({_what_instead(self.size)})")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._error(f"cannot read it: {error.strerror}") from None
        try:
            self._parse()
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def get(self, key: str, default: Any = None) -> Any:
        """The decoded value: bool, int, float, str, or a list of them; `default` where the key is missing."""
        entry = self.keys.get(key)
        return default if entry is None else self._decode(entry.type, entry.value_offset)[0]

    def raw(self, key: str) -> bytes:
        """The whole entry as it stands in the file."""
        start, end = self.keys[key].span
        return self._bytes(start, end - start)

    def raw_tensor_infos(self) -> bytes:
        start, end = self.tensor_info_span
        return self._bytes(start, end - start)

    @property
    def segments(self) -> list[Segment]:
        """All tensor data, in the order of the tensors' offsets."""
        return [Segment(self.path, self.data_offset, max(0, self.size - self.data_offset))]

    @property
    def data_size(self) -> int:
        """Bytes of all tensor data, padding included."""
        return sum(segment.length + segment.padding for segment in self.segments)

    # parsing

    def _parse(self) -> None:
        (self.version,) = self._unpack("I", 4)
        if self.version & 0xFFFF == 0 and self.version:
            raise self._error("a big-endian GGUF; convert it first with gguf-py's gguf-convert-endian")
        if self.version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise self._error(f"GGUF version {self.version}, but only {known} can be read; convert the model again")
        n_tensors, n_keys = self._unpack("QQ", 8)
        offset = 24
        for _ in range(n_keys):
            offset = self._parse_key(offset)
        start = offset
        names: set[str] = set()
        for _ in range(n_tensors):
            offset = self._parse_tensor_info(offset)
            if (name := self.tensors[-1].name) in names:
                raise self._error(f"tensor {name!r} occurs twice; the file is damaged")
            names.add(name)
        self.tensor_info_span = (start, offset)
        self._parse_alignment()
        self.data_offset = -(-offset // self.alignment) * self.alignment
        self._check_data()

    def _parse_key(self, start: int) -> int:
        key, offset = self._string(start)
        (number,) = self._unpack("I", offset)
        value_type = self._value_type(number, key)
        value_offset = offset + 4
        item_type, n_items = None, 0
        if value_type is ValueType.ARRAY:
            number, n_items = self._unpack("IQ", value_offset)
            item_type = self._value_type(number, key)
        end = self._skip(value_type, value_offset, key)
        if key in self.keys:
            raise self._error(f"key {key!r} occurs twice")
        self.keys[key] = KeyValue(key, value_type, (start, end), value_offset, item_type, n_items)
        return end

    def _parse_tensor_info(self, start: int) -> int:
        name, offset = self._string(start)
        (n_dims,) = self._unpack("I", offset)
        if n_dims > 8:
            raise self._error(f"tensor {name!r} has {n_dims} dimensions; the file is damaged")
        dims = self._unpack(f"{n_dims}Q", offset + 4)
        tensor_type, data = self._unpack("IQ", offset + 4 + 8 * n_dims)
        self.tensors.append(TensorInfo(name, dims, tensor_type, data, _tensor_bytes(dims, tensor_type)))
        return offset + 4 + 8 * n_dims + 12

    def _parse_alignment(self) -> None:
        entry = self.keys.get(KEY_ALIGNMENT)
        if entry is None:
            return
        self.alignment = self.get(KEY_ALIGNMENT)
        if entry.type is not ValueType.U32 or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise self._error(f"{KEY_ALIGNMENT} is {self.alignment!r}; it must be a u32 and a power of two")

    def _check_data(self) -> None:
        for tensor in self.tensors:
            end = self.data_offset + tensor.offset + (tensor.n_bytes or 0)
            if end > self.size:
                raise self._error(
                    f"truncated: tensor {tensor.name!r} ends at byte {end}, but the file has {self.size}; "
                    "download or convert it again"
                )

    def _value_type(self, number: int, key: str) -> ValueType:
        try:
            return ValueType(number)
        except ValueError:
            raise self._error(f"key {key!r} has the unknown value type {number}; the file is damaged") from None

    def _skip(self, value_type: ValueType, offset: int, key: str, depth: int = 0) -> int:
        """Offset behind a value, checked to lie within the file."""
        if value_type is ValueType.STRING:
            (length,) = self._unpack("Q", offset)
            return self._within(offset + 8 + length)
        if value_type is not ValueType.ARRAY:
            return self._within(offset + struct.calcsize(_SCALARS[value_type]))
        if depth == _MAX_ARRAY_DEPTH:
            raise self._error(f"key {key!r} nests arrays too deeply; the file is damaged")
        number, n_items = self._unpack("IQ", offset)
        item_type = self._value_type(number, key)
        offset += 12
        if item_type in _SCALARS:
            return self._within(offset + n_items * struct.calcsize(_SCALARS[item_type]))
        self._within(offset + 8 * n_items)
        if item_type is ValueType.STRING:
            data, unpack = self._data, struct.Struct("<Q").unpack_from
            try:
                for _ in range(n_items):
                    offset += 8 + unpack(data, offset)[0]
            except (struct.error, OverflowError):
                raise self._truncated() from None
            return self._within(offset)
        for _ in range(n_items):
            offset = self._skip(item_type, offset, key, depth + 1)
        return offset

    def _decode(self, value_type: ValueType, offset: int) -> tuple[Any, int]:
        if value_type is ValueType.STRING:
            return self._string(offset)
        if value_type is ValueType.ARRAY:
            number, n_items = self._unpack("IQ", offset)
            item_type = ValueType(number)
            if item_type in _SCALARS:
                code = f"{n_items}{_SCALARS[item_type]}"
                return list(self._unpack(code, offset + 12)), offset + 12 + struct.calcsize("<" + code)
            offset += 12
            items = []
            for _ in range(n_items):
                item, offset = self._decode(item_type, offset)
                items.append(item)
            return items, offset
        code = _SCALARS[value_type]
        return self._unpack(code, offset)[0], offset + struct.calcsize(code)

    def _string(self, offset: int) -> tuple[str, int]:
        (length,) = self._unpack("Q", offset)
        end = self._within(offset + 8 + length)
        try:
            return self._bytes(offset + 8, length).decode(), end
        except UnicodeDecodeError:
            raise self._error(f"text at byte {offset + 8} is not UTF-8; the file is damaged") from None

    def _unpack(self, code: str, offset: int) -> tuple[Any, ...]:
        code = "<" + code
        self._within(offset + struct.calcsize(code))
        return struct.unpack_from(code, self._data, offset)

    def _bytes(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def _within(self, end: int) -> int:
        if end > self.size:
            raise self._truncated()
        return end

    @property
    def _data(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map

    def _truncated(self) -> GGUFError:
        return self._error(f"truncated or damaged: its header does not end within {self.size} bytes")

    def _error(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: {what}")


def encode_key(key: str, value_type: ValueType, value: bytes) -> bytes:
    """A metadata entry in little-endian GGUF; `value` is already encoded."""
    return _encode_string(key) + struct.pack("<I", value_type) + value


def encode_u32(key: str, value: int) -> bytes:
    return encode_key(key, ValueType.U32, struct.pack("<I", value))


def encode_i32_array(key: str, values: list[int]) -> bytes:
    head = struct.pack("<IQ", ValueType.I32, len(values))
    return encode_key(key, ValueType.ARRAY, head + struct.pack(f"<{len(values)}i", *values))


def encode_text(key: str, value: str) -> bytes:
    return encode_key(key, ValueType.STRING, _encode_string(value))


def encode_tensor_info(info: TensorInfo) -> bytes:
    """A tensor's entry in the header."""
    n = len(info.dims)
    return _encode_string(info.name) + struct.pack(f"<I{n}QIQ", n, *info.dims, info.type, info.offset)


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tensor_bytes(dims: tuple[int, ...], tensor_type: int) -> int | None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor_type)]
    except (ValueError, KeyError):
        return None
    n = 1
    for dim in dims:
        n *= dim
    return n // block * size


def _what_instead(size: int) -> str:
    return "it is empty" if size == 0 else "it does not begin with 'GGUF'"


def iter_chunks(path: Path, offset: int, length: int, chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
    """`length` bytes of a file from `offset`, in pieces; `GGUFError` if the file ends early."""
    with open(path, "rb") as file:
        file.seek(offset)
        while length:
            chunk = file.read(min(chunk_bytes, length))
            if not chunk:
                raise GGUFError(f"{path}: ended {length} bytes early while it was read")
            length -= len(chunk)
            yield chunk
