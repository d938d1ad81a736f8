"""Child process that runs upstream's LoRA converter, with what a fine-tune knows of its adapter handed to it.

Run by `tune.export` through `files.child_process`. One method is wrapped, the one that begins to write the GGUF.
"""

from __future__ import annotations

import functools
import logging
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swaa_local.convert.children.schedule import add_schedule
from swaa_local.files.child_process import child_main


def handle(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """Convert. Event: `error` at a failure."""
    converter = Path(request["converter"])
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger().addHandler(logging.StreamHandler())
    _wrap_writer(request["schedule"], request["texts"])
    sys.argv = [str(converter), request["peft"], "--base", request["base"], "--outfile", request["target"]]
    try:
        runpy.run_path(str(converter), run_name="__main__")
    except Exception as error:
        emit(error=f"upstream's LoRA converter stopped: {type(error).__name__}: {error}")
        raise


def _wrap_writer(schedule: dict[str, Any], texts: dict[str, str]) -> None:
    import gguf

    original = gguf.GGUFWriter.write_header_to_file

    @functools.wraps(original)
    def write_header_to_file(self: Any, path: Path | None = None) -> None:
        add_schedule(self, schedule)
        for key, text in texts.items():
            self.add_string(key, text)
        original(self, path)

    gguf.GGUFWriter.write_header_to_file = write_header_to_file


if __name__ == "__main__":
    child_main(handle)
