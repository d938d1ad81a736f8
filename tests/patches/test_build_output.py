"""What a build of the engine says: how far it is, and of a failure the first error instead of the last page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build_output import Findings
from tests.support.upstream import BUILDABLE, FILES, Project, make_project

GCC = """
[1/9] Building CXX object a.o
../src/a.cpp: In function 'int f()':
../src/a.cpp:7:3: warning: unused variable 'x' [-Wunused-variable]
[2/9] Building CXX object b.o
FAILED: b.o
/usr/bin/c++ -Derror=1 -o b.o -c ../src/b.cpp
In file included from ../src/b.cpp:1:
../src/b.h:12:18: error: 'missing' was not declared in this scope
   12 | int x = missing;
../src/b.cpp:3:1: error: expected ';'
ninja: build stopped: subcommand failed.
"""
FAILURES = {
    "GCC": (GCC, "../src/b.h:12:18: error: 'missing' was not declared in this scope"),
    "Clang, fatal": (
        "x.cpp:3:10: fatal error: 'no.h' file not found\n",
        "x.cpp:3:10: fatal error: 'no.h' file not found",
    ),
    "nvcc": ('[ 50%] Building CUDA\na.cu(12): error: identifier "x" is undefined\n', 'a.cu(12): error: identifier "x"'),
    "MSVC": ("C:\\x\\a.cpp(3): error C2065: 'x': undeclared identifier\n", "a.cpp(3): error C2065"),
    "nvcc refuses": (
        "nvcc fatal   : Unsupported gpu architecture 'compute_999'\nninja: build stopped: subcommand failed.\n",
        "Unsupported gpu architecture",
    ),
    "the linker": ("/usr/bin/ld: a.o: undefined reference to `f'\ncollect2: error: ld\n", "undefined reference to `f'"),
    "CMake": (
        "-- Found Threads\nCMake Error at vendor/x/CMakeLists.txt:12 (message):\n\n  CUDA Toolkit not found\n\n",
        "CMake, vendor/x/CMakeLists.txt:12: CUDA Toolkit not found",
    ),
    "CMake, no Vulkan": (
        "-- Including CPU backend\n"
        "CMake Error at /usr/share/cmake/Modules/FindPackageHandleStandardArgs.cmake:230 (message):\n"
        "  Could NOT find Vulkan (missing: Vulkan_LIBRARY Vulkan_INCLUDE_DIR glslc)\n",
        "Could NOT find Vulkan (missing: Vulkan_LIBRARY Vulkan_INCLUDE_DIR glslc) (install what builds for Vulkan: "
        "Debian and Ubuntu: apt-get install libvulkan-dev glslc spirv-headers;",
    ),
    "CMake, no SPIR-V headers": (
        "CMake Error at vendor/llama.cpp/ggml/src/ggml-vulkan/CMakeLists.txt:14 (find_package):\n"
        '  Could not find a package configuration file provided by "SPIRV-Headers" with\n'
        "  any of the following names:\n",
        "apt-get install libvulkan-dev glslc spirv-headers",
    ),
    "CMake, no nvcc": (
        "CMake Error at CMakeLists.txt:9 (enable_language):\n  No CMAKE_CUDA_COMPILER could be found.\n",
        "No CMAKE_CUDA_COMPILER could be found. (install NVIDIA's CUDA toolkit",
    ),
    "a full disk": ("x.cpp: No space left on device\n", "No space left on device"),
    "nothing known": ("this and that\nthe end of it\n\n", "the end of it"),
}


def findings(output: str) -> Findings:
    found = Findings()
    for line in output.splitlines(keepends=True):
        found.read(line)
    return found


@pytest.mark.parametrize("kind", FAILURES)
def test_the_first_error_is_found(kind: str) -> None:
    output, expected = FAILURES[kind]
    assert expected in findings(output).summary()


def test_a_killed_compiler_is_a_lack_of_memory() -> None:
    summary = findings("c++: fatal error: Killed signal terminated program cc1plus\n").summary()
    assert "lack of memory: set CMAKE_BUILD_PARALLEL_LEVEL=1" in summary


def test_steps_are_counted_and_are_no_errors() -> None:
    found = findings("[ 12%] Building CXX object error.cpp:1: error: in its name\n[3/9] Building CXX object y\n")
    assert (found.done, found.total, found.reason) == (3, 9, None)


def build(project: Project, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out)]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = project.environment(PATH=tools, CMAKE_ARGS=None, TMPDIR=str(out))
    return subprocess.run(
        [*command, str(project.patches)], env=env, capture_output=True, text=True, errors="replace", timeout=200
    )


def test_a_build_says_what_it_does_and_how_far_it_is(tmp_path: Path) -> None:
    done = build(make_project(tmp_path / "project", {**FILES, **BUILDABLE}), tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "compiles llama.cpp" in said
    assert re.search(r"llama\.cpp: (\d+) of \1 steps, \d+ s", said)
    assert not list(tmp_path.glob("swaa-build*"))


def test_a_build_that_fails_names_the_first_error(tmp_path: Path) -> None:
    broken = {**FILES, **BUILDABLE, "src/other.cpp": b"int f() { return first; }\nint g() { return second; }\n"}
    failed = build(make_project(tmp_path / "project", broken), tmp_path)
    said = failed.stdout + failed.stderr
    assert failed.returncode == 1
    [sentence] = re.findall(r"^\s*(error: llama\.cpp does not build: .*)$", said, re.MULTILINE)
    assert re.search(r"other\.cpp:1:\d+: error: .*first", sentence)
    assert "second" not in said
    assert "Traceback" not in said
    [log] = tmp_path.glob("swaa-build*.log")
    assert f"all output: {log}" in sentence
    assert "second" in log.read_text()
