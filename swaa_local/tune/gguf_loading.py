"""A GGUF as transformers' loader takes it, without the minutes that gguf-py's reader and numpy take.

The loader asks gguf-py for a reader and for `dequantize`, anew in every call. Within `quick_gguf` it is given ours: a
header that is read once, and the engine's routines.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from swaa_local.engine.dequantize import dequantize, is_quantized
from swaa_local.model_file.header import GGUFFile, KeyValue, TensorInfo, ValueType
from swaa_local.tune.request import TuneError

_PLAIN = {gguf.GGMLQuantizationType[name]: kind for name, kind in (("F32", np.float32), ("F16", np.float16))}


@contextmanager
def quick_gguf(path: Path) -> Iterator[None]:
    """While it is entered, whoever imports `GGUFReader`, `dequantize` and `get_tensor_name_map` from gguf-py reads this
    file quickly."""
    with GGUFFile.open(path) as file:
        reader = SimpleNamespace(
            fields={key: _field(file, entry) for key, entry in file.keys.items()},
            tensors=[_tensor(file, info) for info in file.tensors],
        )
    names = ("GGUFReader", "dequantize", "get_tensor_name_map")
    slow = {name: getattr(gguf, name) for name in names}
    gguf.GGUFReader = lambda asked, *args: reader if Path(asked) == path else slow["GGUFReader"](asked, *args)
    gguf.dequantize = _dequantize
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)  # the same table for each module of a model
    try:
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def _field(file: GGUFFile, entry: KeyValue) -> SimpleNamespace:
    """As `gguf.ReaderField`: texts are bytes, other values arrays of one; `data` says which parts are values."""
    value = file.get(entry.key)
    is_list = entry.type is ValueType.ARRAY
    parts = [item.encode() if isinstance(item, str) else [item] for item in (value if is_list else [value])]
    types = [entry.type] if entry.item_type is None else [entry.type, entry.item_type]
    return SimpleNamespace(types=types, parts=parts, data=range(len(parts)))


def _tensor(file: GGUFFile, info: TensorInfo) -> SimpleNamespace:
    """As `gguf.ReaderTensor`: plain types as they are, rows of bytes of the others."""
    try:
        kind, dims = gguf.GGMLQuantizationType(info.type), info.dims[::-1]
        dtype = _PLAIN.get(kind)
        shape = gguf.quant_shape_to_byte_shape(dims, kind) if dtype is None else dims
        data = np.memmap(file.path, dtype or np.uint8, "r", file.data_offset + info.offset, shape)
    except ValueError as error:
        raise TuneError(f"{file.path}: tensor {info.name!r} cannot be read: {error}") from error
    return SimpleNamespace(name=info.name, tensor_type=kind, data=data)


def _dequantize(data: npt.NDArray[Any], kind: gguf.GGMLQuantizationType) -> npt.NDArray[np.float32]:
    if is_quantized(kind):
        return dequantize(data, kind)
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(data, kind)
    return values
