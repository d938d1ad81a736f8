"""What a conversion will do, checked in full before anything is done. Reads headers and listings; writes nothing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from swaa_local.convert import checkpoint as hf
from swaa_local.convert.checkpoint import Checkpoint
from swaa_local.convert.quantize import OutType, parse_out_type, quantized_types
from swaa_local.convert.request import ConvertError, LocalCheckpoint, LocalGGUF, Request, resolve
from swaa_local.errors import GGUFError
from swaa_local.files.output_file import check_output
from swaa_local.files.user_input import user_path
from swaa_local.model_file.adapter import Adapter, read_adapter
from swaa_local.model_file.copy import encode_header
from swaa_local.model_file.header import DEFAULT_ALIGNMENT, GGUFFile
from swaa_local.model_file.model_info import ModelInfo, model_info_of
from swaa_local.model_file.schedule_keys import calibration_of, has_schedule_keys, schedule_of, stored_of
from swaa_local.model_file.split import open_gguf
from swaa_local.schedule.choice import ScheduleChoice
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.schedule.presets import DEFAULT_PRESET
from swaa_local.schedule.text import layer_by_layer
from swaa_local.sources import hub
from swaa_local.sources.checkpoint_files import WEIGHTS
from swaa_local.text.printable import printable
from swaa_local.text.units import format_bytes

_NO_SCHEDULE = (
    f"no schedule: the file will run with full attention; --preset {DEFAULT_PRESET} adds one, or calibrate finds one"
)
# What a checkpoint becomes is known once it is converted.
_NO_SCHEDULE_YET = f"{_NO_SCHEDULE} if its architecture takes one"


@dataclass(frozen=True)
class Outcome:
    """What every plan says. Sizes are estimates where weights change their type."""

    source: str
    output: Path
    steps: tuple[str, ...]
    output_bytes: int
    temporary_bytes: int = 0
    """Beside the output, while it is made."""
    notes: tuple[str, ...] = ()
    architecture: str | None = None
    """None: known after the download, as all of the model."""
    n_layer: int | None = None
    schedule: Schedule | None = None
    """What the output will store."""
    calibration: str | None = None
    """What it was found with, if so."""


@dataclass(frozen=True)
class GGUFPlan:
    """A GGUF is quantized, gets another header, or both."""

    outcome: Outcome
    path: Path
    quantize_to: OutType | None
    rewrites_header: bool
    """The schedule changes, or several files become one."""


@dataclass(frozen=True)
class CheckpointPlan:
    """Upstream's converter writes a GGUF of `converter_type` (`auto`: its 16-bit type), which may then be quantized."""

    outcome: Outcome
    path: Path | None
    """None while it is on a hub."""
    converter_type: str
    quantize_to: OutType | None


@dataclass(frozen=True)
class DownloadPlan:
    """A model is fetched from a hub; the plan for what then lies on this machine is made anew."""

    outcome: Outcome
    model: hub.HubModel


Plan = GGUFPlan | CheckpointPlan | DownloadPlan


def make_plan(request: Request) -> Plan:
    """Check everything that can be checked before work begins. Downloads no weights."""
    out_type = parse_out_type(request.out_type) if request.out_type is not None else None
    _check_output(request)
    source = resolve(request)
    plan: Plan
    if isinstance(source, LocalGGUF):
        plan = _plan_gguf(request, source.path, out_type)
    elif isinstance(source, LocalCheckpoint):
        plan = _plan_checkpoint(request, source.checkpoint, source.path, out_type)
    else:
        plan = _plan_hub(request, source, out_type)
    _check_disk(plan.outcome)
    return plan


def _plan_gguf(request: Request, path: Path, out_type: OutType | None) -> GGUFPlan:
    if request.pre_tokenizer is not None:
        raise ConvertError("--pre-tokenizer is for checkpoints; a GGUF already names its pre-tokenizer")
    if request.lora is not None:
        raise _no_weights_to_merge_into(path.name, request.lora)
    with open_gguf(path) as file:
        model = model_info_of(file)
        choice = request.choice(model.layers, lambda: stored_of(file))
        old = has_schedule_keys(file)
        schedule = schedule_of(file) if choice is None else _resolve(choice, model.layers, model.unsupported)
        if out_type is not None and out_type.name.upper() == model.file_type:
            out_type = None
        if out_type is not None:
            _check_requantize(request, path, file, out_type)
        merges = model.n_split > 1 and out_type is None
        if out_type is None and choice is None and not merges:
            raise _nothing_to_do(str(path))
        if out_type is None and choice is False and not old and not merges:
            raise ConvertError(f"nothing to do: {path} has no schedule that --no-swaa could take away")
        calibration = request.calibration
        if calibration is None and schedule is not None and schedule == _stored_schedule(file):
            calibration = calibration_of(file)
        header_bytes = len(encode_header(file, schedule, calibration))
        copied_bytes = header_bytes + file.data_size
    steps, temporary, size = [], 0, copied_bytes
    if out_type is not None:
        size = header_bytes + int(model.n_params * out_type.bpw / 8)
        steps.append(f"quantize {path.name} from {model.file_type} to {out_type.name.upper()}")
        if choice is not None:
            temporary = size
    if merges or choice is not None:
        source = f" of {model.n_split} files into one" if merges else ""
        what = [f"copy all tensors{source} byte for byte"] if out_type is None else []
        if choice is not None:
            what.append("write the schedule" if schedule else "leave the schedule out")
        steps.append(", ".join(what))
    outcome = Outcome(
        source=str(path),
        output=request.output,
        steps=tuple(steps),
        output_bytes=size,
        temporary_bytes=temporary,
        notes=_notes(schedule, choice, old, model),
        architecture=model.architecture,
        n_layer=model.n_layer,
        schedule=schedule,
        calibration=calibration,
    )
    return GGUFPlan(outcome, path, quantize_to=out_type, rewrites_header=merges or choice is not None)


def _stored_schedule(file: GGUFFile) -> Schedule | None:
    """None also for one that cannot be read, and is to be replaced."""
    try:
        return schedule_of(file)
    except GGUFError:
        return None


def _plan_checkpoint(
    request: Request, checkpoint: Checkpoint, folder: Path, out_type: OutType | None
) -> CheckpointPlan:
    """folder: where its config.json is."""
    hf.converter_path()
    hf.require_extra()
    if request.pre_tokenizer is not None:
        hf.check_pre_tokenizer(request.pre_tokenizer)
    if out_type is not None and out_type.needs_imatrix:
        raise _needs_imatrix(out_type)
    schedule = None
    if checkpoint.n_layer is not None:
        layers = ModelLayers.of(checkpoint.n_layer)
        if request.choice(layers) not in (None, False):
            settings = hf.read_settings(folder)  # takes seconds
            if settings.layers is not None and settings.unsupported is None:
                layers = settings.layers
            schedule = _resolve(request.choice(layers), layers, settings.unsupported)
    elif request.schedule not in (None, False):
        raise ConvertError(
            f"{checkpoint.label}: config.json does not say how many layers the model has, so no schedule can be made; "
            "convert it without one, then convert the GGUF"
        )
    adapter_notes = () if request.lora is None else _check_adapter(request.lora, schedule)
    direct = out_type is None or out_type.name in hf.CONVERTER_TYPES
    converter_type = "auto" if out_type is None or not direct else out_type.name
    size = checkpoint.size_bytes(out_type.bpw if out_type else 16.0)
    shown = "its 16-bit type" if converter_type == "auto" else converter_type.upper()
    steps = [f"convert the checkpoint to GGUF in {shown}{' with the schedule' if schedule else ''}"]
    if request.lora is not None:
        steps[0] += f"{' and' if schedule else ','} the LoRA adapter {request.lora} merged in"
    if not direct and out_type is not None:
        steps.append(f"quantize it to {out_type.name.upper()}")
    outcome = Outcome(
        source=checkpoint.label,
        output=request.output,
        steps=tuple(steps),
        output_bytes=size,
        temporary_bytes=0 if direct else checkpoint.size_bytes(16.0),
        notes=(*(() if schedule else (_NO_SCHEDULE_YET,)), *adapter_notes),
        architecture=checkpoint.architecture,
        n_layer=checkpoint.n_layer,
        schedule=schedule,
    )
    quantize_to = out_type if converter_type == "auto" else None
    return CheckpointPlan(outcome, checkpoint.path, converter_type, quantize_to)


def _plan_hub(request: Request, model: hub.HubModel, out_type: OutType | None) -> DownloadPlan:
    listing = model.listing
    notes: tuple[str, ...] = ()
    if listing.cached_at is not None:
        notes = (f"the hub cannot be asked; using {listing.cached_at}",)
    if model.gguf is None:
        outcome = _plan_hub_checkpoint(request, model, out_type).outcome
    else:
        if request.lora is not None:
            raise _no_weights_to_merge_into(f"{listing.hub_id.repo}:{model.gguf}", request.lora)
        n_files = len(model.files)
        if request.schedule is None and out_type is None and n_files == 1:
            raise _nothing_to_do(str(listing.hub_id))
        source = f" of {n_files} files into one" if n_files > 1 else ""
        steps = [f"quantize to {out_type.name.upper()}"] if out_type else [f"copy all tensors{source} byte for byte"]
        outcome = Outcome(
            source=f"{listing.hub_id.repo}:{model.gguf}",
            output=request.output,
            steps=(*steps, "write the schedule") if request.schedule is not None else tuple(steps),
            output_bytes=model.n_bytes or 0,
        )
    return DownloadPlan(replace(outcome, notes=(*notes, *outcome.notes)), model)


def _plan_hub_checkpoint(request: Request, model: hub.HubModel, out_type: OutType | None) -> CheckpointPlan:
    """By its config.json, which is small enough to be fetched for it."""
    listing, hub_id = model.listing, model.listing.hub_id
    config_file = hub.fetch_small_file(hub_id, listing, "config.json")
    config = hf.parse_config(config_file.read_bytes(), f"{hub_id} config.json")
    weight_bytes = sum(listing.sizes[name] or 0 for name in model.files if name.endswith(WEIGHTS))
    architecture, n_layer = hf.architecture_of(config, str(hub_id)), hf.n_layer_of(config)
    checkpoint = Checkpoint(None, str(hub_id), architecture, n_layer, None, weight_bytes)
    return _plan_checkpoint(request, checkpoint, config_file.parent, out_type)


def _resolve(choice: ScheduleChoice, layers: ModelLayers, unsupported: str | None) -> Schedule | None:
    if choice is None or choice is False:
        return None
    if unsupported is not None:
        raise ConvertError(f"no schedule can apply: {unsupported}")
    schedule = choice.schedule(layers)
    if schedule.is_full:
        which = f"{len(layers.sliding)} layers{'' if layers.all_slide else ' that can slide'}"
        raise ConvertError(
            f"in this schedule all {which} have full attention, so it does nothing; list fewer --full-layers, "
            "or pass --no-swaa for a file without a schedule"
        )
    return schedule


def _notes(schedule: Schedule | None, choice: ScheduleChoice, had_one: bool, model: ModelInfo) -> tuple[str, ...]:
    notes = []
    if had_one and choice is None:
        notes.append("the source's schedule is kept")
    elif had_one:
        notes.append("the source's schedule is replaced" if schedule else "the source's schedule is taken away")
    if schedule is None and choice is None:
        notes.append(f"no schedule can apply: {model.unsupported}" if model.unsupported else _NO_SCHEDULE)
    if schedule and model.n_ctx_train and schedule.window + schedule.sinks >= model.n_ctx_train:
        notes.append(
            f"window and sinks ({schedule.window + schedule.sinks} tokens) cover the model's whole context of "
            f"{model.n_ctx_train}: the schedule saves nothing"
        )
    return tuple(notes)


def _check_requantize(request: Request, path: Path, file: GGUFFile, out_type: OutType) -> None:
    if out_type.needs_imatrix:
        raise _needs_imatrix(out_type)
    types = quantized_types(file)
    if types and not request.allow_requantize:
        raise ConvertError(
            f"{path} is already quantized ({', '.join(types)}), and quantizing it again loses more than from the "
            "original; take an F16, BF16 or F32 file, or pass --allow-requantize"
        )
    if file.alignment != DEFAULT_ALIGNMENT:
        raise ConvertError(
            f"{path} has {file.alignment}-byte alignment, which llama.cpp's quantizer cannot write; leave out --outtype"
        )


def _no_weights_to_merge_into(name: str, lora: Adapter) -> ConvertError:
    return ConvertError(
        f"{name} is a GGUF, and convert does not change its weights; give chat, serve, bench or eval --lora {lora}, "
        "which add the adapter as they run, or convert the checkpoint that the GGUF was made of"
    )


def _check_adapter(lora: Adapter, schedule: Schedule | None) -> tuple[str, ...]:
    """What to note of an adapter that is to be merged. Raises `GGUFError` or `ConvertError`."""
    info = read_adapter(lora.path)
    if info.others:
        raise ConvertError(
            f"{lora.path} holds {info.others[0]}, which is no part of a low-rank pair; such an adapter cannot be merged"
        )
    return tuple(info.schedule_remarks([schedule]))


def _nothing_to_do(source: str) -> ConvertError:
    return ConvertError(
        f"nothing to do for {source}: give a schedule, for instance --preset {DEFAULT_PRESET} (--list-presets shows "
        "others, and swaa-local calibrate finds the model's own), --no-swaa, or another --outtype than it has"
    )


def _needs_imatrix(out_type: OutType) -> ConvertError:
    return ConvertError(
        f"{out_type.name.upper()} needs an importance matrix, which convert does not make; take iq3_xs or q2_k, or run "
        "llama-quantize --imatrix and convert its result"
    )


def _check_output(request: Request) -> None:
    output, source = request.output, user_path(request.source)
    check_output(output, force=True)
    # Before a word about --force, which does not help here.
    if output.exists() and source.exists() and os.path.samefile(output, source):
        raise ConvertError(f"{output} is the source itself; convert never rewrites it: name another file with -o")
    check_output(output, force=request.force)


def _check_disk(plan: Outcome) -> None:
    usage = shutil.disk_usage(plan.output.parent)
    needed, free = plan.output_bytes + plan.temporary_bytes, usage.free
    # Some filesystems, such as /proc, have no size.
    if usage.total and needed > free:
        raise ConvertError(
            f"not enough space for {plan.output}: about {format_bytes(needed)} needed"
            + (f" ({format_bytes(plan.temporary_bytes)} of it for a while)" if plan.temporary_bytes else "")
            + f", {format_bytes(free)} free in {plan.output.parent.resolve()}"
        )


def describe_plan(plan: Plan) -> str:
    """The plan as text."""
    outcome = plan.outcome
    is_gguf = isinstance(plan, GGUFPlan) or (isinstance(plan, DownloadPlan) and plan.model.gguf is not None)
    depth = f", {outcome.n_layer} layers" if outcome.n_layer is not None else ""
    lines = [
        f"source    {printable(outcome.source)} ({'GGUF' if is_gguf else 'checkpoint'})",
        f"model     {printable(outcome.architecture or 'known after the download')}{depth}",
    ]
    if outcome.schedule is not None:
        first, *rest = layer_by_layer(outcome.schedule)
        lines += [f"schedule  {first}", *rest]
    else:
        unknown = outcome.architecture is None
        lines.append(f"schedule  {'known after the download' if unknown else 'none'}")
    if isinstance(plan, DownloadPlan):
        target = printable(hub.cache_folder(plan.model.listing.hub_id))
        n_files = len(plan.model.files)
        lines.append(f"download  {plan.model.size_text} in {n_files} file{'s' * (n_files > 1)} to {target}")
    lines += [f"{'steps' if i == 0 else '':<10}{i + 1}. {printable(step)}" for i, step in enumerate(outcome.steps)]
    exact = isinstance(plan, GGUFPlan) and plan.quantize_to is None
    size = f"{'' if exact else 'about '}{format_bytes(outcome.output_bytes)}"
    temporary = outcome.temporary_bytes
    extra = f", and about {format_bytes(temporary)} beside it for a while" if temporary else ""
    lines.append(f"output    {printable(outcome.output)} ({size}{extra})")
    return "\n".join([*lines, *(f"note      {printable(note)}" for note in outcome.notes)])
