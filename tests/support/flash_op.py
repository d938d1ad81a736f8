"""One flash attention op of ggml, on the CPU or on another device, through its C API, and the same op in numpy.

The oracle reads the very values that the cache holds (gguf-py's dequantization, not ggml's) and works in float64.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GT
from gguf.quants import dequantize, quantize
from llama_cpp.llama_cpp import _lib

from tests.support.engine import GPU_LAYERS

RNG = np.random.default_rng(7)
NP_TYPES = {GT.F32: np.float32, GT.F16: np.float16}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = [("file", ctypes.c_char_p), ("base", c_void_p), ("name", ctypes.c_char_p), ("address", c_void_p)]


def _cpu_library() -> ctypes.CDLL:
    """The library of the CPU backend: libllama depends on it, or ggml has chosen one of several for this CPU."""
    if hasattr(_lib, "ggml_cpu_init"):
        return _lib
    _lib.llama_backend_init()
    _lib.ggml_backend_reg_by_name.restype = c_void_p
    symbol = _Symbol()
    assert ctypes.CDLL(None).dladdr(c_void_p(_lib.ggml_backend_reg_by_name(b"CPU")), ctypes.byref(symbol))
    return ctypes.CDLL(symbol.file.decode())


def _declare(name: str, result: Any, *args: Any, library: ctypes.CDLL = _lib) -> Any:
    function = getattr(library, name)
    function.restype = result
    function.argtypes = args
    return function


_init = _declare("ggml_init", c_void_p, _InitParams)
_free = _declare("ggml_free", None, c_void_p)
_new_tensor = _declare("ggml_new_tensor", c_void_p, c_void_p, c_int, c_int, POINTER(c_int64))
_data = _declare("ggml_get_data", c_void_p, c_void_p)
_permute = _declare("ggml_permute", c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int)
_flash = _declare("ggml_flash_attn_ext", c_void_p, *[c_void_p] * 5, c_float, c_float, c_float)
_add_sinks = _declare("ggml_flash_attn_ext_add_sinks", None, c_void_p, c_void_p)
_new_graph = _declare("ggml_new_graph", c_void_p, c_void_p)
_expand = _declare("ggml_build_forward_expand", None, c_void_p, c_void_p)
# enum ggml_backend_dev_type
DEVICE_CPU, DEVICE_GPU = 0, 1
_device_by_type = _declare("ggml_backend_dev_by_type", c_void_p, c_int)
_device_init = _declare("ggml_backend_dev_init", c_void_p, c_void_p, ctypes.c_char_p)
_alloc = _declare("ggml_backend_alloc_ctx_tensors", c_void_p, c_void_p, c_void_p)
_set = _declare("ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
_get = _declare("ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
_compute_backend = _declare("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
_buffer_type = _declare("ggml_backend_dev_buffer_type", c_void_p, c_void_p)
_alloc_size = _declare("ggml_backend_buft_get_alloc_size", c_size_t, c_void_p, c_void_p)
_free_buffer = _declare("ggml_backend_buffer_free", None, c_void_p)
_free_backend = _declare("ggml_backend_free", None, c_void_p)
_cpu = _cpu_library()
_compute = _declare("ggml_graph_compute_with_ctx", c_int, c_void_p, c_void_p, c_int, library=_cpu)
_cpu_init = _declare("ggml_cpu_init", None, library=_cpu)


@dataclass(frozen=True)
class Case:
    """Shapes and features of an op; `mask` is [stream or 1][head or 1][token][n_kv] of 0, -inf or a bias, or None."""

    n_kv: int = 300
    n_tokens: int = 1
    n_head: int = 4
    n_head_kv: int = 2
    head_k: int = 64
    head_v: int = 64
    type_k: GT = GT.F16
    type_v: GT = GT.F16
    n_stream: int = 1
    mask: np.ndarray[Any, Any] | None = field(default=None, repr=False)
    max_bias: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    head_major: bool = False  # the cells of a head lie together, as they do not in llama.cpp's cache
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    q: np.ndarray[Any, Any]  # [stream][token][head][head_k]
    k: np.ndarray[Any, Any]  # [stream][cell][kv head][head_k]
    v: np.ndarray[Any, Any]
    sinks: np.ndarray[Any, Any]


def inputs(case: Case) -> Inputs:
    rng = np.random.default_rng(case.seed)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    k = normal(case.n_stream, case.n_kv, case.n_head_kv, case.head_k)
    k[:, case.n_kv // 2 :] *= 2  # the running maximum moves late
    return Inputs(
        q=2 * normal(case.n_stream, case.n_tokens, case.n_head, case.head_k),
        k=k,
        v=normal(case.n_stream, case.n_kv, case.n_head_kv, case.head_v),
        sinks=3 * normal(case.n_head),
    )


def pack(values: np.ndarray[Any, Any], kind: GT) -> np.ndarray[Any, Any]:
    return values.astype(NP_TYPES[kind]) if kind in NP_TYPES else quantize(values, kind)


def unpack(packed: np.ndarray[Any, Any], kind: GT) -> np.ndarray[Any, Any]:
    return (packed if kind in NP_TYPES else dequantize(packed, kind)).astype(np.float64)


def slopes(n_head: int, max_bias: float) -> np.ndarray[Any, Any]:
    """ALiBi's slope per head (Press et al. 2021, for any number of heads as in ggml_soft_max_ext)."""
    if max_bias == 0:
        return np.ones(n_head)
    n = 2 ** int(np.floor(np.log2(n_head)))
    return np.array(
        [
            2 ** (-max_bias * (h + 1) / n) if h < n else 2 ** (-max_bias / 2 * (2 * (h - n) + 1) / n)
            for h in range(n_head)
        ]
    )


def expected(case: Case) -> np.ndarray[Any, Any]:
    """[stream][token][head][head_v]; a row that sees nothing is 0."""
    data = inputs(case)
    k = unpack(pack(data.k, case.type_k), case.type_k)
    v = unpack(pack(data.v, case.type_v), case.type_v)
    n_gqa = case.n_head // case.n_head_kv
    k, v = np.repeat(k, n_gqa, axis=2), np.repeat(v, n_gqa, axis=2)
    scores = np.einsum("sthd,schd->shtc", data.q.astype(np.float64), k) / np.sqrt(case.head_k)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if case.mask is not None:
        scores = scores + slopes(case.n_head, case.max_bias)[None, :, None, None] * case.mask
    top = scores.max(axis=-1, keepdims=True)
    sink = data.sinks.astype(np.float64)[None, :, None, None]
    if case.sinks:
        top = np.maximum(top, sink)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    if case.sinks:
        total = total + np.exp(sink - top)
    return np.einsum("shtc,schd->sthd", weights / np.where(total == 0, 1, total), v)


class _Plan(ctypes.Structure):
    """struct ggml_cplan of the pinned ggml-cpu.h."""

    _fields_ = [("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("threadpool", c_void_p),
                ("abort", c_void_p), ("abort_data", c_void_p), ("use_ref", c_bool)]  # fmt: skip


# An x86-64 without SSE3: ggml has vectors for nothing less.
IS_SCALAR = platform.machine() in ("x86_64", "AMD64") and not _declare("ggml_cpu_has_sse3", c_int, library=_cpu)()
_plan = _declare("ggml_graph_plan", _Plan, c_void_p, c_int, c_void_p, library=_cpu)


def work_bytes(case: Case, n_threads: int) -> int:
    """Scratch memory that the op asks for."""
    with _built(case) as (_context, graph, _out, _contents):
        return int(_plan(graph, n_threads, None).work_size)


def result_bytes(case: Case, device: int) -> int:
    """What is put aside for the result of the op on a device, a `ggml_backend_dev_t`."""
    with _built(case, on_device=True) as (_context, _graph, out, _contents):
        return int(_alloc_size(_buffer_type(device), out))


def compute(case: Case, n_threads: int = 1, data: Inputs | None = None) -> np.ndarray[Any, Any]:
    """The op on the CPU backend, shaped like `expected`; data: instead of the case's own inputs."""
    with _built(case, data) as (context, graph, out, _contents):
        assert _compute(context, graph, n_threads) == 0
        shape = (case.n_stream, case.n_tokens, case.n_head, case.head_v)
        return np.ctypeslib.as_array(ctypes.cast(_data(out), POINTER(c_float)), shape).astype(np.float64)


def compute_on_device(case: Case) -> np.ndarray[Any, Any]:
    """The op on the device that the engine's tests use (GPU_LAYERS), shaped like `expected`."""
    _lib.llama_backend_init()
    backend = _device_init(_device_by_type(DEVICE_GPU if GPU_LAYERS else DEVICE_CPU), None)
    assert backend
    buffer = None
    try:
        with _built(case, on_device=True) as (context, graph, out, contents):
            buffer = _alloc(context, backend)
            assert buffer
            for tensor, packed in contents:
                _set(tensor, packed.ctypes.data, 0, packed.nbytes)
            assert _compute_backend(backend, graph) == 0
            got = np.empty((case.n_stream, case.n_tokens, case.n_head, case.head_v), np.float32)
            _get(out, got.ctypes.data, 0, got.nbytes)
            return got.astype(np.float64)
    finally:
        _free_buffer(buffer)
        _free_backend(backend)


@contextmanager
def _built(
    case: Case, data: Inputs | None = None, *, on_device: bool = False
) -> Iterator[tuple[int, int, int, list[tuple[int, np.ndarray[Any, Any]]]]]:
    """Context, graph and output of the op, and what its inputs hold; for a device that is to be set."""
    _cpu_init()
    data = data or inputs(case)
    context = _init(_InitParams(64 * 2**20, None, on_device))
    contents: list[tuple[int, np.ndarray[Any, Any]]] = []
    try:

        def tensor(array: np.ndarray[Any, Any], kind: GT, shape: tuple[int, ...]) -> int:
            made: int = _new_tensor(context, kind, len(shape), (c_int64 * len(shape))(*reversed(shape)))
            packed = np.ascontiguousarray(array)
            contents.append((made, packed))
            if not on_device:
                ctypes.memmove(_data(made), packed.ctypes.data, packed.nbytes)
            return made

        def cache(values: np.ndarray[Any, Any], kind: GT) -> int:
            if case.head_major:
                swapped = values.swapaxes(1, 2)
                return tensor(pack(np.ascontiguousarray(swapped), kind), kind, swapped.shape)
            made: int = _permute(context, tensor(pack(values, kind), kind, values.shape), 0, 2, 1, 3)
            return made

        q = _permute(context, tensor(data.q, GT.F32, data.q.shape), 0, 2, 1, 3)
        k, v = cache(data.k, case.type_k), cache(data.v, case.type_v)
        mask = None if case.mask is None else tensor(case.mask.astype(np.float16), GT.F16, case.mask.shape)
        out = _flash(context, q, k, v, mask, case.head_k**-0.5, case.max_bias, case.softcap)
        if case.sinks:
            _add_sinks(out, tensor(data.sinks, GT.F32, data.sinks.shape))
        graph = _new_graph(context)
        _expand(graph, out)
        yield context, graph, out, contents
    finally:
        _free(context)


def nmse(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Normalized mean squared error, the measure of test-backend-ops (5e-4 there)."""
    return float(((got - want) ** 2).sum() / (want**2).sum())


def window(n_kv: int, n_tokens: int, width: int, sinks: int = 0) -> np.ndarray[Any, Any]:
    """The last cells are the tokens themselves, each sees `width` of them and the first `sinks`."""
    query = np.arange(n_kv - n_tokens, n_kv)[:, None]
    key = np.arange(n_kv)[None, :]
    seen = (key <= query) & ((query - key < width) | (key < sinks))
    return np.where(seen, 0, -np.inf)[None, None].astype(np.float32)


def scattered(n_kv: int, n_tokens: int, share: float, n_stream: int = 1) -> np.ndarray[Any, Any]:
    """Every token sees some cells, here and there, with a bias that F16 holds exactly."""
    seen = RNG.random((n_stream, 1, n_tokens, n_kv)) < share
    seen[..., 0] = True
    bias = RNG.integers(-16, 1, seen.shape) / 8
    return np.where(seen, bias, -np.inf).astype(np.float32)
