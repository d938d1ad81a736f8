"""Numbers of `serve` that would end llama-server: refused before it starts, or chosen. Knows the names of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swaa_local.engine.context_length import beyond_training, gpu_layers, shortened
from swaa_local.engine.limits import MAX_THREADS
from swaa_local.engine.memory import check_fits, fit_n_ctx, free_host_bytes, header_cost
from swaa_local.engine.no_gpu import without_gpu
from swaa_local.errors import SWAAError
from swaa_local.model_file.model_info import ModelInfo
from swaa_local.report.progress import Reporter
from swaa_local.schedule.config import MAX_TOKENS, Schedule, default_n_ubatch
from swaa_local.schedule.cost import KV_TYPES

_N_CTX = ("-c", "--ctx-size", "LLAMA_ARG_CTX_SIZE")
_N_UBATCH = ("-ub", "--ubatch-size", "LLAMA_ARG_UBATCH")
_FIT = ("-fit", "--fit", "LLAMA_ARG_FIT")
_TYPE_K = ("-ctk", "--cache-type-k", "LLAMA_ARG_CACHE_TYPE_K")
_TYPE_V = ("-ctv", "--cache-type-v", "LLAMA_ARG_CACHE_TYPE_V")
_SLOTS = ("-np", "--parallel", "LLAMA_ARG_N_PARALLEL")
_UNIFIED = ("-kvu", "--kv-unified", "LLAMA_ARG_KV_UNIFIED")
_NOT_UNIFIED = ("-no-kvu", "--no-kv-unified", "LLAMA_ARG_NO_KV_UNIFIED")
_CHECKPOINTS = ("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints", "LLAMA_ARG_CTX_CHECKPOINTS")
RPC = ("--rpc", "LLAMA_ARG_RPC")
_GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")

_FALSE = ("0", "off", "false", "disabled")

# llama-server's own: slots that share the cells where no number of slots is given, and checkpoints of each.
_AUTO_SLOTS, _DEFAULT_CHECKPOINTS = 4, 32

# Options, and the least and the most that the engine takes; llama-server hands on whatever fits 32 bits.
_BOUNDS = (
    (_N_CTX, 0, MAX_TOKENS),
    (("-b", "--batch-size", "LLAMA_ARG_BATCH"), 1, MAX_TOKENS),
    (_N_UBATCH, 1, MAX_TOKENS),
    (("-t", "--threads", "LLAMA_ARG_THREADS"), -1, MAX_THREADS),
    (("-tb", "--threads-batch"), -1, MAX_THREADS),
)


class ServeLimitError(SWAAError, ValueError):
    """A number that the server would not survive."""


def context_arguments(
    info: ModelInfo, schedule: Schedule | None, said: Callable[[Sequence[str]], str | None], reporter: Reporter
) -> list[str]:
    """The context that the server is to make, where the user does not say and the host cannot hold the model's own.

    llama-server would take for free what is merely there, and be killed. Notes that, a context that is longer than
    what the model was trained on, and a GPU that is missing.

    said: what the server will find under one of these names; values that are no numbers are left to it. Raises
    `ServeLimitError` or `ContextTooLarge`.
    """
    for names, least, most in _BOUNDS:
        number = _number(said(names))
        if number is not None and not least <= number <= most:
            raise ServeLimitError(f"{names[0]} is {number}; it must be between {least} and {most}")
    n_ctx = _number(said(_N_CTX))
    if n_ctx and (note := beyond_training(n_ctx, info.n_ctx_train)):
        reporter.note(f"{note}; a request gets {info.n_ctx_train} at most")
    layers = _number(said(_GPU_LAYERS))
    wanted = -1 if layers is None else layers
    if not said(RPC) and (note := without_gpu(wanted, option=_GPU_LAYERS[0])):
        reporter.note(note)
    type_k, type_v = ((said(names) or "f16").lower() for names in (_TYPE_K, _TYPE_V))
    if info.unsupported is not None or type_k not in KV_TYPES or type_v not in KV_TYPES:
        return []
    on_gpu = gpu_layers(wanted, workers=bool(said(RPC)))
    gpu = gpu_layers(wanted) > 0
    n_ubatch = _number(said(_N_UBATCH)) or default_n_ubatch(schedule or Schedule.full(1), gpu=gpu)
    slots = _number(said(_SLOTS)) or -1
    checkpoints = _number(said(_CHECKPOINTS))
    cost = header_cost(
        info,
        schedule,
        n_ubatch=n_ubatch,
        type_k=type_k,
        type_v=type_v,
        n_gpu_layers=on_gpu,
        n_seq_max=_AUTO_SLOTS if slots < 0 else slots,
        unified=slots < 0 or (said(_UNIFIED) not in (None, *_FALSE) and said(_NOT_UNIFIED) is None),
        n_checkpoints=_DEFAULT_CHECKPOINTS if checkpoints is None else max(0, checkpoints),
    )
    if n_ctx:
        check_fits(cost, n_ctx)
    if said(_N_CTX) is not None or on_gpu or not info.n_ctx_train or said(_FIT) == "off":
        return []
    free = free_host_bytes(mapped=info.file_bytes)
    fits = fit_n_ctx(cost, info.n_ctx_train, free_host=free, free_gpu=None)
    if fits == info.n_ctx_train:
        return []
    reporter.note(shortened(fits, info.n_ctx_train, "-c"))
    return ["--ctx-size", str(fits)]


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
