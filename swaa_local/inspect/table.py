"""What was found in a file, as text for people and as plain data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from swaa_local.inspect.listing import ListedModel
from swaa_local.inspect.run import Cost, Inspection
from swaa_local.model_file.adapter import AdapterInfo
from swaa_local.model_file.model_info import ModelInfo, describe_model
from swaa_local.schedule.cost import full_cells
from swaa_local.schedule.text import in_slides, in_words, layer_by_layer
from swaa_local.text.printable import printable
from swaa_local.text.units import format_bytes, format_count


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
    if not model.layers.all_slide:
        lines.append(f"can slide  {in_slides(model.layers)}")
    if model.n_split > 1:
        lines.append(f"split      into {model.n_split} files, of which this is the first; figures are of all")
    lines.append("")
    if schedule is None:
        where = " everywhere" if model.layers.all_slide else " where layers can slide"
        can = "" if model.unsupported else f": full attention{where}; swaa-local convert adds one"
        lines.append(f"schedule   none{can}")
    else:
        first, *rest = layer_by_layer(schedule)
        lines += [f"schedule   {first}", *rest]
        if inspection.calibration is not None:
            lines.append(f"calibrated {printable(_calibration_in_words(inspection.calibration))}")
    if model.unsupported is not None:
        lines += ["", f"No schedule can apply here: {model.unsupported}. Its KV cache is not a plain one; no figures."]
        return "\n".join(lines)
    assert inspection.full is not None
    lines += ["", *_costs(inspection, inspection.full)]
    return "\n".join(lines)


def _calibration_in_words(stored: str) -> str:
    """What `calibrate` says that it found; as it is stored where that is not known."""
    try:
        said = json.loads(stored)
        asked, quality = float(said["keep"]), float(said["quality"])
        words = f"with prompts of {int(said['length'])} tokens: keeps {quality:.1%} of full attention's quality"
        words += f" ({'' if said['keeps'] else 'less than the '}{asked:.1%} asked for)"
        if "speed" in said:
            where = {"check": " in the check", "search": " in the search"}.get(said.get("speed_in"), "")
            words += f", reads {float(said['speed']):.2f} times as fast{where}"
        evidence = {"search": "nothing was checked", "short prompts": "tried on short prompts alone"}
        if said["evidence"] == "check":
            evidence["check"] = (
                f"{int(said['right'])} of {int(said['n'])} right in the check, full attention {int(said['full_right'])}"
            )
        return f"{words}; {evidence[said['evidence']]}"
    except (ValueError, TypeError, KeyError):
        return stored


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
        *([("recurrent states", "state_bytes", format_bytes)] if full.state_bytes else []),
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
    if scheduled is not None and schedule is not None and schedule.active_tail:
        share = schedule.tail_pairs(inspection.n_ctx) / scheduled.prefill_pairs
        lines.append(f"tail: its {schedule.active_tail} tokens take {share:.1%} of the scheduled query-key pairs")
    if schedule is not None and schedule.has_ring:
        ring, whole = schedule.ring_cells(inspection.n_ctx, n_ubatch=inspection.n_ubatch), full_cells(inspection.n_ctx)
        lines.append(
            f"ring of an 'A' layer: {ring} cells for sinks + window + n_ubatch {inspection.n_ubatch} "
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
            "state_bytes": value.state_bytes,
            "kv_cells": list(value.kv_cells),
            "prefill_pairs": value.prefill_pairs,
            "decode_keys": value.decode_keys,
            "tail_pairs": value.tail_pairs,
        }

    config = None
    if schedule is not None:
        paper = schedule.config()
        config = schedule.as_dict() | {
            "swaa_config": {
                "sliding_window_size": paper.sliding_window_size,
                "keep_first": paper.keep_first,
                "force_fa_decode": paper.force_fa_decode
                if isinstance(paper.force_fa_decode, bool)
                else list(paper.force_fa_decode),
                "non_sliding_layers": list(paper.non_sliding_layers),
                # not in the paper's code, which would not take it
                **({"prompt_tail": paper.prompt_tail} if paper.prompt_tail else {}),
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
            "layer_kinds": [kind.value for kind in model.layers.kinds],
            "own_window": model.layers.own_window or None,
            "n_params": model.n_params,
            "file_bytes": model.file_bytes,
            "file_type": model.file_type,
            "n_split": model.n_split,
            "unsupported": model.unsupported,
        },
        "schedule": config,
        "calibration": inspection.calibration,
        "n_ctx": inspection.n_ctx,
        "n_ubatch": inspection.n_ubatch,
        "type_k": inspection.type_k,
        "type_v": inspection.type_v,
        "full": cost(inspection.full),
        "scheduled": cost(inspection.scheduled),
    }


def listed(models: Sequence[ListedModel]) -> str:
    """Models, one a line."""
    rows = [("model", "size", "what", "schedule")]
    for model in models:
        info = model.info
        if model.adapter is not None:
            rows.append((printable(model.name), format_bytes(model.n_bytes), "LoRA adapter", _tuned_for(model.adapter)))
            continue
        if info is None:
            rows.append(
                (printable(model.name), format_bytes(model.n_bytes), "cannot be read", printable(model.problem))
            )
            continue
        what = describe_model(printable(info.architecture), info.n_params, info.file_type)
        rows.append((printable(model.name), format_bytes(model.n_bytes), what, _listed_schedule(model)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _listed_schedule(model: ListedModel) -> str:
    if model.schedule is not None:
        return in_words(model.schedule) + (" (calibrated)" if model.is_calibrated else "")
    assert model.info is not None
    return "none can apply" if model.info.unsupported else "none"


def _tuned_for(adapter: AdapterInfo) -> str:
    if not adapter.is_tuned:
        return "for --lora"
    return f"for --lora, tuned for {in_words(adapter.schedule) if adapter.schedule else 'full attention'}"


def listed_as_dict(model: ListedModel) -> dict[str, Any]:
    """For JSON; what is not known is null."""
    info = model.info
    return {
        "name": model.name,
        "path": str(model.path),
        "n_bytes": model.n_bytes,
        "architecture": info.architecture if info else None,
        "n_params": info.n_params if info else None,
        "file_type": info.file_type if info else None,
        "n_ctx_train": info.n_ctx_train if info else None,
        "schedule": model.schedule.as_dict() if model.schedule else None,
        "calibrated": model.is_calibrated,
        "adapter": model.adapter is not None,
        "problem": model.problem,
    }
