"""A child of ours that ends as it is told, for the tests of what is said then."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.files.child_process import child_main


def handle(request: dict[str, Any], emit: Callable[..., None]) -> None:
    if "signal" in request:
        os.kill(os.getpid(), signal.Signals[request["signal"]])
    if "abort" in request:
        from swaa_local.engine.native import _c

        _c._lib.ggml_abort(b"/build/ggml/src/ggml.c", 12, request["abort"].encode())
    if "error" in request:
        raise SWAAError(request["error"])


if __name__ == "__main__":
    child_main(handle)
