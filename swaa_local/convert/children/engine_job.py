"""Child process for what llama.cpp does to files: quantize one, and judge whether it can run one.

Run by `convert.quantize` through `files.child_process`. It may be killed at any moment, and llama.cpp may abort it.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from typing import Any

from swaa_local.files.child_process import child_main

_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)")
_LOG_ERROR = 4  # ggml_log_level of ggml.h


def handle(request: dict[str, Any], emit: Callable[..., None]) -> None:
    jobs: dict[str, Callable[..., None]] = {"quantize": _quantize, "check": _check}
    jobs[request.pop("job")](emit, **request)


def _engine() -> Any:
    """llama.cpp's interface. Raises `SWAAError` where the engine does not load, or lacks the patches."""
    from swaa_local.engine import native

    return native.llama_cpp.llama_cpp


def _quantize(emit: Callable[..., None], source: str, target: str, ftype: int, requantize: bool) -> None:
    """Events: done, total (tensors) and tensor (its name) as each is begun."""
    c = _engine()
    errors: list[str] = []

    @c.llama_log_callback
    def receive(level: int, text: bytes, _data: Any) -> None:
        line = text.decode(errors="replace")
        if match := _PROGRESS.match(line):
            emit(done=int(match[1]) - 1, total=int(match[2]), tensor=match[3])
        if level == _LOG_ERROR and line.strip():
            errors.append(re.sub(r"^(\w+: )?(failed to quantize: )?", "", line.strip()))

    c.llama_log_set(receive, ctypes.c_void_p(0))
    c.llama_backend_init()
    params = c.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = 0
    params.allow_requantize = requantize
    if c.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) != 0:
        emit(error=f"llama.cpp's quantizer stopped: {errors[-1] if errors else 'it gave no reason'}")
        raise SystemExit(1)


def _check(emit: Callable[..., None], path: str) -> None:
    """Events: refused (why the engine will not run the file), or unchecked (why nobody can tell)."""
    from swaa_local.errors import SWAAError

    try:
        c = _engine()
    except SWAAError as error:
        emit(unchecked=str(error))
        return
    from swaa_local.engine import log as engine_log

    with engine_log.captured() as log:
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.no_alloc = True  # the header alone: no tensor is read
        params.n_gpu_layers = 0
        params.load_mode = c.LLAMA_LOAD_MODE_NONE
        model = c.llama_model_load_from_file(os.fsencode(path), params)
        if model:
            # Graphs are made of the metadata here; what has no weights takes no memory either.
            params = c.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = 256, 32, 32
            params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_AUTO
        if not (model and c.llama_init_from_model(model, params)):
            emit(refused=log.reason or "llama.cpp gave no reason")


if __name__ == "__main__":
    child_main(handle)
