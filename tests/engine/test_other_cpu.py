"""An engine that was built for another CPU says so when it is loaded, and no instruction of it runs before.

Other CPUs are QEMU's, or a record of instruction sets that no CPU has together.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_local.engine import native
from swaa_local.files import signals
from tests.support.program import ROOT, environment, fails, run, succeeds

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="asks a CPU of x86-64")
ENGINE = Path(native._c._lib._name).parent
BUNDLED = ROOT / "swaa_local" / "assets" / "needle.gguf"

# Names of /proc/cpuinfo, and of llama.cpp's line on what it was compiled for.
IN_CPUINFO = {"sse3": "pni", "lzcnt": "abm"}
IN_SYSTEM_INFO = {
    "sse3": "SSE3",
    "ssse3": "SSSE3",
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "bmi2": "BMI2",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
}
# Sandy Bridge (2011): Intel's manual of the day.
SANDY_BRIDGE = {"sse3", "ssse3", "sse4_1", "sse4_2", "popcnt", "aes", "pclmulqdq", "avx"}
# AMD's last CPUs with XOP are older than any with AVX-512.
IMPOSSIBLE = ("xop", "avx512f")


@pytest.fixture(scope="module")
def sentinel() -> ctypes.CDLL:
    assert native.sentinel is not None
    return native.sentinel


def built_for(sentinel: ctypes.CDLL) -> list[str]:
    sentinel.llama_cpp_sentinel_built_for.restype = ctypes.c_char_p
    return sentinel.llama_cpp_sentinel_built_for().decode().split()


def known_names() -> list[str]:
    """What the record may hold on x86-64."""
    source = sources()["cpu-built-for.c"].split("#elif")[0]
    return re.findall(r'^    " (\w+)"$', source, re.MULTILINE)


@functools.cache
def sources() -> dict[str, str]:
    """The sentinel's files as the engine is built from them."""
    return {path.name: path.read_text() for path in (ROOT / "patches" / "src" / "sentinel").iterdir()}


def compile_sentinel(folder: Path, *flags: str, record: str | None = None) -> ctypes.CDLL:
    """The sentinel, its record compiled with these flags or replaced."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    files = sources() | ({"cpu-built-for.c": f'const char llama_cpp_built_for[] = "{record}";\n'} if record else {})
    for name, text in files.items():
        (folder / name).write_text(text)
    library = folder / "libllama-cpp-sentinel.so"
    for command in (
        [compiler, "-fPIC", *flags, "-c", "cpu-built-for.c", "-o", "record.o"],
        [compiler, "-fPIC", "-shared", "cpu-check.c", "last-words.c", "record.o", "-o", str(library)],
    ):
        subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(library))


# What is asked of the CPU


@x86
def test_the_record_is_what_the_engine_was_compiled_for(sentinel: ctypes.CDLL) -> None:
    if not list(ENGINE.glob("*ggml-cpu.*")):
        assert built_for(sentinel) == []  # variants, of which the engine takes one that runs
        return
    compiled = dict(re.findall(r"(\w+) = (\d)", native._c.llama_print_system_info().decode()))
    record = built_for(sentinel)
    assert {name for name, theirs in IN_SYSTEM_INFO.items() if compiled.get(theirs) == "1"} == (
        set(IN_SYSTEM_INFO) & set(record)
    )
    assert set(record) <= set(known_names())


def test_it_runs_where_it_was_built(sentinel: ctypes.CDLL) -> None:
    assert [name for name in built_for(sentinel) if sentinel.llama_cpp_sentinel_cpu_has(name.encode()) != 1] == []


@x86
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's list is the oracle")
def test_what_the_kernel_lists_is_there(sentinel: ctypes.CDLL) -> None:
    [flags] = re.findall(r"^flags\s*: (.+)$", Path("/proc/cpuinfo").read_text().split("\n\n")[0], re.MULTILINE)
    listed = set(flags.split())
    names = known_names()
    assert len(names) > 40
    for name in names:
        has = sentinel.llama_cpp_sentinel_cpu_has(name.encode())
        assert has in (0, 1), name
        # an older kernel does not name every instruction set
        assert has == 1 or IN_CPUINFO.get(name, name) not in listed, name
    for name in ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "sse4_2", "sse4a", "xop"):
        assert sentinel.llama_cpp_sentinel_cpu_has(name.encode()) == (name in listed), name


def test_a_name_that_it_does_not_know_is_not_judged(sentinel: ctypes.CDLL) -> None:
    assert sentinel.llama_cpp_sentinel_cpu_has(b"avx4096") == -1


@x86
@pytest.mark.parametrize(
    ("flags", "has", "has_not"),
    [
        (["-march=x86-64"], set(), {"sse3", "avx", "avx2"}),
        # some of them were sold without AES
        (["-march=sandybridge"], SANDY_BRIDGE - {"aes"}, {"avx2", "fma", "f16c", "bmi2", "avx512f"}),
        (["-march=haswell"], {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "lzcnt"}, {"avx512f"}),
        (["-march=bdver2"], {"avx", "xop", "fma4", "tbm", "sse4a"}, {"avx2", "avx512f"}),
        (["-march=icelake-server"], {"avx512f", "avx512_vnni", "avx512_bitalg", "gfni", "vaes"}, {"avx512_bf16"}),
        # ggml asks for AMX when it runs
        (["-march=x86-64", "-mamx-tile", "-mamx-int8"], set(), {"amx_tile", "amx_int8"}),
    ],
)
def test_the_record_follows_the_flags(tmp_path: Path, flags: list[str], has: set[str], has_not: set[str]) -> None:
    record = set(built_for(compile_sentinel(tmp_path, *flags)))
    assert has <= record <= set(known_names())
    assert not record & has_not


# What is said of it


@pytest.fixture(scope="module")
def foreign_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed engine, whose record names what this CPU lacks."""
    folder = tmp_path_factory.mktemp("foreign")
    for file in ENGINE.iterdir():
        if "sentinel" not in file.name:
            (folder / file.name).symlink_to(file)
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("asks a CPU of x86-64")
    compile_sentinel(folder, record=" ".join(("", *IMPOSSIBLE)))
    return folder


COMMANDS = [
    ("demo", "--no-chat"),
    ("eval",),
    ("chat", "-p", "x"),
    ("bench", str(BUNDLED)),
    ("serve", "--port", "0"),
    ("serve", "--server-help"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_every_command_that_loads_the_engine_says_so(foreign_engine: Path, command: tuple[str, ...]) -> None:
    error = fails(*command, LLAMA_CPP_LIB_PATH=str(foreign_engine))
    assert "llama-cpp-python was built for another CPU" in error
    assert re.search(r"lacks \((XOP|AVX512F|XOP, AVX512F)\)", error)
    assert f"build it for this machine: {signals.REBUILD}" in error


def test_the_quantizer_says_so(foreign_engine: Path, tiny_model: Path, tmp_path: Path) -> None:
    command = ("convert", tiny_model, "-o", tmp_path / "m.gguf", "--outtype", "q8_0", "--no-swaa")
    error = fails(*command, LLAMA_CPP_LIB_PATH=str(foreign_engine))
    assert "llama-cpp-python was built for another CPU" in error
    assert not list(tmp_path.iterdir())


def test_what_needs_no_engine_works(foreign_engine: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = str(foreign_engine)
    assert "schedule" in succeeds("inspect", tiny_model, LLAMA_CPP_LIB_PATH=folder)
    done = run("convert", tiny_model, "-o", tmp_path / "m.gguf", "--window", "64", LLAMA_CPP_LIB_PATH=folder)
    assert done.returncode == 0, done.stderr
    assert "not checked by the engine: llama-cpp-python was built for another CPU" in done.stderr


@pytest.mark.parametrize("program", ["import llama_cpp", "from swaa_local import Llama"])
def test_a_program_gets_an_exception(foreign_engine: Path, program: str) -> None:
    code = f"try:\n    {program}\nexcept (RuntimeError, ImportError) as error:\n    print(error)"
    env = environment(LLAMA_CPP_LIB_PATH=str(foreign_engine))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("llama-cpp-python was built for another CPU")
    assert len(done.stdout.splitlines()) == 1


def test_the_check_can_be_left_out(foreign_engine: Path) -> None:
    env = environment(LLAMA_CPP_LIB_PATH=str(foreign_engine), LLAMA_CPP_SKIP_CPU_CHECK="1")
    subprocess.run([sys.executable, "-c", "import swaa_local.engine.native"], env=env, check=True)


def test_both_packages_name_one_command() -> None:
    from llama_cpp._sentinel import REBUILD

    assert REBUILD == signals.REBUILD


# Another CPU, as QEMU has it


@pytest.fixture(scope="module")
def sandy_bridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python interpreter on a CPU without AVX2. Its own child processes run there too."""
    qemu = shutil.which("qemu-x86_64")
    if not qemu:
        if os.environ.get("SWAA_REQUIRE_QEMU"):
            pytest.fail("SWAA_REQUIRE_QEMU is set, and qemu-x86_64 is missing")
        pytest.skip("needs qemu-x86_64")
    if platform.machine() != "x86_64" or not set(built_for(native.sentinel)) - SANDY_BRIDGE:  # type: ignore[arg-type]
        pytest.skip("this engine runs on that CPU too")
    python = tmp_path_factory.mktemp("sandy-bridge") / "python"
    python.write_text(f'#!/bin/sh\nexec {qemu} -cpu SandyBridge {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_qemus_cpu_is_told_right(sandy_bridge: Path) -> None:
    program = (
        "import ctypes, json, sys\n"
        "sentinel = ctypes.CDLL(sys.argv[1])\n"
        "print(json.dumps({n: sentinel.llama_cpp_sentinel_cpu_has(n.encode()) for n in sys.argv[2:]}))"
    )
    library = str(native.sentinel and native.sentinel._name)
    done = subprocess.run(
        [sandy_bridge, "-c", program, library, *known_names()], capture_output=True, text=True, check=True
    )
    assert {name for name, has in json.loads(done.stdout).items() if has} == SANDY_BRIDGE


@pytest.mark.parametrize(
    "command",
    [*COMMANDS[:1], COMMANDS[4], ("convert", "{model}", "-o", "{out}", "--outtype", "q8_0", "--no-swaa")],
    ids=lambda command: command[0],
)
def test_no_illegal_instruction_on_another_cpu(
    sandy_bridge: Path, command: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    words = [word.format(model=tiny_model, out=tmp_path / "m.gguf") for word in command]
    program = (
        "import sys; sys.executable = sys.argv.pop(1)\n"
        "from swaa_local.cli.main import main; main(prog_name='swaa-local')"
    )
    done = subprocess.run(
        [sandy_bridge, "-c", program, sandy_bridge, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert re.search(r"another CPU, with instructions that this one lacks \([^)]*\b(AVX2|FMA)\b", done.stderr)
