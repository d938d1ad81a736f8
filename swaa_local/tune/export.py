"""The adapter as files: PEFT's folder, and the GGUF that upstream's converter makes of it. Knows files; no training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swaa_local.convert.checkpoint import converter_path
from swaa_local.files.child_process import run_child
from swaa_local.model_file.adapter import KEY_BASE, KEY_BASE_SHA256, KEY_COMMAND
from swaa_local.tune.model import BaseModel
from swaa_local.tune.request import TuneRequest
from swaa_local.tune.results import TuneResult

_CHILD = "swaa_local.tune.children.lora_converter"
_FACTS = "swaa.json"


def write_peft(model: Any, folder: Path) -> None:
    """As `peft.PeftModel.from_pretrained` reads it."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def write_gguf(
    peft: Path, target: Path, base: BaseModel, result: TuneResult, request: TuneRequest, folder: Path
) -> None:
    """The adapter in GGUF, with its schedule, its base and the command. folder: for what is made on the way."""
    config = base.source.folder
    if base.source.gguf is not None:
        # The converter asks a checkpoint's config for the architecture.
        config = folder / "config"
        base.model.config.architectures = [type(base.model).__name__]
        base.model.config.save_pretrained(str(config))
    texts = {KEY_BASE: result.base, KEY_COMMAND: request.command}
    if base.base_sha256 is not None:
        texts[KEY_BASE_SHA256] = base.base_sha256
    run_child(
        _CHILD,
        {
            "converter": os.fspath(converter_path().with_name("convert_lora_to_gguf.py")),
            "peft": os.fspath(peft),
            "base": os.fspath(config),
            "target": os.fspath(target),
            "schedule": result.schedule.as_dict(),
            "texts": texts,
        },
        what="upstream's LoRA converter",
        culprit="PyTorch or another library of the converter",
    )


def write_facts(peft: Path, result: TuneResult, request: TuneRequest, base: BaseModel) -> None:
    """What came of it, beside PEFT's files, which have no place for it."""
    facts = result.as_dict() | {"base_sha256": base.base_sha256, "command": request.command}
    (peft / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
