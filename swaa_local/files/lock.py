"""Locks between processes, which end with the process that has them. Knows what the system has, and nothing of files'
contents."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Locked(Exception):
    """Another process has it. process_id: 0 if nobody knows."""

    def __init__(self, process_id: int) -> None:
        self.process_id = process_id


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder until it is closed: True if it is ours now, False if another process has it, and None
    where the system or the disk has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class NameLock:
    """A name that one process at a time has, by a file that says which. It is given back by `release`, or by its end.

    Raises `Locked`; and OSError where the file cannot be made, as in a folder that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if try_lock(handle) is False:
                holder = os.read(handle, 32)
                os.close(handle)
                raise Locked(int(holder) if holder.isdigit() else 0)
            # Who had it before may have removed the file between our opening and locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    break
            os.close(handle)
        with contextlib.suppress(OSError):  # a full disk: nobody learns the number
            os.ftruncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        self._handle: int | None = handle

    def release(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._handle)
            self._handle = None
