"""What a GGUF's schedule is, layer by layer, and what it costs and saves at a given context.

Arithmetic on metadata: it opens no model and measures nothing. The formulas are in config.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from swaa_local.model_file.model_info import ModelInfo, describe_model, model_info_of, schedule_of
from swaa_local.model_file.split import open_gguf
from swaa_local.report.printable import printable
from swaa_local.report.units import format_bytes, format_count
from swaa_local.schedule.config import (
    LayerMode,
    Schedule,
    SWAAError,
    compact_layers,
    default_n_ubatch,
    full_cells,
    kv_bytes,
)

LETTERS = {LayerMode.FULL: "F", LayerMode.PREFILL: "p", LayerMode.ALWAYS: "w"}
MEANINGS = {
    LayerMode.FULL: "full attention",
    LayerMode.PREFILL: "window while prefilling, full attention while decoding",
    LayerMode.ALWAYS: "window always, KV cache is a ring",
}
DEFAULT_N_CTX = 32768
_STRIP_WIDTH = 64


@dataclass(frozen=True)
class Cost:
    """What a context costs one way. Cells and pairs are summed or listed over layers as named."""

    kv_cells: tuple[int, ...]
    """Of each layer."""
    kv_bytes: int
    prefill_pairs: int
    """Query-key pairs of a prompt as long as the context, over all layers."""
    decode_keys: int
    """Keys read for one token at the end of the context, over all layers."""


@dataclass(frozen=True)
class Inspection:
    """A file's model and schedule, and their cost at `n_ctx` tokens; no cost where the cache is not a plain one."""

    path: str
    model: ModelInfo
    schedule: Schedule | None
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
    on this machine. Raises `GGUFError` for a bad file or schedule, `SWAAError` for a KV type that does not fit the
    model.
    """
    with open_gguf(path) as file:
        model, schedule = model_info_of(file), schedule_of(file)
    if n_ctx is None:
        n_ctx = min(model.n_ctx_train or DEFAULT_N_CTX, DEFAULT_N_CTX)
    if n_ctx < 1:
        raise SWAAError(f"a context has at least 1 token, not {n_ctx}")
    if n_ubatch is None:
        windowed = schedule is not None and not schedule.is_full
        n_ubatch = default_n_ubatch(schedule or Schedule.full(model.n_layer), gpu=windowed and _has_gpu())
    full = scheduled = None
    if model.unsupported is None:
        everything = Schedule.full(model.n_layer)
        full = _cost(model, everything, n_ctx, n_ubatch, type_k, type_v)
        if schedule is not None:
            scheduled = _cost(model, schedule, n_ctx, n_ubatch, type_k, type_v)
    return Inspection(os.fspath(path), model, schedule, n_ctx, n_ubatch, type_k, type_v, full, scheduled)


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
        prefill_pairs=sum(schedule.prefill_pairs(n_ctx)),
        decode_keys=sum(schedule.decode_keys(n_ctx - 1)),
    )


def layer_strip(modes: Sequence[LayerMode], width: int = _STRIP_WIDTH) -> list[str]:
    """One letter a layer (F full, p window in prefill, w window always), lines of `width` with the first index."""
    letters = "".join(LETTERS[mode] for mode in modes)
    margin = len(str(max(0, len(letters) - 1)))
    return [f"{start:>{margin}} {letters[start : start + width]}" for start in range(0, len(letters), width)]


def describe_schedule(schedule: Schedule) -> list[str]:
    """The schedule as text: settings, the strip, and the layers of each mode."""
    if schedule.is_full:
        return [f"full attention in all {schedule.n_layer} layers"]
    lines = [f"window {schedule.window}, sinks {schedule.sinks}, {schedule.n_layer} layers"]
    lines += ["  " + line for line in layer_strip(schedule.layer_modes)]
    for mode in LayerMode:
        if layers := schedule.layers(mode):
            lines.append(
                f"  {LETTERS[mode]} {len(layers):>3} x {MEANINGS[mode]}: {compact_layers(layers, schedule.n_layer)}"
            )
    return lines


def report(inspection: Inspection) -> str:
    """The inspection as text for people."""
    model, schedule = inspection.model, inspection.schedule
    lines = [
        f"file       {printable(inspection.path)} ({format_bytes(model.file_bytes)})",
        f"model      {printable(model.name or 'unnamed')}, "
        + printable(describe_model(model.architecture, model.n_params, model.file_type)),
        f"layers     {model.n_layer}, {_heads(model)}",
        f"trained to {model.n_ctx_train if model.n_ctx_train is not None else 'an unknown number of'} tokens",
    ]
    if model.n_split > 1:
        lines.append(f"split      into {model.n_split} files, of which this is the first; figures are of all")
    lines.append("")
    if schedule is None:
        can = "" if model.unsupported else ": full attention everywhere; swaa-local convert adds one"
        lines.append(f"schedule   none{can}")
    else:
        first, *rest = describe_schedule(schedule)
        lines += [f"schedule   {first}", *rest]
    if model.unsupported is not None:
        lines += ["", f"No schedule can apply here: {model.unsupported}. Its KV cache is not a plain one; no figures."]
        return "\n".join(lines)
    assert inspection.full is not None
    lines += ["", *_costs(inspection, inspection.full)]
    return "\n".join(lines)


def _costs(inspection: Inspection, full: Cost) -> list[str]:
    scheduled, schedule, type_k, type_v = (
        inspection.scheduled,
        inspection.schedule,
        inspection.type_k,
        inspection.type_v,
    )
    kv_type = type_k if type_k == type_v else f"K {type_k}, V {type_v}"
    rows = [[f"at {inspection.n_ctx} tokens (-c), KV {kv_type}", "full", "scheduled", "saved"]]
    for label, field, show in (
        ("KV cache", "kv_bytes", format_bytes),
        ("prefill: query-key pairs", "prefill_pairs", format_count),
        ("decode: keys read for one token", "decode_keys", format_count),
    ):
        before, after = getattr(full, field), getattr(scheduled or full, field)
        rows.append([label, show(before), show(after), f"{1 - after / before:.0%}" if before else "-"])
    if scheduled is None:
        rows = [row[:2] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if schedule is not None and schedule.has_ring:
        ring, whole = schedule.ring_cells(inspection.n_ctx, n_ubatch=inspection.n_ubatch), full_cells(inspection.n_ctx)
        lines.append(
            f"ring of a 'w' layer: {ring} cells for sinks + window + n_ubatch {inspection.n_ubatch} "
            f"(a full layer: {whole})"
        )
    return lines


def _heads(model: ModelInfo) -> str:
    if not any(model.n_head):
        return "no attention heads"
    kv = sorted(set(model.n_head_kv))
    heads = f"{model.n_head[0]} heads, {kv[0] if len(kv) == 1 else f'{kv[0]} to {kv[-1]}'} KV heads"
    dims = (
        model.head_dim_k if model.head_dim_k == model.head_dim_v else f"{model.head_dim_k} (K), {model.head_dim_v} (V)"
    )
    return f"{heads} of dimension {dims}"


def as_dict(inspection: Inspection) -> dict[str, object]:
    """The inspection as plain data for `--json`."""
    model, schedule = inspection.model, inspection.schedule

    def cost(value: Cost | None) -> dict[str, object] | None:
        if value is None:
            return None
        return {
            "kv_bytes": value.kv_bytes,
            "kv_cells": list(value.kv_cells),
            "prefill_pairs": value.prefill_pairs,
            "decode_keys": value.decode_keys,
        }

    config = None
    if schedule is not None:
        paper = schedule.config()
        config = {
            "window": schedule.window,
            "sinks": schedule.sinks,
            "layer_modes": [int(mode) for mode in schedule.layer_modes],
            "swaa_config": {
                "sliding_window_size": paper.sliding_window_size,
                "keep_first": paper.keep_first,
                "force_fa_decode": paper.force_fa_decode
                if isinstance(paper.force_fa_decode, bool)
                else list(paper.force_fa_decode),
                "non_sliding_layers": list(paper.non_sliding_layers),
            },
        }
    return {
        "path": inspection.path,
        "model": {
            "architecture": model.architecture,
            "name": model.name,
            "n_layer": model.n_layer,
            "n_ctx_train": model.n_ctx_train,
            "n_embd": model.n_embd,
            "n_head": list(model.n_head),
            "n_head_kv": list(model.n_head_kv),
            "head_dim_k": model.head_dim_k,
            "head_dim_v": model.head_dim_v,
            "n_params": model.n_params,
            "file_bytes": model.file_bytes,
            "file_type": model.file_type,
            "n_split": model.n_split,
            "unsupported": model.unsupported,
        },
        "schedule": config,
        "n_ctx": inspection.n_ctx,
        "n_ubatch": inspection.n_ubatch,
        "type_k": inspection.type_k,
        "type_v": inspection.type_v,
        "full": cost(inspection.full),
        "scheduled": cost(inspection.scheduled),
    }
