"""What llama.cpp's Metal backend says that it computes, asked on any computer.

Its answer is one function of C without a call to Metal. It is cut out of the pinned source, compiled, and given the
operations of a graph. So this tells what the backend declares, and nothing of what its kernels compute.
"""

from __future__ import annotations

import ctypes
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import llama_cpp.llama_cpp as C

_GGML = "vendor/llama.cpp/ggml/"
_METAL = f"{_GGML}src/ggml-metal/"
# The functions, whole, and those of the library that they call.
_FUNCTIONS = {
    "ggml-metal-common.cpp": (
        "static bool ggml_metal_fwht_supported_size(",
        "bool ggml_metal_op_mul_mat_use_fwht(",
        "bool ggml_metal_op_mul_mat_use_mm(",
        "bool ggml_metal_op_mul_mat_id_use_mm(",
    ),
    "ggml-metal-device.m": ("static bool ggml_metal_supports_mul_mat_op(", "bool ggml_metal_device_supports_op("),
}
_BEFORE = """
#include <stdio.h>
#include "ggml-metal-device.h"
#include "ggml-metal-common.h"
#include "ggml-metal-impl.h"
#include "ggml-impl.h"
struct ggml_metal_device { struct ggml_metal_device_props props; };
"""
_AFTER = """
bool metal_declares(const struct ggml_tensor * op, bool simdgroup_mm, bool bfloat) {
    struct ggml_metal_device device = {
        .props = {
            .max_theadgroup_memory_size = 32768,
            .has_simdgroup_reduction = true,
            .has_simdgroup_mm = simdgroup_mm,
            .has_bfloat = bfloat,
        },
    };
    return ggml_metal_device_supports_op(&device, op);
}

void metal_describe(const struct ggml_tensor * op, char * text, size_t size) {
    size_t n = (size_t) snprintf(text, size, "%s", ggml_op_desc(op));
    for (int i = 0; i < GGML_MAX_SRC && n < size; ++i) {
        if (op->src[i]) {
            n += (size_t) snprintf(text + n, size - n, " %s", ggml_type_name(op->src[i]->type));
        }
    }
    if (n < size) {
        snprintf(text + n, size - n, " -> %s", ggml_type_name(op->type));
    }
}
"""


class Gpu(NamedTuple):
    """What Metal's answer depends on. simdgroup_mm: M1, A14 and later."""

    simdgroup_mm: bool = True
    bfloat: bool = True


def function(source: str, head: str) -> str:
    """The C function that begins so, to the brace that ends it."""
    start = source.index(f"\n{head}") + 1
    return source[start : source.index("\n}\n", start) + 3]


class Metal:
    """The compiled function. sdist: the pinned archive. folder: an empty one for what is made."""

    def __init__(self, sdist: Path, folder: Path) -> None:
        with tarfile.open(sdist) as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if member.isfile() and name.startswith(_GGML) and name.endswith((".h", "-common.cpp", "-device.m")):
                    (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        parts = [
            function((folder / _METAL / file).read_text(), head) for file, heads in _FUNCTIONS.items() for head in heads
        ]
        (folder / "declares.c").write_text("\n".join([_BEFORE, *parts, _AFTER]))
        include = [f"-I{folder / where}" for where in (f"{_GGML}include", f"{_GGML}src", _METAL)]
        library = folder / "declares.so"
        command = ["cc", "-std=gnu11", "-shared", "-fPIC", *include, str(folder / "declares.c"), "-o", str(library)]
        subprocess.run(command, check=True)
        for base in Path(C._lib._name).parent.glob("*ggml-base.*"):
            ctypes.CDLL(str(base), ctypes.RTLD_GLOBAL)  # what it calls
        self._lib = ctypes.CDLL(str(library))
        self._lib.metal_declares.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool]
        self._lib.metal_declares.restype = ctypes.c_bool
        self._lib.metal_describe.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]

    def declares(self, tensor: int, gpu: Gpu = Gpu()) -> bool:  # noqa: B008 - a constant
        """Whether it computes this operation, a `ggml_tensor *`."""
        return bool(self._lib.metal_declares(tensor, *gpu))

    def describe(self, tensor: int) -> str:
        """An operation with its types: "GET_ROWS i32 i32 -> i32"."""
        text = ctypes.create_string_buffer(200)
        self._lib.metal_describe(tensor, text, len(text))
        return text.value.decode()
