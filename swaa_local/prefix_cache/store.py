"""The directory of states: found by the longest common prefix, written whole or not at all, the least recently used
removed first.

A cache is never a reason to fail: what cannot be read or written is a miss, and one line says why. Several processes
may share the directory. Knows files and tokens; nothing of engines.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from swaa_local.files.output_file import OutputError, publish, workplace
from swaa_local.files.user_dirs import cache_dir
from swaa_local.prefix_cache.state_file import (
    Cells,
    StateFileError,
    StateHeader,
    Tokens,
    read_header,
    read_state,
    state_bytes,
    write_state,
)
from swaa_local.text.units import format_bytes

_T = TypeVar("_T")

DEFAULT_BYTES = 10 << 30
"""Bound on the directory where the user says nothing."""
LEAST_TOKENS = 256
"""Tokens that are worth a file, or worth a load: fewer are read again in about the same time."""
_LEAST_FREE_BYTES = 1 << 30  # of the disk: a cache must not be what fills it
_PART = ".swaa-part-"  # what llama-server has not finished (server-disk-cache.cpp)
_PREFIX, _CONVERSATION = ".prefix", ".conversation"


class CacheWarning(UserWarning):
    """A state that could not be read or written; the work goes on without it."""


def default_directory() -> Path:
    """Where states are kept: `$XDG_CACHE_HOME/swaa-local/states`, or what the system has for caches."""
    return cache_dir() / "states"


@dataclass(frozen=True)
class StoredState:
    """A file of the cache. used_s: when it was last written or found, in seconds since 1970."""

    path: Path
    header: StateHeader
    n_bytes: int
    used_s: float

    @property
    def is_conversation(self) -> bool:
        return self.path.suffix == _CONVERSATION


@dataclass(frozen=True)
class Match:
    """A state that begins as the prompt does. n_common: tokens that they share."""

    path: Path
    n_tokens: int
    n_common: int


def _warn(text: str) -> None:
    warnings.warn(text, CacheWarning, stacklevel=3)


class PrefixCache:
    """States on disk. directory: None is `default_directory`. max_bytes: of all files together.

    note: gets a line about each file that is of no use and each state that cannot be kept; default: a `CacheWarning`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = DEFAULT_BYTES,
        note: Callable[[str], None] = _warn,
    ) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()
        self.max_bytes = max_bytes
        self.note = note
        self._gave_up = False

    def find(self, key: str, tokens: Tokens) -> list[Match]:
        """States with this key that share at least `LEAST_TOKENS` with the prompt, those with the most first."""
        matches = []
        for path in self._files(f"{key[:16]}-*{_PREFIX}"):
            found = self._header(path)
            if found is None or found[0].key != key:
                continue
            n_common = common_prefix(found[1], tokens)
            if n_common >= LEAST_TOKENS:
                matches.append(Match(path, len(found[1]), n_common))
        return sorted(matches, key=lambda match: (-match.n_common, match.n_tokens))

    def load(self, path: Path) -> tuple[StateHeader, Tokens, Cells] | None:
        """A state, and it counts as used now; None, with a note, if it is of no use any more."""
        state = self._read(path, read_state)
        if state is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return state

    def drop(self, path: Path, reason: str) -> None:
        """Remove a state that is of no use, and say so."""
        self.note(f"a cached state is not used: {reason} ({path.name})")
        with contextlib.suppress(OSError):
            path.unlink()

    def save(
        self,
        key: str,
        tokens: Tokens,
        cells: Cells,
        *,
        model: str = "",
        schedule: str = "",
        conversation: str | None = None,
        replaces_shorter: bool = False,
    ) -> bool:
        """Keep a state; False, with a note, if that cannot be done.

        conversation: the name under which `load_conversation` finds it; else `find` does by the tokens.
        replaces_shorter: it serves whatever a state of fewer of these tokens serves, and so takes its place.
        """
        n_bytes = state_bytes(len(tokens), cells.nbytes)
        if self._gave_up:
            return False
        if n_bytes > self.max_bytes:
            self.note(
                f"what was read is not kept: it takes {format_bytes(n_bytes)} and the cache holds "
                f"{format_bytes(self.max_bytes)}; --cache-size allows more"
            )
            return False
        path = self.directory / self._name(key, tokens, conversation)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._check_space(n_bytes)
            with workplace(path) as folder:
                result = folder / "state"
                write_state(result, key=key, model=model, schedule=schedule, tokens=tokens, cells=cells)
                publish(result, path, force=True)
        except (OutputError, OSError) as error:
            self._gave_up = True  # once is enough
            reason = error if isinstance(error, OutputError) else f"{self.directory}: {error.strerror or error}"
            self.note(f"what was read is not kept: {reason}")
            return False
        if conversation is None and replaces_shorter:
            self._remove_prefixes_of(path, key, tokens)
        self._make_room(path)
        return True

    def load_conversation(self, key: str, name: str) -> tuple[StateHeader, Tokens, Cells] | None:
        """What was saved under a name with this key; None if there is nothing."""
        path = self.directory / self._name(key, np.empty(0, np.int32), name)
        state = self.load(path) if path.exists() else None
        return state if state is not None and state[0].key == key else None

    def prepare(self) -> bool:
        """Make the directory, where another program writes states; False, with a note, if that cannot be done."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            self.note(f"what is read is not kept: {self.directory}: {error.strerror or error}")
            return False
        return True

    def states(self) -> list[StoredState]:
        """All that there is, the most recently used first."""
        found = []
        for path in self._files("*"):
            header = self._header(path)
            with contextlib.suppress(OSError):
                status = path.stat()
                if header is not None:
                    found.append(StoredState(path, header[0], status.st_size, status.st_mtime))
        return sorted(found, key=lambda state: -state.used_s)

    def clear(self) -> tuple[int, int]:
        """Remove everything; the number of states and of bytes. Raises OSError."""
        n_states = n_bytes = 0
        for path in self._files("*"):
            with contextlib.suppress(FileNotFoundError):  # another program made room
                size = path.stat().st_size
                path.unlink()
                n_states, n_bytes = n_states + 1, n_bytes + size
        for path in self.directory.glob(f"{_PART}*"):  # of a server; one that runs gives up this file
            with contextlib.suppress(OSError):
                path.unlink()
        if self.directory.is_dir():
            with contextlib.suppress(OutputError), workplace(self.directory / "clear"):
                pass  # what killed programs left behind goes with the next one's beginning
        return n_states, n_bytes

    def _header(self, path: Path) -> tuple[StateHeader, Tokens] | None:
        return self._read(path, read_header)

    def _read(self, path: Path, read: Callable[[Path], _T]) -> _T | None:
        """What `read` makes of a file; None if it is gone, and with a note if it is of no use or cannot be read now."""
        try:
            return read(path)
        except FileNotFoundError:  # another process made room
            return None
        except StateFileError as error:
            self.drop(path, str(error))
            return None
        except OSError as error:  # of the moment, such as too many open files: the state may be whole
            self.note(f"a cached state is not used: {error.strerror or error} ({path.name})")
            return None

    def _files(self, pattern: str) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for path in sorted(self.directory.glob(pattern)):
                if path.suffix in (_PREFIX, _CONVERSATION) and path.is_file():
                    yield path

    @staticmethod
    def _name(key: str, tokens: Tokens, conversation: str | None) -> str:
        what = tokens.astype("<i4").tobytes() if conversation is None else os.fsencode(conversation)
        digest = hashlib.blake2b(what, digest_size=8).hexdigest()
        return f"{key[:16]}-{digest}{_PREFIX if conversation is None else _CONVERSATION}"

    def _check_space(self, n_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free
        if free < n_bytes + _LEAST_FREE_BYTES:
            raise OutputError(
                f"it takes {format_bytes(n_bytes)} and the disk of {self.directory} has {format_bytes(free)} left"
            )

    def _remove_prefixes_of(self, path: Path, key: str, tokens: Tokens) -> None:
        for other in self._files(f"{key[:16]}-*{_PREFIX}"):
            found = None if other == path else self._header(other)
            if found and found[0].key == key and common_prefix(found[1], tokens) == len(found[1]):
                other.unlink(missing_ok=True)

    def _make_room(self, newest: Path) -> None:
        files = []
        for path in self._files("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                excess -= size


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Tokens that both begin with."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
