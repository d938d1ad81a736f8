"""LoRA adapters in GGUF: what was asked for, what a file's header says, and whether it belongs to a model and schedule.

`swaa-local tune` writes its keys beside those of llama.cpp's converter; adapters of other origin have none of them, and
nothing is said about what nobody knows. Reads headers and one small tensor; nothing of the engine.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swaa_local.errors import GGUFError
from swaa_local.files.user_input import user_path
from swaa_local.model_file.check import bad_value
from swaa_local.model_file.header import GGUFFile, iter_chunks
from swaa_local.model_file.schedule_keys import KEY_VERSION, schedule_entries
from swaa_local.model_file.split import open_gguf
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import in_words
from swaa_local.text.printable import printable

KEY_BASE = "swaa_tune.base"
"""Name of the model that the adapter was tuned on."""
KEY_BASE_SHA256 = "swaa_tune.base_sha256"
"""Of the base model's `output_norm.weight` in float32, which every file of that model has, however it is quantized."""
KEY_COMMAND = "swaa_tune.command"
KEY_ALPHA = "adapter.lora.alpha"
_BASE_TENSOR = "output_norm.weight"
_A, _B = ".lora_a", ".lora_b"
_F32 = 0
_PEFT_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """What was asked for: a file and the factor of what it adds."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """FILE or FILE:SCALE; a file that is called so as a whole is meant.

        Raises `GGUFError` for a scale that is not finite.
        """
        path = user_path(text)
        name, colon, scale = text.rpartition(":")
        if not colon or not name or path.exists():
            return cls(path)
        try:
            number = float(scale)
        except ValueError:
            return cls(path)
        if not math.isfinite(number):
            raise GGUFError(f"{text}: the scale of a LoRA adapter is a finite number, not {scale}")
        return cls(user_path(name), number)

    @classmethod
    def parse_list(cls, text: str) -> tuple[Adapter, ...]:
        """As llama-server takes several: separated by commas, in quotes where a name has one."""
        if cls.parse(text).path.exists():
            return (cls.parse(text),)
        return tuple(cls.parse(item) for item in next(csv.reader([text]), ()) if item)

    def __str__(self) -> str:
        return str(self.path) if self.scale == 1 else f"{self.path}:{self.scale:g}"


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's header says. targets: names of the base model's tensors that it changes."""

    path: Path
    architecture: str
    alpha: float
    rank: int
    targets: tuple[str, ...]
    others: tuple[str, ...]
    """Tensors that belong to no pair of `lora_a` and `lora_b`."""
    is_tuned: bool
    """Whether `swaa-local tune` made it, so that base and schedule are known; no schedule is then full attention."""
    schedule: Schedule | None
    base: str | None
    base_sha256: str | None
    command: str | None

    def remarks(self, model: GGUFFile, schedules: Sequence[Schedule | None]) -> list[str]:
        """What to tell a user who runs it on this model, under these schedules (None: full attention)."""
        told = []
        name = printable(self.path.name)
        mine = base_sha256(model)
        if self.base_sha256 and mine and self.base_sha256 != mine:
            told.append(
                f"the LoRA adapter {name} was tuned on {printable(self.base or 'another model')}, and this is another "
                f"model: {printable(model_name(model))}"
            )
        return told + self.schedule_remarks(schedules)

    def schedule_remarks(self, schedules: Sequence[Schedule | None]) -> list[str]:
        """Of these, what concerns the schedules."""
        schedules = [None if schedule is None or schedule.is_full else schedule for schedule in schedules]
        if not self.is_tuned or not schedules or self.schedule in schedules:
            return []
        name = printable(self.path.name)
        run = " or ".join(dict.fromkeys(_words(schedule) for schedule in schedules))
        return [f"the LoRA adapter {name} was tuned for the schedule {_words(self.schedule)}, and runs with {run}"]


def _words(schedule: Schedule | None) -> str:
    return "full attention" if schedule is None else in_words(schedule)


def read_adapter(path: Path) -> AdapterInfo:
    """The facts of an adapter. Raises `GGUFError` for a file that is none, saying what it is instead."""
    if path.is_dir():
        what = "a folder"
        if (path / _PEFT_FILE).is_file():
            what = "an adapter as PEFT writes it; the GGUF that `swaa-local tune` writes with it, or that llama.cpp's "
            what += "convert_lora_to_gguf.py makes of it, is what runs"
        raise GGUFError(f"{path}: {what}")
    with open_gguf(path) as file:
        return _adapter_info(file)


def _adapter_info(file: GGUFFile) -> AdapterInfo:
    kind = file.get("general.type") or "model"
    if kind != "adapter" or file.get("adapter.type") != "lora":
        told = printable(str(file.get("adapter.type"))) if kind == "adapter" else printable(str(kind))
        raise GGUFError(f"{file.path}: is of type {told} and not a LoRA adapter")
    alpha = file.get(KEY_ALPHA)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        if KEY_ALPHA in file.keys:
            raise bad_value(file, KEY_ALPHA, "a finite number")
        raise GGUFError(f"{file.path}: key {KEY_ALPHA} is missing, so this is not a complete LoRA adapter")
    shapes = {tensor.name: tensor.dims for tensor in file.tensors}
    names = [name.removesuffix(_A) for name in shapes if name.endswith(_A)]
    targets = [name for name in names if name + _B in shapes]
    paired = {name + part for name in targets for part in (_A, _B)}
    is_tuned = KEY_BASE in file.keys
    return AdapterInfo(
        path=file.path,
        architecture=str(file.get("general.architecture", "")),
        alpha=alpha,
        rank=max((shapes[name + _B][0] for name in targets), default=0),
        targets=tuple(targets),
        others=tuple(name for name in shapes if name not in paired),
        is_tuned=is_tuned,
        schedule=schedule_entries(file) if KEY_VERSION in file.keys else None,
        base=_text(file, KEY_BASE),
        base_sha256=_text(file, KEY_BASE_SHA256),
        command=_text(file, KEY_COMMAND),
    )


def _text(file: GGUFFile, key: str) -> str | None:
    value = file.get(key)
    if value is not None and not isinstance(value, str):
        raise bad_value(file, key, "a text")
    return value


def model_name(file: GGUFFile) -> str:
    """What a model calls itself, with its file's name."""
    name = file.get("general.name")
    return f"{file.path.name} ({name})" if isinstance(name, str) and name else file.path.name


def base_sha256(file: GGUFFile) -> str | None:
    """The fingerprint of a model (`KEY_BASE_SHA256`); None for one that lacks the tensor."""
    tensor = next((tensor for tensor in file.tensors if tensor.name == _BASE_TENSOR), None)
    if tensor is None or tensor.type != _F32 or not tensor.n_bytes:
        return None
    digest, offset = hashlib.sha256(), tensor.offset
    for segment in file.segments:
        if offset < segment.length:
            for chunk in iter_chunks(segment.path, segment.offset + offset, tensor.n_bytes):
                digest.update(chunk)
            return digest.hexdigest()
        offset -= segment.length + segment.padding
    return None


def adapter_remarks(
    info: AdapterInfo, model: str | os.PathLike[str], schedules: Sequence[Schedule | None]
) -> list[str]:
    """`AdapterInfo.remarks` for a model's file."""
    with open_gguf(model) as file:
        return info.remarks(file, schedules)
