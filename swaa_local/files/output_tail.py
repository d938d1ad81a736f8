"""The end of what a program writes, and the line in it that says why the program ended.

Knows what the engine, C++, glibc and Python write when they give up; nothing of processes.
"""

from __future__ import annotations

import re

# ggml_abort: "/build/ggml/src/ggml.c:12: GGML_ASSERT(n > 0) failed". A debugger's backtrace of any length follows.
_ABORT = re.compile(r"^(?:.*[/\\])?([\w.+-]+\.(?:c|cc|cpp|cu|cuh|h|hpp|m|mm)):(\d+): (.+)$")
# "terminate called after throwing an instance of 'std::runtime_error'", and in the next line what it says.
_TERMINATE = "terminate called "
_UNCAUGHT = re.compile(r"^\s*what\(\):\s*(.+)$")
_GAVE_UP = re.compile(
    r"^(terminate called .+|Fatal Python error: .+|\*\*\* .+ \*\*\*.*|double free or corruption.*|corrupted .+"
    r"|(?:free|malloc|realloc|munmap_chunk)\(\): .+)$"
)


class OutputTail:
    """Takes lines as they come and keeps what matters of them at the end."""

    def __init__(self) -> None:
        self._last_line = ""
        self._last_words = ""

    def add(self, line: str) -> None:
        if not line.strip():
            return
        self._last_line = line.strip()
        if self._last_words.startswith(_TERMINATE) and (match := _UNCAUGHT.match(line)):
            self._last_words = match[1].strip()
        elif self._last_words:
            return
        elif match := _ABORT.match(line):
            self._last_words = f"{match[1]}:{match[2]}: {match[3].strip()}"
        elif match := _GAVE_UP.match(line):
            self._last_words = match[1].strip()

    @property
    def last_words(self) -> str:
        """Why it gave up, by an assertion or an exception, however much was written after; empty if it did not say."""
        return self._last_words

    @property
    def reason(self) -> str:
        """Its last words, else its last line; empty if it wrote nothing."""
        return self._last_words or self._last_line
