#!/usr/bin/env python3
"""Build the engine with AddressSanitizer and UndefinedBehaviorSanitizer, and run programs on it.

    scripts/sanitize.py build DIR                          # half an hour on two cores; again after a change of patches/
    scripts/sanitize.py build DIR --tree ../engine         # of a tree that scripts/patches.py checkout made
    scripts/sanitize.py run DIR python -m pytest tests/engine/test_ring.py tests/engine/test_state.py -q
    scripts/sanitize.py run DIR python scripts/fuzz_gguf.py -n 500 --seed 3 --sanitized

The build has libllama and its CPU backend, unstripped, without the server, and checks the bounds of standard
containers too. `run` loads it in place of the installed engine, in the command and all that it starts, and lists at its
end what the sanitizers reported, once for each place. Exit code: the command's, or 1 if there were reports. Leaks are
not looked for: Python ends with much that it never frees. Needs Linux with GCC, CMake and Ninja.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "patches"))

from source_tree import SourceError, prepare  # noqa: E402

_FLAGS = "-O1 -g1 -D_GLIBCXX_ASSERTIONS"
_DEFINES = {
    "CMAKE_BUILD_TYPE": "None",
    "CMAKE_C_FLAGS": _FLAGS,
    "CMAKE_CXX_FLAGS": _FLAGS,
    "LLAVA_BUILD": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    **{f"{part}_SANITIZE_{kind}": "ON" for part in ("GGML", "LLAMA") for kind in ("ADDRESS", "UNDEFINED")},
}
_ASAN = "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0"
_UBSAN = "print_stacktrace=1"
# "path/file.cpp:1:2: runtime error: what", and "==1==ERROR: AddressSanitizer: what on address 0x1 ..."
_UNDEFINED = re.compile(r"^(?P<where>\S+:\d+:\d+): runtime error: (?P<what>.*)$", re.MULTILINE)
_ADDRESS = re.compile(r"ERROR: AddressSanitizer: (?P<what>\S+)(?P<trace>.*)", re.DOTALL)
_FRAME = re.compile(r"#\d+ 0x\w+ in (?!__interceptor)(?P<where>.*)")


def build(directory: Path, tree: Path | None) -> None:
    """Make or renew the libraries in `directory`/out. Raises `SourceError` and `CalledProcessError`."""
    for program in ("cmake", "ninja", "gcc", "g++"):
        if shutil.which(program) is None:
            raise SourceError(f"{program} is needed to build the engine; install it")
    _runtime()
    directory.mkdir(parents=True, exist_ok=True)
    if tree is None:
        tree = directory / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        prepare(tree)
    defines = _DEFINES | {"CMAKE_C_COMPILER": "gcc", "CMAKE_CXX_COMPILER": "g++"}
    defines["SKBUILD_PLATLIB_DIR"] = str((directory / "out").resolve())
    if ccache := shutil.which("ccache"):
        defines |= {f"CMAKE_{language}_COMPILER_LAUNCHER": ccache for language in ("C", "CXX")}
    folder = directory / "build"
    configure = ["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(folder)]
    subprocess.run([*configure, *(f"-D{name}={value}" for name, value in defines.items())], check=True)
    subprocess.run(["ninja", "-C", str(folder)], check=True)
    subprocess.run(["cmake", "--install", str(folder), "--component", "python"], check=True)


def run(directory: Path, command: list[str]) -> int:
    """Run a command on the libraries in `directory`/out; its exit code, or 1 if a sanitizer reported something."""
    libraries = directory / "out" / "llama_cpp" / "lib"
    if not (libraries / "libllama.so").is_file():
        raise SourceError(f"{directory} holds no sanitized engine; make one: scripts/sanitize.py build {directory}")
    with tempfile.TemporaryDirectory(prefix="swaa-sanitize-") as folder:
        log = Path(folder, "report")
        env = os.environ | {
            "LLAMA_CPP_LIB_PATH": str(libraries.resolve()),
            "LD_PRELOAD": _runtime(),
            "ASAN_OPTIONS": f"{_ASAN}:log_path={log}",
            "UBSAN_OPTIONS": f"{_UBSAN}:log_path={log}",
            "GGML_NO_BACKTRACE": "1",
        }
        code = subprocess.run(command, env=env).returncode
        texts = [path.read_text(errors="replace") for path in Path(folder).iterdir()]
    found = reports(texts)
    for report, n in found.most_common():
        print(f"{n} x {report}")
    print(f"sanitizers: {len(found)} places in {len(texts)} processes; the command ended with {code}")
    return code or (1 if found else 0)


def reports(texts: list[str]) -> Counter[str]:
    """The reports in logs, by place and kind, and in how many processes each was made."""
    found: Counter[str] = Counter()
    for text in texts:
        of_one = {f"{match['where']}: {match['what']}" for match in _UNDEFINED.finditer(text)}
        if error := _ADDRESS.search(text):  # it ends the process, so there is one
            frame = _FRAME.search(error["trace"])
            of_one.add(f"{frame['where'] if frame else 'no stack'}: {error['what']}")
        found.update(of_one or {text.strip().splitlines()[0]} if text.strip() else set())
    return found


def _runtime() -> str:
    """What must be there before anything that was built with it: GCC's AddressSanitizer, and the C++ library, whose way
    to throw the sanitizer looks for when it starts. Python has none."""
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        said = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        path = Path(said.strip())
        if not path.is_absolute():
            raise SourceError(f"this GCC has no {name}; install it (Debian and Ubuntu: apt-get install g++)")
        paths.append(str(path.resolve()))
    return " ".join(paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="action", required=True)
    making = commands.add_parser("build", help="make or renew the sanitized engine")
    making.add_argument("directory", type=Path, metavar="DIR")
    making.add_argument("--tree", type=Path, help="a tree of the engine [made of patches/]")
    running = commands.add_parser("run", help="run a command on it")
    running.add_argument("directory", type=Path, metavar="DIR")
    running.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    try:
        if arguments.action == "build":
            build(arguments.directory, arguments.tree)
            return 0
        if not arguments.command:
            parser.error("name the command to run")
        return run(arguments.directory, arguments.command)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode


if __name__ == "__main__":
    sys.exit(main())
