"""Quantized weights as float32, by the engine's own routines, on all cores.

gguf-py's are of numpy: the same values to the bit, twenty times as slow. Knows ggml's types; nothing of files.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as _c

_CHUNK = 1 << 20  # values that a thread makes at once


class _Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@cache
def _traits(ggml_type: int) -> _Traits:
    get = _c._lib.ggml_get_type_traits
    get.restype, get.argtypes = ctypes.POINTER(_Traits), (ctypes.c_int,)
    traits: _Traits = get(ggml_type).contents
    return traits


def is_quantized(ggml_type: int) -> bool:
    """Whether `dequantize` takes it."""
    if not 0 <= ggml_type < _c.GGML_TYPE_COUNT:
        return False
    traits = _traits(ggml_type)
    return bool(traits.is_quantized and traits.to_float)


def dequantize(data: npt.NDArray[np.uint8], ggml_type: int) -> npt.NDArray[np.float32]:
    """(..., n) from rows of (..., bytes)."""
    traits = _traits(ggml_type)
    to_float, block, size = _ToFloat(traits.to_float), int(traits.blck_size), int(traits.type_size)
    n_blocks, rest = divmod(data.shape[-1], size)
    if rest:
        raise ValueError(f"{data.shape[-1]} bytes are not whole blocks of {size}")
    data = np.ascontiguousarray(data)
    out = np.empty((*data.shape[:-1], n_blocks * block), dtype=np.float32)
    step = max(1, _CHUNK // block)

    def run(first: int) -> None:
        n = min(step, data.size // size - first)
        to_float(data.ctypes.data + first * size, out.ctypes.data + first * block * 4, n * block)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(run, range(0, data.size // size, step)):
            pass
    return out
