"""What something is measured on and with. Knows the operating system's accounts and llama.cpp's devices."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import llama_cpp
from llama_cpp import llama_cpp as _c

from swaa_local.engine import memory
from swaa_local.report.machine import Machine


def describe_machine(version: str) -> Machine:
    """version: of swaa-local."""
    return Machine(
        cpu=cpu_name(),
        gpus=memory.gpu_names(),
        system=platform.platform(),
        system_info=_c.llama_print_system_info().decode(errors="replace").strip(),
        engine=llama_cpp_version(),
        version=version,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def llama_cpp_version() -> str:
    """With the patches' part (+swaa.N), where the distribution is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return str(llama_cpp.__version__)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
