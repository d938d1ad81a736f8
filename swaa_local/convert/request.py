"""What is asked of a conversion, and what the source turns out to be. Knows names and listings; makes no plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swaa_local.convert import checkpoint as hf
from swaa_local.convert.checkpoint import Checkpoint
from swaa_local.errors import SWAAError
from swaa_local.files.user_input import user_path
from swaa_local.model_file.adapter import Adapter
from swaa_local.schedule.choice import ScheduleChoice, StoredSchedule
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.sources import hub


class ConvertError(SWAAError):
    """The conversion makes no sense, or cannot be done; nothing was written."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    schedule: a choice, or a function that makes one for a model of these layers, and may read what the source stores.
    lora: an adapter to merge into the weights of a checkpoint.
    calibration: what the schedule was found with, to be stored beside it.
    out_type: llama-quantize's name of a weight type, in any case; None: a GGUF's as it is, a checkpoint's 16-bit type.
    """

    source: str
    output: Path
    schedule: ScheduleChoice | Callable[[ModelLayers, Callable[[], StoredSchedule]], ScheduleChoice] = None
    calibration: str | None = None
    out_type: str | None = None
    pre_tokenizer: str | None = None
    force: bool = False
    allow_requantize: bool = False
    verbose: bool = False
    lora: Adapter | None = None

    def choice(self, layers: ModelLayers, read_stored: Callable[[], StoredSchedule] = StoredSchedule) -> ScheduleChoice:
        return self.schedule(layers, read_stored) if callable(self.schedule) else self.schedule


@dataclass(frozen=True)
class LocalGGUF:
    """A GGUF on this machine: the file, or the first one of a split model."""

    path: Path


@dataclass(frozen=True)
class LocalCheckpoint:
    """The folder of a checkpoint on this machine."""

    path: Path
    checkpoint: Checkpoint


Source = LocalGGUF | LocalCheckpoint | hub.HubModel


def resolve(request: Request) -> Source:
    """What `request.source` names: a file, a folder, or a model on a hub, whose listing is asked for.

    Raises `ConvertError` for what is none of them, `CheckpointError` and `HubError` for what cannot be converted.
    """
    path = user_path(request.source)
    if path.is_dir():
        return LocalCheckpoint(path, hf.read_checkpoint(path))
    if path.exists():
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            raise ConvertError(f"{path} is one file of a checkpoint; name its directory instead")
        return LocalGGUF(path)
    hub_id = hub.parse_hub_id(request.source)
    if hub_id is None or (request.source.endswith((".gguf", "/")) and ":" not in request.source):
        raise ConvertError(
            f"{request.source}: no such file or directory, and not a hub id (org/name or org/name:file.gguf)"
        )
    return hub.choose(hub.list_repo(hub_id))
