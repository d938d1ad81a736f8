"""Asks whether this CPU can run the libraries, before any of them is loaded.

A build for the machine that it is made on (GGML_NATIVE, the default) ends by SIGILL on a CPU that lacks what the
compiler used, and wheels move: in caches, container layers and shared homes.
"""

from __future__ import annotations

import ctypes
import os
import pathlib

REBUILD = (
    "`uv sync --reinstall-package llama-cpp-python`, or with pip "
    "`pip install --force-reinstall --no-deps ./patches`, in a checkout of swaa-local"
)
SKIP_ENV = "LLAMA_CPP_SKIP_CPU_CHECK"
_FILE_NAMES = (
    "libllama-cpp-sentinel.so",
    "libllama-cpp-sentinel.dylib",
    "llama-cpp-sentinel.dll",
    "libllama-cpp-sentinel.dll",
)
_SHOWN = 4


class UnsuitableCPU(RuntimeError):
    """The libraries were built for another CPU. `lacking`: the instruction sets, as /proc/cpuinfo names them."""

    def __init__(self, lacking: list[str]) -> None:
        self.lacking = lacking
        shown = ", ".join(name.upper() for name in lacking[:_SHOWN])
        more = len(lacking) - _SHOWN
        if more > 0:
            shown += f" and {more} more"
        super().__init__(
            "llama-cpp-python was built for another CPU, with instructions that this one lacks "
            f"({shown}); build it for this machine: {REBUILD}"
        )


def find_sentinel(base_path: pathlib.Path) -> pathlib.Path | None:
    """The sentinel's library beside the others; None in a build without one."""
    paths = (base_path / name for name in _FILE_NAMES)
    return next((path for path in paths if path.is_file()), None)


def lacking_features(sentinel: ctypes.CDLL) -> list[str]:
    """What the libraries may use and this CPU, or its system, does not have."""
    sentinel.llama_cpp_sentinel_built_for.restype = ctypes.c_char_p
    names = sentinel.llama_cpp_sentinel_built_for().decode().split()
    return [name for name in names if sentinel.llama_cpp_sentinel_cpu_has(name.encode()) == 0]


def check_cpu(base_path: pathlib.Path) -> None:
    """Raises `UnsuitableCPU`."""
    path = find_sentinel(base_path)
    if path is None or os.environ.get(SKIP_ENV):
        return
    lacking = lacking_features(ctypes.CDLL(str(path)))
    if lacking:
        raise UnsuitableCPU(lacking)
