"""The portable build: a CPU backend for each kind of CPU, of which the best one is loaded, and each of them right.

SWAA_PORTABLE_LIB=DIR names the folder of its libraries, as a wheel of scripts/wheels.py holds them. Without it all is
skipped: building it takes long.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wheels
from tests.support.libraries import linked
from tests.support.program import ROOT, environment, run

LIBRARIES = Path(os.environ.get("SWAA_PORTABLE_LIB", ""))
pytestmark = [
    pytest.mark.skipif("SWAA_PORTABLE_LIB" not in os.environ, reason="SWAA_PORTABLE_LIB names no portable build"),
    pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo"),
]
_KERNELS = ("test_cpu_decode.py", "test_cpu_prefill.py", "test_masks.py")

# What each variant of ggml's x86 backend is built for, in the words of /proc/cpuinfo; from the least to the best.
_SANDYBRIDGE = {"sse4_2", "avx"}
_HASWELL = {*_SANDYBRIDGE, "f16c", "fma", "avx2", "bmi2"}
_SKYLAKEX = {*_HASWELL, "avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}
NEEDS = {
    "x64": set[str](),
    "sse42": {"sse4_2"},
    "sandybridge": _SANDYBRIDGE,
    "ivybridge": {*_SANDYBRIDGE, "f16c"},
    "piledriver": {*_SANDYBRIDGE, "f16c", "fma"},
    "haswell": _HASWELL,
    "alderlake": {*_HASWELL, "avx_vnni"},
    "skylakex": _SKYLAKEX,
    "cannonlake": {*_SKYLAKEX, "avx512vbmi"},
    "cascadelake": {*_SKYLAKEX, "avx512_vnni"},
    "icelake": {*_SKYLAKEX, "avx512vbmi", "avx512_vnni"},
    "cooperlake": {*_SKYLAKEX, "avx512_vnni", "avx512_bf16"},
    "zen4": {*_SKYLAKEX, "avx512vbmi", "avx512_vnni", "avx512_bf16"},
    "sapphirerapids": {*_SKYLAKEX, "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"},
}


def flags() -> set[str]:
    """What this CPU has and its system allows."""
    [*_, line] = re.findall(r"^flags\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(line.split())


def test_the_build_has_every_variant() -> None:
    assert {file.stem.removeprefix("libggml-cpu-") for file in LIBRARIES.glob("libggml-cpu-*.so")} == set(NEEDS)


def test_it_needs_no_instructions_beyond_the_oldest_cpu_s() -> None:
    sentinel = ctypes.CDLL(str(LIBRARIES / "libllama-cpp-sentinel.so"))
    sentinel.llama_cpp_sentinel_built_for.restype = ctypes.c_char_p
    assert sentinel.llama_cpp_sentinel_built_for() == b""


def test_the_best_variant_for_this_cpu_is_loaded(tmp_path: Path) -> None:
    best = [name for name, needed in NEEDS.items() if needed <= flags()][-1]
    arguments = ("demo", "--no-chat", "--threads=1", "--questions=1", "--length=768", "--verbose")
    done = run(*arguments, cwd=tmp_path, LLAMA_CPP_LIB_PATH=str(LIBRARIES))
    assert done.returncode == 0, done.stderr
    assert wheels.loaded_variant(done.stderr) == best


@pytest.mark.parametrize("command", ["demo --no-chat --questions=1 --length=768", "eval --samples=1 --length=512"])
def test_what_was_loaded_is_told_only_if_asked(command: str, tmp_path: Path) -> None:
    arguments = (*command.split(), "--threads=1")
    done = run(*arguments, cwd=tmp_path, LLAMA_CPP_LIB_PATH=str(LIBRARIES))
    assert done.returncode == 0, done.stderr
    assert "load_backend" not in done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", NEEDS)
def test_each_variant_computes_attention_right(variant: str, tmp_path: Path) -> None:
    """The tests of the kernels and of the masks, with this variant alone."""
    if missing := NEEDS[variant] - flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    libraries = linked(
        LIBRARIES, tmp_path, lambda name: name == f"libggml-cpu-{variant}.so" or not name.startswith("libggml-cpu-")
    )
    tests = [str(ROOT / "tests" / "engine" / name) for name in _KERNELS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        env=environment(LLAMA_CPP_LIB_PATH=str(libraries)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cpu", ["Nehalem", "Haswell-noTSX"])
def test_an_older_cpu_answers_right(cpu: str, tmp_path: Path) -> None:
    """The bundled model on an imitated CPU, without AVX2 and without AVX-512."""
    if not wheels.qemu():
        pytest.skip(f"{wheels.QEMU} is not on PATH")
    clean = environment(LLAMA_CPP_LIB_PATH=str(LIBRARIES))
    clean.pop("OPENBLAS_CORETYPE", None)  # numpy's choice for the real CPU
    wheels.try_older(cpu, [sys.executable, "-m", "swaa_local"], clean, tmp_path)
