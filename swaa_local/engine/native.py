"""The C interface that the patches add to `llama.h`, declared for ctypes, and the sentinel beside it; nothing else.

Pointers are the ones that `llama_cpp.llama_cpp` hands out (`llama_model_p`, `llama_context_p`). Importing this module
loads the engine, and fails with one sentence if the installed llama-cpp-python is not the patched build.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from swaa_local.errors import SWAAError

REMEDY = "run `pip install ./patches` (or `uv sync`) in a checkout of swaa-local to build the patched one"


# What a driver brings and no wheel holds: the beginnings of the libraries' names, and where they come from.
_DRIVERS = {
    ("libvulkan.", "vulkan-1."): "the Vulkan loader (Debian and Ubuntu: apt-get install libvulkan1; Fedora: dnf "
    "install vulkan-loader; else the GPU's driver)",
    ("libcuda.", "nvcuda."): "NVIDIA's driver",
    ("libcudart.", "libcublas.", "libcublasLt.", "cudart64_", "cublas64_"): "the CUDA toolkit that it was built with",
}


def remedy_of(reason: str) -> str:
    """What helps where the engine's library does not load. reason: the system's words, which name what is missing."""
    for names, source in _DRIVERS.items():
        if any(name in reason for name in names):
            return f"install {source}, or build without that GPU: unset CMAKE_ARGS, and {REMEDY}"
    return REMEDY


class EngineMissing(SWAAError, ImportError):
    """The patched llama-cpp-python is not installed, or does not load."""


try:
    import llama_cpp
    from llama_cpp import llama_cpp as _c
except ImportError as error:
    raise EngineMissing(f"llama-cpp-python does not import ({error}); {REMEDY}") from error
except (OSError, RuntimeError) as error:  # upstream's loader: no library, or one that does not load
    if hasattr(error, "lacking"):  # llama_cpp._sentinel.UnsuitableCPU, which names its own remedy
        raise EngineMissing(str(error)) from error
    raise EngineMissing(f"llama-cpp-python's library does not load ({error}); {remedy_of(str(error))}") from error


def _load_sentinel() -> ctypes.CDLL | None:
    try:
        from llama_cpp._sentinel import find_sentinel
    except ImportError:  # a build of before there was one
        return None
    path = find_sentinel(Path(_c._lib._name).parent)
    return None if path is None else ctypes.CDLL(str(path))


sentinel = _load_sentinel()
"""sentinel/sentinel.h in the engine's sources; None in a build without it."""


def engine_program(name: str, option: str) -> Path:
    """A program of the installed engine, which lies beside its libraries. Raises `EngineMissing`.

    option: CMake's, that leaves it out.
    """
    program = Path(_c._lib._name).parent / (f"{name}.exe" if os.name == "nt" else name)
    if not program.is_file():
        raise EngineMissing(
            f"the installed llama-cpp-python has no {name} ({program} is missing); {REMEDY}, "
            f"without {option}=OFF in CMAKE_ARGS"
        )
    return program


def _declare(name: str, argtypes: list[Any], restype: Any) -> Any:
    try:
        function = getattr(_c._lib, name)
    except AttributeError:
        raise EngineMissing(
            f"the installed llama-cpp-python {llama_cpp.__version__} lacks the attention schedule ({name}); {REMEDY}"
        ) from None
    function.argtypes = argtypes
    function.restype = restype
    return function


# int32_t llama_model_swaa_set(
#     struct llama_model *, uint32_t window, uint32_t sinks, const uint8_t * modes, size_t n_layer)
# Replaces the schedule of the model; before a context is created. 0 on success; the reason of a failure is logged.
llama_model_swaa_set = _declare(
    "llama_model_swaa_set",
    [
        _c.llama_model_p_ctypes,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_uint8),
        ctypes.c_size_t,
    ],
    ctypes.c_int32,
)

# bool llama_model_swaa_get(
#     const struct llama_model *, uint32_t * window, uint32_t * sinks, uint8_t * modes, size_t n_layer)
# False: the model has no schedule.
llama_model_swaa_get = _declare(
    "llama_model_swaa_get",
    [
        _c.llama_model_p_ctypes,
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint8),
        ctypes.c_size_t,
    ],
    ctypes.c_bool,
)

# int32_t llama_model_swaa_n_head_kv(const struct llama_model *, int32_t il)
# Heads of K and V of a layer; 0: it has no attention.
llama_model_swaa_n_head_kv = _declare(
    "llama_model_swaa_n_head_kv", [_c.llama_model_p_ctypes, ctypes.c_int32], ctypes.c_int32
)

# uint32_t llama_model_swaa_tail(const struct llama_model *)
# Tokens of the tail; 0 without one. The engine keeps it for programs, which set the prompt end by it.
llama_model_swaa_tail = _declare("llama_model_swaa_tail", [_c.llama_model_p_ctypes], ctypes.c_uint32)

# int32_t llama_model_swaa_set_tail(struct llama_model *, uint32_t tail)
# 0 on success; llama_model_swaa_set begins without a tail.
llama_model_swaa_set_tail = _declare(
    "llama_model_swaa_set_tail", [_c.llama_model_p_ctypes, ctypes.c_uint32], ctypes.c_int32
)

# int32_t llama_model_swaa_layer(const struct llama_model *, int32_t il)
# 0: the layer can have any mode; > 0: it has a window of the model's own, of so many tokens; -1: there is no such one;
# -2: it is recurrent; -3: it has no attention.
llama_model_swaa_layer = _declare("llama_model_swaa_layer", [_c.llama_model_p_ctypes, ctypes.c_int32], ctypes.c_int32)

# void llama_swaa_set_prompt_end(struct llama_context *, llama_seq_id, llama_pos)
# Positions from `pos` on are decode for this sequence; -1: automatic.
llama_swaa_set_prompt_end = _declare(
    "llama_swaa_set_prompt_end", [_c.llama_context_p_ctypes, _c.llama_seq_id, _c.llama_pos], None
)

# int32_t llama_model_swaa_set_draft(struct llama_model *, uint32_t window, uint32_t sinks)
# What drafted tokens see in contexts that are created from now on; a window of 0: there are none. 0 on success.
llama_model_swaa_set_draft = _declare(
    "llama_model_swaa_set_draft", [_c.llama_model_p_ctypes, ctypes.c_uint32, ctypes.c_uint32], ctypes.c_int32
)

# bool llama_swaa_set_draft_start(struct llama_context *, llama_seq_id, llama_pos)
# Positions from `pos` on are drafted for this sequence; -1: none are. False: the context does not draft.
llama_swaa_set_draft_start = _declare(
    "llama_swaa_set_draft_start", [_c.llama_context_p_ctypes, _c.llama_seq_id, _c.llama_pos], ctypes.c_bool
)

# size_t llama_swaa_kv_bytes(const struct llama_context *)
# Bytes of the context's KV cache, rings included, by the engine's own accounting.
llama_swaa_kv_bytes = _declare("llama_swaa_kv_bytes", [_c.llama_context_p_ctypes], ctypes.c_size_t)

# ggml_backend_dev_t llama_model_layer_dev(const struct llama_model *, int32_t il)
# The device of a layer; of the output for the number of layers.
llama_model_layer_dev = _declare("llama_model_layer_dev", [_c.llama_model_p_ctypes, ctypes.c_int32], ctypes.c_void_p)

# ggml_backend_dev_t llama_lost_dev(const struct llama_context *)
# A device that is gone for good, and the context with it, or NULL.
llama_lost_dev = _declare("llama_lost_dev", [_c.llama_context_p_ctypes], ctypes.c_void_p)

# ggml_abort_callback_t ggml_set_abort_callback(ggml_abort_callback_t)
# Upstream's: called with the reason instead of printing it and a backtrace, before the process is aborted.
ggml_set_abort_callback = _declare("ggml_set_abort_callback", [ctypes.c_void_p], ctypes.c_void_p)
