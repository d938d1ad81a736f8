"""An output that appears under its name when it is complete and not before.

Until then it is in a hidden folder beside its place, which goes away whatever happens: at once, or with the next
output if the program was killed. Knows files and signals only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.files.lock import try_lock

_PREFIX, _NEW = ".swaa-local-", ".swaa-new-"
_FORGOTTEN_S = 3600.0


class OutputError(SWAAError):
    """An output that cannot be written, or must not be; the message says what to do."""


class OutputExists(OutputError):
    """Its name is taken, and what has it was not to be replaced."""


def check_output(output: Path, *, force: bool) -> None:
    """Raise `OutputError` for a place where no file can be, or where one is that may not be replaced."""
    if output.is_dir():
        raise OutputError(f"{output} is a directory; name a file in it: -o {output / 'model.gguf'}")
    try:
        exists = output.exists()
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from None
    if exists and not force:
        raise OutputError(f"{output} exists; pass --force to replace it")
    if exists and not output.is_file():
        raise OutputError(f"{output} is not a regular file")
    if not output.parent.is_dir():
        raise OutputError(f"cannot write {output}: {output.parent} is not a directory")


def write_output(output: Path, data: bytes, *, force: bool, private: bool = False) -> None:
    """Write a small file whole or not at all. Raises `OutputExists`, unless `force`, and `OutputError`.

    private: for its owner alone.
    """
    with workplace(output) as folder:
        result = folder / "result"
        result.write_bytes(data)
        if private:
            result.chmod(0o600)  # the folder is private already
        publish(result, output, force=force)


def publish(result: Path, output: Path, *, force: bool) -> None:
    """Give the complete result its name. Raises `OutputExists` if a file has got it meanwhile."""
    with open(result, "rb") as file:
        os.fsync(file.fileno())
    try:
        place(result, output, overwrite=force)
    except FileExistsError:
        raise OutputExists(f"{output} was created meanwhile; pass --force to replace it") from None


def place(result: Path, output: Path, *, overwrite: bool) -> None:
    """Move a complete file to its name, on the same file system. Raises OSError: FileExistsError if the name is taken,
    unless `overwrite`, which takes the place of a regular file alone: /dev/null would be gone for everybody."""
    if overwrite:
        if output.exists() and not output.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        os.replace(result, output)
        return
    try:
        os.link(result, output)  # unlike a rename, a link never replaces a file
    except FileExistsError:
        raise
    except OSError:
        # No hard links here, as on FAT and some network mounts: take the name first, and then replace what is ours.
        os.close(os.open(output, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(result, output)
        except BaseException:
            os.unlink(output)
            raise
    else:
        os.unlink(result)


@contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone at the end. Raises `OutputError` for what the system refuses.

    A program that is killed leaves its folder; the next one removes it. A lock that ends with the process tells which
    one nobody uses any more.
    """
    try:
        folder, lock = _make_locked(output.parent)
    except OSError as error:
        raise OutputError(f"cannot write to {output.parent.resolve()}: {error.strerror}") from None
    try:
        if lock is not None:
            _remove_left_behind(folder)
        yield folder
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_locked(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and the lock on it; None where the system or the disk has no locks."""
    made = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
    lock = _lock(made)
    # Under its name it is locked from the start: nobody must take it for one that was left behind.
    folder = made.with_name(_PREFIX + made.name.removeprefix(_NEW))
    made.rename(folder)
    return folder, lock


def _remove_left_behind(own: Path) -> None:
    for other in own.parent.glob(f"{_PREFIX}*"):
        if other == own or other.is_symlink():
            continue
        with contextlib.suppress(OSError):  # it is gone meanwhile, or somebody else's
            if other.stat().st_uid == os.getuid() and (lock := _lock(other)) is not None:
                shutil.rmtree(other, ignore_errors=True)
                os.close(lock)

    for unnamed in own.parent.glob(f"{_NEW}*"):  # killed before it had its name, and so empty
        with contextlib.suppress(OSError):
            if time.time() - unnamed.stat().st_mtime > _FORGOTTEN_S:
                unnamed.rmdir()


def _lock(folder: Path) -> int | None:
    """A lock on a folder, until it is closed or the process ends; None if another process has it, or nobody can."""
    if not hasattr(os, "O_DIRECTORY"):
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    if not try_lock(handle):
        os.close(handle)
        return None
    return handle


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack like Ctrl-C, so that nothing is left behind."""

    def stop(signum: int, _frame: Any) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # A program that ignores SIGHUP was started by nohup.
    previous = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
