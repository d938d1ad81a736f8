"""The configuration of Intel's AMX tiles, looked up in what the compiler makes of it: this needs no CPU with AMX.

A configuration that is not whole in memory ends the process by SIGILL at the first prompt, on CPUs with AMX alone.
"""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from source_tree import prepare

CPU_WITH_AMX = "-march=sapphirerapids"
SOURCE = "ggml-cpu/amx/mmq.cpp"
# Palette 1; rows and bytes a row of tiles 0 to 7: two of B, two of A, four of C (the source's own comment).
ROW_BYTES, ROWS = [64, 64, 32, 32, 64, 64, 64, 64], [8, 8, 16, 16, 16, 16, 16, 16]
CONFIGURATION = struct.pack("<BB14x16H16B", 1, 0, *ROW_BYTES, *[0] * 8, *ROWS, *[0] * 8)


def run(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched source, compiled for a CPU with AMX with the optimization of a release."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if platform.machine() not in ("x86_64", "AMD64") or not compiler:
        pytest.skip("needs a C++ compiler for x86-64")
    if subprocess.run([compiler, CPU_WITH_AMX, "-E", "-x", "c++", "/dev/null"], capture_output=True).returncode:
        pytest.skip(f"{compiler} knows no CPU with AMX")
    tree = tmp_path_factory.mktemp("upstream")
    prepare(tree)
    ggml = tree / "vendor" / "llama.cpp" / "ggml"
    output = tree / "mmq.s"
    includes = [f"-I{ggml / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    run(compiler, "-std=c++17", "-O3", "-DNDEBUG", CPU_WITH_AMX, *includes, "-S", "-o", output, ggml / "src" / SOURCE)
    return output


def test_the_tile_configuration_is_whole_in_memory(assembly: Path) -> None:
    operands = re.findall(r"^\s*ldtilecfg\s+(.+)$", assembly.read_text(), re.MULTILINE)
    assert operands
    # not on the stack, whose stores a compiler may leave out
    labels = {operand.strip().removesuffix("(%rip)") for operand in operands}
    assert all(re.fullmatch(r"[.\w]+", label) for label in labels), operands
    compiled, constants = assembly.with_suffix(".o"), assembly.with_suffix(".bin")
    run("c++", "-c", assembly, "-o", compiled)
    run("objcopy", "-O", "binary", "--only-section=.rodata", compiled, constants)
    symbols = {name: int(at, 16) for at, kind, name in re.findall(r"^(\w+) ([rR]) (\S+)$", run("nm", compiled), re.M)}
    for label in labels:
        begin = symbols[label]
        assert constants.read_bytes()[begin : begin + 64] == CONFIGURATION


def test_each_thread_that_uses_tiles_asks_for_them(assembly: Path) -> None:
    lines = assembly.read_text().splitlines()
    loads = [number for number, line in enumerate(lines) if re.match(r"\s*ldtilecfg\b", line)]
    for load in loads:
        assert any("ggml_amx_init" in line for line in lines[max(0, load - 40) : load])
