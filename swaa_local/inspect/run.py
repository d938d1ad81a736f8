"""What a GGUF's schedule is, layer by layer, and what it costs and saves at a given context.

Arithmetic on metadata: it opens no model and measures nothing. The formulas are in `schedule`.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from swaa_local.errors import GGUFError, SWAAError
from swaa_local.model_file.model_info import ModelInfo, model_info_of
from swaa_local.model_file.schedule_keys import stored_of
from swaa_local.model_file.split import open_gguf
from swaa_local.schedule.config import Schedule, default_n_ubatch
from swaa_local.schedule.cost import kv_bytes

DEFAULT_N_CTX = 32768


@dataclass(frozen=True)
class Cost:
    """What a context costs one way. Cells and pairs are summed or listed over layers as named."""

    kv_cells: tuple[int, ...]
    """Of each layer."""
    kv_bytes: int
    state_bytes: int
    """Of the states of recurrent layers, of which a schedule changes nothing."""
    prefill_pairs: int
    """Query-key pairs of a prompt as long as the context, over all layers."""
    decode_keys: int
    """Keys read for one token at the end of the context, over all layers."""
    tail_pairs: int
    """Of the prefill pairs, those that there are for the tail alone."""


@dataclass(frozen=True)
class Inspection:
    """A file's model and schedule, and their cost at `n_ctx` tokens; no cost where the cache is not a plain one."""

    path: str
    model: ModelInfo
    schedule: Schedule | None
    calibration: str | None
    """What the schedule was found with, as the file says; None if it was not calibrated."""
    n_ctx: int
    n_ubatch: int
    type_k: str
    type_v: str
    full: Cost | None
    scheduled: Cost | None


def inspect_gguf(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
) -> Inspection:
    """Read a file's header and work out the cost of one sequence.

    `n_ctx` defaults to the model's training context, at most `DEFAULT_N_CTX`, `n_ubatch` to what `Llama` would choose
    on this machine. Raises `GGUFError` for a directory, a bad file or schedule, `SWAAError` for a KV type that does
    not fit the model.
    """
    if os.path.isdir(path):
        name = os.fspath(path)
        raise GGUFError(f"{name} is a directory; swaa-local list {shlex.quote(name)} shows the models in it")
    with open_gguf(path) as file:
        model, stored = model_info_of(file), stored_of(file)
    schedule = stored.schedule
    if n_ctx is None:
        n_ctx = min(model.n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)
    if n_ctx < 1:
        raise SWAAError(f"a context has at least 1 token, not {n_ctx}")
    if n_ubatch is None:
        windowed = schedule is not None and not schedule.is_full
        n_ubatch = default_n_ubatch(schedule or Schedule.full(model.layers), gpu=windowed and _has_gpu())
    full = scheduled = None
    if model.unsupported is None:
        everything = Schedule.full(model.layers)
        full = _cost(model, everything, n_ctx, n_ubatch, type_k, type_v)
        if schedule is not None:
            scheduled = _cost(model, schedule, n_ctx, n_ubatch, type_k, type_v)
    return Inspection(
        os.fspath(path), model, schedule, stored.calibration, n_ctx, n_ubatch, type_k, type_v, full, scheduled
    )


def _has_gpu() -> bool:
    """Whether the engine would put layers on a GPU. A machine without an engine has none for it."""
    try:
        from swaa_local.engine.context_length import gpu_layers
    except ImportError:
        return False
    return gpu_layers(-1) > 0


def _cost(model: ModelInfo, schedule: Schedule, n_ctx: int, n_ubatch: int, type_k: str, type_v: str) -> Cost:
    cells = schedule.kv_cells(n_ctx, n_ubatch=n_ubatch)
    return Cost(
        kv_cells=cells,
        kv_bytes=sum(
            kv_bytes(n, k, v, type_k, type_v)
            for n, k, v in zip(cells, model.n_embd_k, model.n_embd_v, strict=True)
            if k
        ),
        state_bytes=sum(model.state_bytes),
        prefill_pairs=sum(schedule.prefill_pairs(n_ctx)),
        decode_keys=sum(schedule.decode_keys(n_ctx - 1)),
        tail_pairs=schedule.tail_pairs(n_ctx),
    )
