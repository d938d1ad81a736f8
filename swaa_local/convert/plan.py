"""What a conversion will do, checked in full before anything is done. Reads headers and listings; writes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from swaa_local.convert import checkpoint as hf
from swaa_local.convert.checkpoint import Checkpoint
from swaa_local.convert.quantize import OutType, parse_out_type, quantized_types
from swaa_local.errors import SWAAError
from swaa_local.files.output_file import check_output
from swaa_local.files.user_input import user_path
from swaa_local.model_file.copy import encode_header
from swaa_local.model_file.header import DEFAULT_ALIGNMENT, GGUFFile
from swaa_local.model_file.model_info import ModelInfo, model_info_of
from swaa_local.model_file.schedule_keys import has_schedule_keys, schedule_of
from swaa_local.model_file.split import open_gguf
from swaa_local.report.printable import printable
from swaa_local.report.units import format_bytes
from swaa_local.schedule.choice import ScheduleChoice
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import layer_by_layer
from swaa_local.sources import hub

_NO_SCHEDULE = "no schedule: the file will run with full attention; --preset or --window adds one"
# What a checkpoint becomes is known once it is converted.
_NO_SCHEDULE_YET = f"{_NO_SCHEDULE} if its architecture takes one"


class ConvertError(SWAAError):
    """The conversion makes no sense, or cannot be done; nothing was written."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will do. Sizes are estimates where weights change their type."""

    source: str
    kind: Literal["gguf", "checkpoint"]
    output: Path
    out_type: OutType | None
    """The output's weight type; None: as the source."""
    steps: tuple[str, ...]
    output_bytes: int
    temporary_bytes: int = 0
    """Beside the output, while it is made."""
    notes: tuple[str, ...] = ()
    architecture: str | None = None
    n_layer: int | None = None
    schedule: Schedule | None = None
    """What the output will store."""
    download: hub.HubModel | None = None
    """What has to be fetched first; a GGUF is only known after that."""
    path: Path | None = None
    """The source, where it is local."""
    converter_type: str | None = None
    """The type that upstream's converter writes a checkpoint in; `auto` is its 16-bit type."""
    rewrites_header: bool = False
    """A GGUF's schedule changes, or several files become one."""

    @property
    def quantize_to(self) -> OutType | None:
        """What llama.cpp's quantizer makes; None where the converter writes the type itself, or nothing changes."""
        return self.out_type if self.converter_type in (None, "auto") else None


@dataclass(frozen=True)
class Request:
    """What is asked for.

    schedule: a choice, or a function that makes one for a model of so many layers.
    out_type: llama-quantize's name of a weight type, in any case; None: a GGUF's as it is, a checkpoint's 16-bit type.
    """

    source: str
    output: Path
    schedule: ScheduleChoice | Callable[[int], ScheduleChoice] = None
    out_type: str | None = None
    pre_tokenizer: str | None = None
    force: bool = False
    allow_requantize: bool = False
    verbose: bool = False

    def choice(self, n_layer: int) -> ScheduleChoice:
        return self.schedule(n_layer) if callable(self.schedule) else self.schedule


def make_plan(request: Request) -> Plan:
    """Check everything that can be checked before work begins. Downloads no weights."""
    out_type = parse_out_type(request.out_type) if request.out_type is not None else None
    path = user_path(request.source)
    _check_output(request, path)
    if path.is_dir():
        checkpoint = hf.read_checkpoint(path)
        plan = _plan_checkpoint(request, checkpoint, out_type)
    elif path.exists():
        plan = _plan_gguf(request, path, out_type)
    else:
        return _plan_hub(request, out_type)
    _check_disk(plan)
    return plan


def _plan_gguf(request: Request, path: Path, out_type: OutType | None) -> Plan:
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise ConvertError(f"{path} is one file of a checkpoint; name its directory instead")
    if request.pre_tokenizer is not None:
        raise ConvertError("--pre-tokenizer is for checkpoints; a GGUF already names its pre-tokenizer")
    with open_gguf(path) as file:
        model = model_info_of(file)
        choice = request.choice(model.n_layer)
        old = has_schedule_keys(file)
        schedule = schedule_of(file) if choice is None else _resolve(choice, model.n_layer, model.unsupported)
        if out_type is not None and out_type.name.upper() == model.file_type:
            out_type = None
        if out_type is not None:
            _check_requantize(request, path, file, out_type)
        merges = model.n_split > 1 and out_type is None
        if out_type is None and choice is None and not merges:
            raise _nothing_to_do(str(path))
        if out_type is None and choice is False and not old and not merges:
            raise ConvertError(f"nothing to do: {path} has no schedule that --no-swaa could take away")
        header_bytes = len(encode_header(file, schedule))
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
    return Plan(
        source=str(path),
        kind="gguf",
        output=request.output,
        architecture=model.architecture,
        n_layer=model.n_layer,
        schedule=schedule,
        out_type=out_type,
        steps=tuple(steps),
        output_bytes=size,
        temporary_bytes=temporary,
        notes=_notes(schedule, choice, old, model),
        path=path,
        rewrites_header=merges or choice is not None,
    )


def _plan_checkpoint(request: Request, checkpoint: Checkpoint, out_type: OutType | None) -> Plan:
    hf.converter_path()
    hf.require_extra()
    if request.pre_tokenizer is not None:
        hf.check_pre_tokenizer(request.pre_tokenizer)
    if out_type is not None and out_type.needs_imatrix:
        raise _needs_imatrix(out_type)
    schedule = None
    if checkpoint.n_layer is not None:
        schedule = _resolve(request.choice(checkpoint.n_layer), checkpoint.n_layer, None)
    elif request.schedule not in (None, False):
        raise ConvertError(
            f"{checkpoint.label}: config.json does not say how many layers the model has, so no schedule can be made; "
            "convert it without one, then convert the GGUF"
        )
    direct = out_type is None or out_type.name in hf.CONVERTER_TYPES
    converter_type = "auto" if out_type is None or not direct else out_type.name
    size = checkpoint.size_bytes(out_type.bpw if out_type else 16.0)
    shown = "its 16-bit type" if converter_type == "auto" else converter_type.upper()
    steps = [f"convert the checkpoint to GGUF in {shown}{' with the schedule' if schedule else ''}"]
    if not direct and out_type is not None:
        steps.append(f"quantize it to {out_type.name.upper()}")
    return Plan(
        source=checkpoint.label,
        kind="checkpoint",
        output=request.output,
        architecture=checkpoint.architecture,
        n_layer=checkpoint.n_layer,
        schedule=schedule,
        out_type=out_type,
        steps=tuple(steps),
        output_bytes=size,
        temporary_bytes=0 if direct else checkpoint.size_bytes(16.0),
        notes=() if schedule else (_NO_SCHEDULE_YET,),
        path=checkpoint.path,
        converter_type=converter_type,
    )


def _plan_hub(request: Request, out_type: OutType | None) -> Plan:
    hub_id = hub.parse_hub_id(request.source)
    if hub_id is None or (request.source.endswith((".gguf", "/")) and ":" not in request.source):
        raise ConvertError(
            f"{request.source}: no such file or directory, and not a hub id (org/name or org/name:file.gguf)"
        )
    listing = hub.list_repo(hub_id)
    model = hub.choose(listing)
    notes: tuple[str, ...] = ()
    if listing.cached_at is not None:
        notes = (f"the hub cannot be asked; using {listing.cached_at}",)
    if model.gguf is None:
        config_file = hub.fetch_small_file(hub_id, listing, "config.json")
        config = hf.parse_config(config_file.read_bytes(), f"{hub_id} config.json")
        weights = sum(listing.sizes[n] or 0 for n in model.files if n.endswith(hf.WEIGHTS))
        architecture, n_layer = hf.architecture_of(config, str(hub_id)), hf.n_layer_of(config)
        plan = _plan_checkpoint(request, Checkpoint(None, str(hub_id), architecture, n_layer, None, weights), out_type)
        if plan.schedule is not None and (reason := hf.unsupported_by_settings(config_file.parent)):
            raise ConvertError(f"no schedule can apply: {reason}")
    else:
        n_files = len(model.files)
        if request.schedule is None and out_type is None and n_files == 1:
            raise _nothing_to_do(str(hub_id))
        size = model.n_bytes or 0
        source = f" of {n_files} files into one" if n_files > 1 else ""
        steps = [f"quantize to {out_type.name.upper()}"] if out_type else [f"copy all tensors{source} byte for byte"]
        plan = Plan(
            source=f"{hub_id.repo}:{model.gguf}",
            kind="gguf",
            output=request.output,
            out_type=out_type,
            steps=(*steps, "write the schedule") if request.schedule is not None else tuple(steps),
            output_bytes=size,
        )
    plan = replace(plan, download=model, notes=(*notes, *plan.notes))
    _check_disk(plan)
    return plan


def _resolve(choice: ScheduleChoice, n_layer: int, unsupported: str | None) -> Schedule | None:
    if choice is None or choice is False:
        return None
    if unsupported is not None:
        raise ConvertError(f"no schedule can apply: {unsupported}")
    schedule = choice.schedule(n_layer)
    if schedule.is_full:
        raise ConvertError(
            f"in this schedule all {n_layer} layers have full attention, so it does nothing; list fewer --full-layers, "
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


def _nothing_to_do(source: str) -> ConvertError:
    return ConvertError(
        f"nothing to do for {source}: give a schedule (--preset NAME or --window TOKENS), --no-swaa, or another "
        "--outtype than it has"
    )


def _needs_imatrix(out_type: OutType) -> ConvertError:
    return ConvertError(
        f"{out_type.name.upper()} needs an importance matrix, which convert does not make; take iq3_xs or q2_k, or run "
        "llama-quantize --imatrix and convert its result"
    )


def _check_output(request: Request, source: Path) -> None:
    output = request.output
    check_output(output, force=True)
    # Before a word about --force, which does not help here.
    if output.exists() and source.exists() and os.path.samefile(output, source):
        raise ConvertError(f"{output} is the source itself; convert never rewrites it: name another file with -o")
    check_output(output, force=request.force)


def _check_disk(plan: Plan) -> None:
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
    depth = f", {plan.n_layer} layers" if plan.n_layer is not None else ""
    lines = [
        f"source    {printable(plan.source)} ({'GGUF' if plan.kind == 'gguf' else 'checkpoint'})",
        f"model     {printable(plan.architecture or 'known after the download')}{depth}",
    ]
    if plan.schedule is not None:
        first, *rest = layer_by_layer(plan.schedule)
        lines += [f"schedule  {first}", *rest]
    else:
        unknown = plan.architecture is None
        lines.append(f"schedule  {'known after the download' if unknown else 'none'}")
    if plan.download is not None:
        target = printable(hub.cache_folder(plan.download.listing.hub_id))
        n_files = len(plan.download.files)
        lines.append(f"download  {plan.download.told_size} in {n_files} file{'s' * (n_files > 1)} to {target}")
    lines += [f"{'steps' if i == 0 else '':<10}{i + 1}. {printable(step)}" for i, step in enumerate(plan.steps)]
    exact = plan.out_type is None and plan.kind == "gguf" and plan.download is None
    size = f"{'' if exact else 'about '}{format_bytes(plan.output_bytes)}"
    extra = f", and about {format_bytes(plan.temporary_bytes)} beside it for a while" if plan.temporary_bytes else ""
    lines.append(f"output    {printable(plan.output)} ({size}{extra})")
    return "\n".join([*lines, *(f"note      {printable(note)}" for note in plan.notes)])
