"""Hugging Face checkpoints: what their folder says, and upstream's converter run on them in a child process.

Upstream's converter comes with the patched llama-cpp-python; PyTorch and transformers, which it needs, do not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.files.child_process import ChildError, Event, run_child
from swaa_local.model_file.adapter import Adapter
from swaa_local.report.progress import Reporter
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.model_layers import LayerKind, ModelLayers
from swaa_local.sources.checkpoint_files import WEIGHTS, checkpoint_files
from swaa_local.text.extras import install

# What the converter itself writes; other types go through llama.cpp's quantizer.
CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
EXTRA = install("convert")
_LAYER_KEYS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")  # as in upstream's TextModel
_HF_CONVERTER = "swaa_local.convert.children.hf_converter"
_NEEDED = ("torch", "transformers", "sentencepiece", "safetensors")


class CheckpointError(SWAAError):
    """The folder is no checkpoint that can be converted."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's facts. `path` is None while its weights are still on a hub."""

    path: Path | None
    label: str
    architecture: str
    """The class in transformers, for instance Qwen3ForCausalLM."""
    n_layer: int | None
    n_params: int | None
    weight_bytes: int

    def size_bytes(self, bpw: float) -> int:
        """Size of a GGUF with this many bits a weight, about."""
        return int((self.n_params if self.n_params is not None else self.weight_bytes // 2) * bpw / 8)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json and the headers of the weight files; `CheckpointError` if something is missing."""
    files, problem = checkpoint_files([entry.name for entry in directory.iterdir() if entry.is_file()])
    if problem is not None:
        raise CheckpointError(f"{directory} cannot be converted: {problem}")
    config = parse_config((directory / "config.json").read_bytes(), str(directory / "config.json"))
    weights = _indexed_weights(directory, [directory / name for name in files if name.endswith(WEIGHTS)])
    architecture, n_layer = architecture_of(config, str(directory)), n_layer_of(config)
    counts = [_safetensors_params(file) for file in weights if file.suffix == ".safetensors"]
    return Checkpoint(
        path=directory,
        label=str(directory),
        architecture=architecture,
        n_layer=n_layer,
        n_params=sum(counts) if counts else None,
        weight_bytes=sum(file.stat().st_size for file in weights),
    )


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} holds no JSON object")
    if not isinstance(config.get("text_config") or {}, dict):
        raise CheckpointError(f"{where}: text_config is {config['text_config']!r}, expected an object")
    return config


def architecture_of(config: dict[str, Any], where: str) -> str:
    """The class of the model; `CheckpointError` if upstream's converter does not know it, where that can be told."""
    names = config.get("architectures") or (config.get("text_config") or {}).get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{where}: config.json names no architecture ('architectures'), so it cannot be converted"
        )
    known = known_architectures()
    if known and names[0] not in known:
        raise CheckpointError(
            f"{where}: architecture {names[0]} is not known to this version of llama.cpp's converter "
            f"({len(known)} others are)"
        )
    return names[0]


def n_layer_of(config: dict[str, Any]) -> int | None:
    """Number of layers, of the language model where the checkpoint holds more; None if the config does not say."""
    merged = {**config, **(config.get("text_config") or {})}
    return next((merged[key] for key in _LAYER_KEYS if isinstance(merged.get(key), int)), None)


def _safetensors_params(path: Path) -> int:
    """Elements of all tensors, from the file's header; `CheckpointError` if it is cut off."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path} is not a whole safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
            n_params = sum(_product(entry["shape"]) for entry in entries)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CheckpointError(f"{path} is not a whole safetensors file; download it again") from None
    if 8 + length + end > size:
        raise CheckpointError(
            f"{path} is truncated: {8 + length + end} bytes expected, {size} there; download it again"
        )
    return n_params


def _product(dims: list[int]) -> int:
    n = 1
    for dim in dims:
        n *= dim
    return n


def _indexed_weights(directory: Path, weights: list[Path]) -> list[Path]:
    """The files that the checkpoint's index names, where it has one, else `weights`."""
    kind = "model.safetensors" if weights[0].suffix == ".safetensors" else "pytorch_model.bin"
    index = directory / f"{kind}.index.json"
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except FileNotFoundError:
        return weights
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index} is damaged; download it again") from None
    missing = [name for name in names if not isinstance(name, str) or not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} cannot be converted: {index.name} names {len(names)} files of weights, and "
            f"{', '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} missing; download what is missing"
        )
    return [directory / name for name in names]


# Upstream's converter


def converter_path() -> Path:
    """convert_hf_to_gguf.py, as the patched llama-cpp-python ships it. Loads no engine."""
    spec = importlib.util.find_spec("llama_cpp")
    for package in (spec.submodule_search_locations or []) if spec else []:
        path = Path(package, "convert", "convert_hf_to_gguf.py")
        if path.is_file():
            return path
    raise SWAAError(
        "the installed llama-cpp-python has no HF converter, so it is not the patched one; run `pip install ./patches` "
        "in a checkout of swaa-local (a ready GGUF needs no converter)"
    )


def require_extra() -> None:
    """`SWAAError` with the remedy if PyTorch or another need of the converter is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SWAAError(
            f"converting a Hugging Face checkpoint needs {', '.join(map(_package_name, missing))}: run {EXTRA}; "
            "a ready GGUF (a file, or org/name:file.gguf) needs none of it"
        )


def _package_name(module: str) -> str:
    return {"torch": "PyTorch"}.get(module, module)


def known_architectures() -> frozenset[str]:
    """Architectures in the converter's own table; empty if it cannot be found."""
    try:
        source = (converter_path().parent / "conversion" / "__init__.py").read_text(encoding="utf-8")
    except (SWAAError, OSError):
        return frozenset()
    table = re.search(r"TEXT_MODEL_MAP[^{]*\{(.*?)^\}", source, re.DOTALL | re.MULTILINE)
    return frozenset(re.findall(r'^\s*"(\w+)":', table[1], re.MULTILINE)) if table else frozenset()


def pre_tokenizers() -> tuple[str, ...]:
    """Names of pre-tokenizers that the converter gives, which are those that llama.cpp reads."""
    source = (converter_path().parent / "conversion" / "base.py").read_text(encoding="utf-8")
    body = source.partition("Marker: Start get_vocab_base_pre")[2].partition("Marker: End get_vocab_base_pre")[0]
    return tuple(sorted({"default", *re.findall(r'^\s+res = "([^"]+)"', body, re.MULTILINE)}))


def check_pre_tokenizer(name: str) -> None:
    """`SWAAError` that lists the names if this is none of them."""
    names = pre_tokenizers()
    if name not in names:
        raise SWAAError(f"unknown --pre-tokenizer {name!r}; known are {', '.join(names)}")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint's config.json tells of schedules. None where it does not tell.

    unsupported: why none can apply. layers: what they are.
    """

    unsupported: str | None = None
    layers: ModelLayers | None = None


def read_settings(directory: Path) -> Settings:
    """Ask upstream's converter, which reads config.json and no weights."""
    request = {"converter": os.fspath(converter_path()), "checkpoint": os.fspath(directory)}
    try:
        events = run_child(_HF_CONVERTER, request, what="upstream's converter")
    except ChildError:
        # Some settings cannot be read without the weights; the conversion itself will judge.
        return Settings()
    told = next((event for event in events if "unsupported" in event), None)
    if told is None:
        return Settings()
    layers = told["layers"]
    kinds = tuple(LayerKind(kind) for kind in layers["kinds"])
    return Settings(told["unsupported"], ModelLayers(kinds, layers["own_window"], tuple(layers["kv_of"])))


def convert_checkpoint(
    checkpoint: Path,
    target: Path,
    out_type: str,
    *,
    schedule: Schedule | None = None,
    pre_tokenizer: str | None = None,
    lora: Adapter | None = None,
    reporter: Reporter,
    verbose: bool = False,
) -> None:
    """Write a checkpoint as GGUF, schedule included, with upstream's converter.

    lora: what is merged into the weights.
    out_type: one of `CONVERTER_TYPES`, or `auto`: the 16-bit type that the checkpoint has. verbose: the converter's log
    on stderr. Raises `SWAAError`; a partial target is the caller's to remove.
    """
    request = {
        "converter": os.fspath(converter_path()),
        "checkpoint": os.fspath(checkpoint),
        "target": os.fspath(target),
        "out_type": out_type,
        "pre_tokenizer": pre_tokenizer,
        "schedule": schedule and schedule.as_dict(),
        "lora": lora and {"path": os.fspath(lora.path), "scale": lora.scale},
    }
    try:
        with _Stage(reporter, target) as stage:
            events = run_child(
                _HF_CONVERTER,
                request,
                what="upstream's converter",
                on_event=stage.on_event,
                on_tick=stage.on_tick,
                echo=verbose,
                culprit="PyTorch or another library of the converter",
            )
    except ChildError as error:
        if stage.unknown_pre_tokenizer:
            raise SWAAError(
                "upstream's converter does not know this BPE tokenizer; name its pre-tokenizer with --pre-tokenizer "
                "NAME: usually the name of the model that this one was fine-tuned from. Known names: "
                + ", ".join(pre_tokenizers())
            ) from None
        if stage.missing:
            raise SWAAError(f"the converter cannot import {stage.missing} ({error}); run {EXTRA}") from None
        raise
    if pre_tokenizer is not None and not any("pre_tokenizer" in event for event in events):
        reporter.note(f"--pre-tokenizer {pre_tokenizer} had no effect: this tokenizer is not of the kind that has one")


class _Stage:
    """Turns the converter's events into two steps of progress: reading, then writing, measured by the file's size."""

    def __init__(self, reporter: Reporter, target: Path) -> None:
        self._reporter, self._target = reporter, target
        self._step: Any = None
        self._update: Any = None
        self.unknown_pre_tokenizer = False
        self.missing = ""

    def __enter__(self) -> _Stage:
        self._begin("reading the checkpoint", None)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._step.__exit__(*exc)

    def _begin(self, label: str, total: int | None) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = self._reporter.step(label, total, is_bytes=total is not None)
        self._update = self._step.__enter__()

    def on_event(self, event: Event) -> None:
        if "note" in event:
            self._reporter.note(event["note"])
        if "writing" in event:
            self._begin("writing the GGUF", event["writing"])
        self.unknown_pre_tokenizer |= "unknown_pre_tokenizer" in event
        self.missing = event.get("missing", self.missing)

    def on_tick(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._update(self._target.stat().st_size)


# What a folder or a repository holds, by its files' names
