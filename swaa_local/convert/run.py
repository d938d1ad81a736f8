"""Makes a GGUF with a schedule out of a GGUF, a Hugging Face checkpoint or a hub id, quantized if wanted.

The output appears under its name when it is complete and not before (output_file.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swaa_local.convert import checkpoint as hf
from swaa_local.convert.plan import ConvertError, Plan, Request, make_plan
from swaa_local.convert.quantize import OutType, engine_refusal, quantize
from swaa_local.files.output_file import publish, terminable, workplace
from swaa_local.model_file.copy import copy_gguf
from swaa_local.model_file.split import open_gguf
from swaa_local.report.progress import SILENT, Reporter
from swaa_local.sources import hub


def convert(request: Request, reporter: Reporter = SILENT) -> Plan:
    """Do it, and return the plan that was carried out. Raises `SWAAError`; then nothing is left behind."""
    plan = make_plan(request)
    for note in plan.notes:
        reporter.note(note)
    if plan.download is not None:
        reporter.note(f"downloading {plan.download.told_size} to {hub.cache_folder(plan.download.listing.hub_id)}")
        local = hub.fetch(plan.download)
        told = plan.notes
        plan = replace(make_plan(replace(request, source=str(local))), source=plan.source)
        for note in plan.notes:
            if note not in told:
                reporter.note(note)
    _carry_out(plan, request, reporter)
    return plan


def _carry_out(plan: Plan, request: Request, reporter: Reporter) -> None:
    assert plan.path is not None
    with terminable(), workplace(plan.output) as folder:
        result = folder / "result.gguf"
        if plan.kind == "checkpoint":
            _from_checkpoint(plan, plan.path, folder, result, request, reporter)
        else:
            _from_gguf(plan, plan.path, folder, result, request, reporter)
        _require_engine(result, plan, reporter)
        publish(result, plan.output, force=request.force)


def _from_checkpoint(
    plan: Plan, source: Path, folder: Path, result: Path, request: Request, reporter: Reporter
) -> None:
    first = result if plan.quantize_to is None else folder / "converted.gguf"
    hf.convert_checkpoint(
        source,
        first,
        plan.converter_type or "auto",
        schedule=plan.schedule,
        pre_tokenizer=request.pre_tokenizer,
        reporter=reporter,
        verbose=request.verbose,
    )
    if plan.quantize_to is not None:
        _quantize(first, result, plan.quantize_to, request, reporter)
        first.unlink()


def _from_gguf(plan: Plan, source: Path, folder: Path, result: Path, request: Request, reporter: Reporter) -> None:
    if plan.quantize_to is not None:
        quantized = folder / "quantized.gguf" if plan.rewrites_header else result
        _quantize(source, quantized, plan.quantize_to, request, reporter)
        source = quantized
    if not plan.rewrites_header:
        return
    with open_gguf(source) as file:
        with reporter.step(f"writing {plan.output.name}", file.data_size, is_bytes=True) as update:
            copy_gguf(
                file,
                result,
                plan.schedule,
                on_header=lambda: _require_engine(result, plan, reporter),
                on_bytes=update,
            )


def _quantize(source: Path, target: Path, out_type: OutType, request: Request, reporter: Reporter) -> None:
    with reporter.step(f"quantizing to {out_type.name.upper()}") as update:
        quantize(source, target, out_type, allow_requantize=request.allow_requantize, on_progress=update)


def _require_engine(path: Path, plan: Plan, reporter: Reporter) -> None:
    """What is written must be something that the engine runs: it knows what metadata do not tell."""
    refused, unchecked = engine_refusal(path)
    if refused is not None:
        how = " with this schedule" if plan.schedule is not None else ""
        raise ConvertError(f"the engine would not run {plan.source}{how}: {refused}")
    if unchecked is not None:
        reporter.note(f"not checked by the engine: {unchecked}")
