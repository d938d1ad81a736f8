"""ggml's devices: which there are, what they are called, what they have free, and for which the engine is built.

Knows ggml's device interface, which every build has, and the names of its libraries; nothing of models. A device is a
pointer of ggml's, which lives as long as the process.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as _c

_GPU, _IGPU = 1, 2  # ggml_backend_dev_type
_GPU_BACKENDS = {
    "cuda": "CUDA",
    "hip": "ROCm",
    "metal": "Metal",
    "musa": "MUSA",
    "opencl": "OpenCL",
    "sycl": "SYCL",
    "vulkan": "Vulkan",
    "webgpu": "WebGPU",
}
"""In the name of the library -> as people know it."""
_lib = _c._lib
_size_p = ctypes.POINTER(ctypes.c_size_t)


class _Props(ctypes.Structure):
    """struct ggml_backend_dev_props, up to what is used of it, and room for the rest."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("rest", ctypes.c_uint8 * 64),
    )


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_lib, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_dev_count = _function("ggml_backend_dev_count", ctypes.c_size_t)
_dev_get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_dev_type = _function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_dev_name = _function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_dev_description = _function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
_dev_memory = _function("ggml_backend_dev_memory", None, ctypes.c_void_p, _size_p, _size_p)
_dev_props = _function("ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_Props))
_dev_reg = _function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
_reg_name = _function("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
_reg_by_name = _function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
_reg_dev_count = _function("ggml_backend_reg_dev_count", ctypes.c_size_t, ctypes.c_void_p)
_reg_dev_get = _function("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_reg_proc = _function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


def this_machines() -> list[int]:
    """All devices of this machine, the CPU's too."""
    return [_dev_get(index) for index in range(_dev_count())]


def gpus() -> list[int]:
    """GPUs of this machine."""
    return [device for device in this_machines() if is_gpu(device)]


def name_of(device: int) -> str:
    """As llama.cpp's options call it: CPU, CUDA0."""
    return str(_dev_name(device).decode(errors="replace"))


def description_of(device: int) -> str:
    """The model of a GPU or CPU; a worker's address."""
    return str(_dev_description(device).decode(errors="replace"))


def free_bytes(devices: Sequence[int]) -> int | None:
    """Free memory of these devices together, by their own account; None if they do not tell."""
    found = 0
    for device in devices:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found += free.value
    return found or None


def is_gpu(device: int) -> bool:
    """Integrated ones too."""
    return _dev_type(device) in (_GPU, _IGPU)


def usual() -> list[int]:
    """This machine's GPUs as llama.cpp chooses them for layers: each once, and integrated ones if there is no other.

    Of integrated ones, those of one backend: a second one sees the same.
    """
    found = gpus()
    discrete = [device for device in found if _dev_type(device) == _GPU]
    integrated = [device for device in found if _dev_reg(device) == _dev_reg(found[0])]
    chosen: dict[bytes | int, int] = {}
    for device in discrete or integrated:
        props = _Props()
        _dev_props(device, ctypes.byref(props))
        chosen.setdefault(props.device_id or device, device)
    return list(chosen.values())


def built_for() -> tuple[str, ...]:
    """The kinds of GPU for which the engine has a backend, as their makers spell them; empty for CPUs alone."""
    return _backends_in(Path(_lib._name).parent)


def _backends_in(libraries: Path) -> tuple[str, ...]:
    files = [file.name for file in libraries.glob("*ggml-*")]
    return tuple(
        name
        for part, name in _GPU_BACKENDS.items()
        if any(re.fullmatch(rf"(lib)?ggml-{part}\.(so|dylib|dll)", file) for file in files)
    )


def is_workers(device: int) -> bool:
    """Whether this device is a worker's."""
    return bool(_reg_name(_dev_reg(device)) == b"RPC")


def rpc_function(name: str, restype: Any, *argtypes: Any) -> Any:
    """A function of the RPC backend's own; None if this build has no such backend."""
    backend = _reg_by_name(b"RPC")
    return ctypes.CFUNCTYPE(restype, *argtypes)(_reg_proc(backend, name.encode())) if backend else None


def of_server(server: int) -> list[int]:
    """What an RPC server lends. server: as the RPC backend's `ggml_backend_rpc_add_server` gives it."""
    return [_reg_dev_get(server, index) for index in range(_reg_dev_count(server))]
