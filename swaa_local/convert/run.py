"""Makes a GGUF with a schedule out of a GGUF, a Hugging Face checkpoint or a hub id, quantized if wanted.

The output appears under its name when it is complete and not before (`files.output_file`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swaa_local.convert import checkpoint as hf
from swaa_local.convert.plan import CheckpointPlan, DownloadPlan, GGUFPlan, Outcome, make_plan
from swaa_local.convert.quantize import OutType, engine_refusal, quantize
from swaa_local.convert.request import ConvertError, Request
from swaa_local.files.output_file import publish, terminable, workplace
from swaa_local.model_file.copy import copy_gguf
from swaa_local.model_file.split import open_gguf
from swaa_local.report.progress import SILENT, Reporter
from swaa_local.sources import hub


def convert(request: Request, reporter: Reporter = SILENT) -> Outcome:
    """Do it, and return what came of it. Raises `SWAAError`; then nothing is left behind."""
    plan = make_plan(request)
    for note in plan.outcome.notes:
        reporter.note(note)
    if isinstance(plan, DownloadPlan):
        local, source = _fetch(plan, reporter), plan.outcome.source
        told = plan.outcome.notes
        plan = make_plan(replace(request, source=str(local)))
        for note in plan.outcome.notes:
            if note not in told:
                reporter.note(note)
        outcome = replace(plan.outcome, source=source)
    else:
        outcome = plan.outcome
    with terminable(), workplace(outcome.output) as folder:
        result = folder / "result.gguf"
        if isinstance(plan, CheckpointPlan):
            _from_checkpoint(plan, folder, result, request, reporter)
        elif isinstance(plan, GGUFPlan):
            _from_gguf(plan, folder, result, request, reporter)
        _require_engine(result, outcome, reporter)
        publish(result, outcome.output, force=request.force)
    return outcome


def _fetch(plan: DownloadPlan, reporter: Reporter) -> Path:
    reporter.note(f"downloading {plan.model.size_text} to {hub.cache_folder(plan.model.listing.hub_id)}")
    return hub.fetch(plan.model)


def _from_checkpoint(plan: CheckpointPlan, folder: Path, result: Path, request: Request, reporter: Reporter) -> None:
    assert plan.path is not None
    first = result if plan.quantize_to is None else folder / "converted.gguf"
    hf.convert_checkpoint(
        plan.path,
        first,
        plan.converter_type,
        schedule=plan.outcome.schedule,
        pre_tokenizer=request.pre_tokenizer,
        lora=request.lora,
        reporter=reporter,
        verbose=request.verbose,
    )
    if plan.quantize_to is not None:
        _quantize(first, result, plan.quantize_to, request, reporter)
        first.unlink()


def _from_gguf(plan: GGUFPlan, folder: Path, result: Path, request: Request, reporter: Reporter) -> None:
    source = plan.path
    if plan.quantize_to is not None:
        quantized = folder / "quantized.gguf" if plan.rewrites_header else result
        _quantize(source, quantized, plan.quantize_to, request, reporter)
        source = quantized
    if not plan.rewrites_header:
        return
    with open_gguf(source) as file:
        with reporter.step(f"writing {plan.outcome.output.name}", file.data_size, is_bytes=True) as update:
            copy_gguf(
                file,
                result,
                plan.outcome.schedule,
                calibration=plan.outcome.calibration,
                on_header=lambda: _require_engine(result, plan.outcome, reporter),
                on_bytes=update,
            )


def _quantize(source: Path, target: Path, out_type: OutType, request: Request, reporter: Reporter) -> None:
    with reporter.step(f"quantizing to {out_type.name.upper()}") as update:
        quantize(source, target, out_type, allow_requantize=request.allow_requantize, on_progress=update)


def _require_engine(path: Path, outcome: Outcome, reporter: Reporter) -> None:
    """What is written must be something that the engine runs: it knows what metadata do not tell."""
    refused, unchecked = engine_refusal(path)
    if refused is not None:
        how = " with this schedule" if outcome.schedule is not None else ""
        raise ConvertError(f"the engine would not run {outcome.source}{how}: {refused}")
    if unchecked is not None:
        reporter.note(f"not checked by the engine: {unchecked}")
