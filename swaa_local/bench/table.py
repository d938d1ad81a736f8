"""The tables of a benchmark: Markdown, CSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swaa_local.bench.figures import RowFigures, describe_probe, figures, growth
from swaa_local.bench.results import Bench, Row, Setting
from swaa_local.report.spread import Spread
from swaa_local.report.tables import markdown_table
from swaa_local.schedule.text import about_others
from swaa_local.text.printable import printable, printable_json
from swaa_local.text.units import format_bytes

_FLASH_ATTN = {None: "auto", True: "on", False: "off"}
_SPREADS = ("prefill", "ttft_s", "decode", "request_s")
_RATIOS = ("prefill_vs_full", "decode_vs_full", "request_vs_full", "prefill_vs_limit")
_UNITS = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}


def markdown(bench: Bench) -> str:
    """A row a variant and size, how rates hold with the length, and what was measured how."""
    parts = [_main_table(figures(bench))]
    if grown := _growth_table(bench):
        parts.append(grown)
    parts.append("\n".join(_notes(bench)))
    return "\n\n".join(parts)


def _main_table(rows: Sequence[RowFigures]) -> str:
    several_ub = len({row.setting.n_ubatch for row in rows}) > 1
    several_types = len({_cache(row.setting) for row in rows}) > 1
    reads, writes = any(row.prefill for row in rows), any(row.decode for row in rows)
    vs_full = any(row.setting.kind == "full" for row in rows) and any(row.setting.kind != "full" for row in rows)
    limit = any(row.prefill_vs_limit for row in rows)
    whole = any(row.size.whole for row in rows)
    device = any(row.device_bytes is not None for row in rows)
    head = ["variant", "test", "fa"] + ["n_ubatch"] * several_ub + ["KV type"] * several_types
    head += (["prefill tok/s"] + ["vs full"] * vs_full + ["vs limit"] * limit + ["TTFT"]) if reads else []
    head += (["decode tok/s"] + ["vs full"] * vs_full) if writes else []
    head += (["request"] + ["vs full"] * vs_full) if whole else []
    head += ["KV cache"] + ["vs full"] * vs_full + ["peak host"] + ["GPU"] * device
    lines = []
    for row in rows:
        setting = row.setting
        line = [setting.variant, str(row.size), _FLASH_ATTN[setting.flash_attn]]
        line += [str(setting.n_ubatch)] * several_ub + [_cache(setting)] * several_types
        if reads:
            line += [_rate(row.prefill)] + [_ratio(row.prefill_vs_full)] * vs_full
            line += [_ratio(row.prefill_vs_limit)] * limit + [_seconds(row.ttft_s)]
        if writes:
            line += [_rate(row.decode)] + [_ratio(row.decode_vs_full)] * vs_full
        if whole:
            line += [_seconds(row.request_s)] + [_ratio(row.request_vs_full)] * vs_full
        # The limit is no way to read the prompt: what its short context takes says nothing.
        shown = setting.kind != "limit"
        line += [format_bytes(row.kv_bytes) if shown else "-"]
        line += ["-" if row.kv_vs_full is None else f"{row.kv_vs_full:.2f}"] * vs_full
        line += [_bytes(row.host_bytes if shown else None)] + [_bytes(row.device_bytes if shown else None)] * device
        lines.append(line)
    return markdown_table(head, lines)


def _growth_table(bench: Bench) -> str:
    found = growth(bench)
    spans = list(dict.fromkeys((g.phase, g.small, g.large) for g in found))
    if not spans:
        return ""
    rows: dict[Setting, dict[Any, str]] = {}
    for g in found:
        rows.setdefault(g.setting, {})[g.phase, g.small, g.large] = _ratio(g.ratio)
    head = ["tok/s at the largest over the smallest"]
    for phase, small, large in spans:
        ends = (large.n_prompt, small.n_prompt) if phase == "prefill" else (large.decode_depth, small.decode_depth)
        at = "" if phase == "prefill" else " at depth"
        head.append(f"{phase}{at} {ends[0]} / {ends[1]}")
    return markdown_table(
        head, [[_full_name(setting), *(cells.get(span, "-") for span in spans)] for setting, cells in rows.items()]
    )


def _full_name(setting: Setting) -> str:
    return f"{setting.variant} (fa {_FLASH_ATTN[setting.flash_attn]}, ub {setting.n_ubatch}, KV {_cache(setting)})"


def _notes(bench: Bench) -> list[str]:
    model, machine = bench.model, bench.machine
    counts = sorted({len(row.samples) for row in bench.rows})
    n = " to ".join(str(count) for count in {counts[0]: None, counts[-1]: None})
    measured = f"Medians of {n} interleaved repetitions; in brackets the least and the greatest."
    if counts[-1] == 1:
        measured = "One repetition of each; -r 3 would show how much the figures vary."
    where = machine.where(on_gpu=bench.n_gpu_layers > 0)
    threads = f"{bench.n_threads} thread{'s' * (bench.n_threads > 1)}"
    threads += f" ({bench.n_threads_batch} to prefill)" if bench.n_threads_batch != bench.n_threads else ""
    batches = ", ".join(str(b) for b in dict.fromkeys(row.setting.n_ubatch for row in bench.rows))
    caches = ", ".join(dict.fromkeys(_cache(row.setting) for row in bench.rows))
    adapter = f", LoRA adapter {printable(model.lora)}" if model.lora else ""
    lines = [
        f"{printable(Path(model.path).name)} ({printable(model.description)}), "
        f"{format_bytes(model.size_bytes)} of weights{adapter}; {where}; {threads}; "
        f"n_batch {bench.rows[0].setting.n_batch}, n_ubatch {batches}; KV cache {caches}; "
        f"llama-cpp-python {machine.engine}.",
        f"{measured} Ratios are taken within each "
        + ("repetition." if bench.complete else "repetition; the run was stopped, so some are missing."),
    ]
    if others := about_others(bench.rows[0].setting.schedule.model):
        lines.append(others)
    fulls = {row.setting for row in bench.rows if row.setting.kind == "full"}
    if len(fulls) > 1:
        lines.append("vs full: against full attention in the setting with the best median, for each column by itself.")
    if any(row.setting.kind == "limit" for row in bench.rows):
        lines.append(
            "limit: full attention on prompts of 2(W+k) tokens, which have the same average attention span, until as "
            "many tokens have passed: the speed that no schedule with this window can beat. Shorter prompts have none."
        )
    lines += [f"{text[0].upper()}{text[1:]}." for text in (describe_probe(probe) for probe in bench.probes)]
    if all(sample.host_bytes is None for row in bench.rows for sample in row.samples):
        lines.append("Peak host memory is not shown: this system cannot tell it for a part of a run.")
    return lines


def _cache(setting: Setting) -> str:
    return setting.type_k if setting.type_k == setting.type_v else f"{setting.type_k}/{setting.type_v}"


def _rate(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.1f}" if spread.median < 1000 else f"{spread.median:.0f}"


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    low, high = spread.bounds
    return f"{spread.median:.2f}" + ("" if low == high else f" ({low:.2f}-{high:.2f})")


def _seconds(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{1000 * spread.median:.0f} ms" if spread.median < 1 else f"{spread.median:.2f} s"


def _bytes(n: int | None) -> str:
    return "-" if n is None else format_bytes(n)


# CSV and JSON


def as_csv(bench: Bench) -> str:
    """A flat line for each row, with all settings, as llama-bench prints them."""
    out = io.StringIO()
    lines = [
        {
            key: json.dumps(value) if isinstance(value, list) else printable(value) if isinstance(value, str) else value
            for key, value in line.items()
        }
        for line in flat(bench)
    ]
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def as_jsonl(bench: Bench) -> str:
    """The lines of the CSV as objects."""
    return "".join(printable_json(line) + "\n" for line in flat(bench))


def flat(bench: Bench) -> list[dict[str, Any]]:
    """What CSV and JSON lines have: settings of the run, then those of the row, then its figures."""
    return [_run_settings(bench) | row for row in _results(bench)]


def as_json(bench: Bench) -> str:
    """The settings of the run, and the rows with every sample."""
    results = [
        result | {"samples": [asdict(sample) for sample in row.samples]}
        for result, row in zip(_results(bench), bench.rows, strict=True)
    ]
    document = {
        "complete": bench.complete,
        "settings": _run_settings(bench),
        "flash_attention_of_full": [asdict(probe) for probe in bench.probes],
        "results": results,
        "growth": [
            {
                **_setting(g.setting),
                "phase": g.phase,
                "small": asdict(g.small),
                "large": asdict(g.large),
                "ratio": asdict(g.ratio),
            }
            for g in growth(bench)
        ],
    }
    return printable_json(document, indent=2)


def _run_settings(bench: Bench) -> dict[str, Any]:
    model, machine = bench.model, bench.machine
    return {
        "model_filename": model.path,
        "model_type": model.description,
        "model_file_type": model.file_type,
        "model_size": model.size_bytes,
        "model_n_params": model.n_params,
        "n_layer": model.n_layer,
        "lora": model.lora,
        "cpu_info": machine.cpu,
        "gpu_info": ", ".join(machine.gpus),
        "system": machine.system,
        "system_info": machine.system_info,
        "engine": machine.engine,
        "version": machine.version,
        "test_time": machine.time,
        "n_threads": bench.n_threads,
        "n_threads_batch": bench.n_threads_batch,
        "n_gpu_layers": bench.n_gpu_layers,
        "repetitions_wanted": bench.repetitions,
    }


def _setting(setting: Setting) -> dict[str, Any]:
    return {
        "variant": setting.variant,
        "kind": setting.kind,
        "window": setting.window,
        "sinks": setting.sinks,
        "tail": setting.active_schedule.active_tail,
        "layer_modes": [int(mode) for mode in setting.active_schedule.layer_modes],
        "n_batch": setting.n_batch,
        "n_ubatch": setting.n_ubatch,
        "flash_attn": _FLASH_ATTN[setting.flash_attn],
        "type_k": setting.type_k,
        "type_v": setting.type_v,
        "n_draft": setting.drafts.n if setting.drafts else 0,
        "assumed_acceptance": setting.drafts.acceptance if setting.drafts else None,
    }


def _results(bench: Bench) -> list[dict[str, Any]]:
    return [_result(row, source) for row, source in zip(figures(bench), bench.rows, strict=True)]


def _result(row: RowFigures, source: Row) -> dict[str, Any]:
    result = _setting(row.setting) | {
        "test": str(row.size),
        "n_depth": row.size.depth,
        "n_prompt": row.size.n_prompt,
        "n_gen": row.size.n_gen,
        "n_prompt_read": source.samples[-1].n_prompt,
        "n_ctx": row.setting.n_ctx(row.size),
        "repetitions": row.repetitions,
    }
    for name in (*_SPREADS, *_RATIOS):
        spread: Spread | None = getattr(row, name)
        for part in ("median", "low", "high"):
            suffix = "" if part == "median" else f"_{part}"
            result[f"{_UNITS.get(name, name)}{suffix}"] = getattr(spread, part) if spread else None
    return result | {
        "kv_bytes": row.kv_bytes,
        "kv_vs_full": row.kv_vs_full,
        "host_bytes": row.host_bytes,
        "device_bytes": row.device_bytes,
    }
