"""What a build says while it runs and when it fails.

`watched` stands between CMake and whoever reads this process's output: it passes on what CMake decides and how far
the build is, keeps everything in a log, and finds the first error in it. It knows what compilers and CMake print;
nothing of what is built.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

REPORT_EVERY_S = 15.0
_REDRAWN_LINES = 4

# ninja, and make under CMake
_STEP = re.compile(r"^\[ *(?:(?P<done>\d+)/(?P<total>\d+)|(?P<percent>\d+)%)\] ")
_ERROR = re.compile(
    r"""
      ^(?:c\+\+|cc|g\+\+|gcc|clang\S*|cc1plus|nvcc)\S*:\ .*(?:fatal\ )?error:\ .+   # the compiler itself
    | ^\S.*?(?::\d+){1,2}:\ (?:fatal\ )?error:\ .+                             # GCC, Clang
    | ^\S.*?\(\d+\)\ ?:\ (?:fatal\ )?error\b.+                                 # nvcc, MSVC
    | .*undefined\ (?:reference|symbol).+
    | .*No\ space\ left\ on\ device.*
    | ^ld(?:\.\w+)?:\ .*(?:cannot\ find|error).+
    | ^(?:ninja|make(?:\[\d+\])?):\ (?:fatal|\*\*\*|error).+
    | ^nvcc\ fatal\b.+
    | ^npm\ (?:ERR!|error)\ .+
    """,
    re.VERBOSE,
)
_CMAKE_ERROR = re.compile(r"^CMake Error(?: at (?P<where>\S+:\d+))?.*?:\s*(?P<text>.*)$")
# What CMake says of a GPU's tools that it lacks, and what brings them.
_LACKS = {
    re.compile(r"Vulkan|SPIRV-Headers"): "install what builds for Vulkan: Debian and Ubuntu: apt-get install "
    "libvulkan-dev glslc spirv-headers; Fedora: dnf install vulkan-devel glslc spirv-headers-devel; elsewhere the "
    "Vulkan SDK",
    re.compile(r"CUDA Toolkit|CMAKE_CUDA_COMPILER|nvcc"): "install NVIDIA's CUDA toolkit, and put its nvcc on PATH",
}
_KILLED = re.compile(r"Killed|signal (?:9|terminated)", re.IGNORECASE)


class BuildError(Exception):
    """The build failed; the message names its first error and where the whole output is."""


class Findings:
    """Reads a build's output line by line; `reason` is its first error."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.done, self.total = 0, 0
        self.configuring = True
        self._last = ""
        self._cmake: str | None = None
        self._killed = False

    def read(self, line: str) -> bool:
        """Take one line in; True for a line that says how far the build is."""
        text = line.rstrip()
        if step := _STEP.match(text):
            self.configuring = False
            self.done = int(step["done"] or step["percent"])
            self.total = int(step["total"] or 100)
            return True
        self._killed = self._killed or bool(_KILLED.search(text))
        if self.reason is None:
            self._look(text)
        if text.strip():
            self._last = text.strip()
        return False

    def _look(self, text: str) -> None:
        if self._cmake is not None:
            # CMake's message stands below, behind blank lines and indented
            if text.strip():
                self.reason = f"{self._cmake}: {text.strip()}"
            return
        if cmake := _CMAKE_ERROR.match(text):
            self._cmake = f"CMake, {cmake['where']}" if cmake["where"] else "CMake"
            if cmake["text"]:
                self.reason = f"{self._cmake}: {cmake['text']}"
        elif _ERROR.match(text):
            self.reason = text.strip()

    def summary(self) -> str:
        """The first error, or the last line where no error was found, and what may help."""
        reason = self.reason or self._last or "it said nothing"
        if self._cmake is not None:
            reason += next((f" ({advice})" for lacks, advice in _LACKS.items() if lacks.search(reason)), "")
        if self._killed:
            reason += " (a compiler was killed, most likely for lack of memory: set CMAKE_BUILD_PARALLEL_LEVEL=1)"
        return reason


def tell(text: str) -> None:
    """Say it in the build's output, and on the terminal, from which pip and uv keep that output."""
    print(text, flush=True)
    if sys.stdout.isatty() or sys.platform == "win32":
        return
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        # pip and uv redraw the last few lines: what stands above them stays.
        terminal.write(f"\r\x1b[2K{text}" + "\n" * _REDRAWN_LINES)


@contextlib.contextmanager
def watched(what: str, log: Path) -> Iterator[None]:
    """While the block runs, all that this process and its children print goes to `log`, and a digest to stdout.

    what: the name of what is built. Raises `BuildError` where the block ends with an exception or with an exit code;
    the log stays then, and is removed otherwise.
    """
    findings = Findings()
    sys.stdout.flush()
    sys.stderr.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)
    began_s = time.monotonic()
    failed = True
    with open(reading, "rb") as source, log.open("wb") as kept, open(stdout, "w", encoding="utf-8") as target:
        reader = threading.Thread(target=_read, args=(source, kept, target, findings, what, began_s))
        reader.start()
        try:
            yield
            failed = False
        except SystemExit as stop:
            failed = stop.code not in (None, 0)
            if not failed:
                raise
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stderr)
            reader.join()
    if failed:
        raise BuildError(f"{what} does not build: {findings.summary()} (all output: {log})")
    log.unlink()


def _read(source: IO[bytes], kept: IO[bytes], target: IO[str], findings: Findings, what: str, began_s: float) -> None:
    said_s = 0.0
    for raw in source:
        kept.write(raw)
        kept.flush()
        line = raw.decode("utf-8", "replace")
        is_step, now_s = findings.read(line), time.monotonic()
        if findings.configuring:
            target.write(line)
        elif is_step and (now_s - said_s >= REPORT_EVERY_S or findings.done == findings.total):
            said_s = now_s
            target.write(f"{what}: {findings.done} of {findings.total} steps, {now_s - began_s:.0f} s\n")
        else:
            continue
        target.flush()
