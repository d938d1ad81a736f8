"""The keyboard while an answer is written: what is typed is kept for the next line, and not shown in its middle.

Knows terminals; nothing of chats.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any


class QuietKeyboard:
    """A context manager; without a terminal it does nothing. `keep_quiet` is to be called now and then meanwhile."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None
        try:
            import termios

            self._termios = termios
            self._number = sys.stdin.fileno()
            termios.tcgetattr(self._number)
        except (ImportError, OSError, ValueError, AttributeError, termios.error):
            self._number = -1

    def __enter__(self) -> QuietKeyboard:
        self.keep_quiet()
        return self

    def keep_quiet(self) -> None:
        """Stop the echo, if there is one: a shell that has suspended this program brings it back with the next `fg`."""
        if self._number < 0 or _in_background(self._number):
            return
        termios = self._termios
        with suppress(OSError, termios.error):  # the terminal is gone
            found = termios.tcgetattr(self._number)
            if found[3] & termios.ECHO:
                quiet = [*found]
                quiet[3] &= ~(termios.ECHO | termios.ECHONL)
                quiet[3] |= termios.NOFLSH  # Ctrl-C must not throw away what was typed
                termios.tcsetattr(self._number, termios.TCSADRAIN, quiet)
                self._before = found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None or _in_background(self._number):
            return
        with suppress(OSError, self._termios.error):
            self._termios.tcsetattr(self._number, self._termios.TCSADRAIN, self._before)


def _in_background(keyboard: int) -> bool:
    """Whether the keyboard is another job's: the system stops a job in the background that changes its terminal."""
    try:
        return os.tcgetpgrp(keyboard) != os.getpgrp()
    except OSError:  # a terminal without jobs
        return False
