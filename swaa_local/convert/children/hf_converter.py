"""Child process that runs upstream's HF converter, with a pre-tokenizer's name and a schedule handed to it.

Run by checkpoint.py through child.py. It imports upstream's modules from where the patched llama-cpp-python has put
them and copies none of their code: two methods are wrapped, one that names the pre-tokenizer of a BPE vocabulary by a
hash, and one that begins to write the GGUF, beside those in `amend`.
"""

from __future__ import annotations

import functools
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swaa_local.convert.children.amend import amend_converter
from swaa_local.convert.children.lora import merge_while_converting
from swaa_local.convert.children.schedule import add_schedule
from swaa_local.files.child_process import child_main
from swaa_local.model_file.layer_kinds import layer_kinds
from swaa_local.schedule.model_layers import ModelLayers


class _LastError(logging.Handler):
    """Remembers what the converter logged as an error before it exited."""

    message: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()


def handle(request: dict[str, Any], emit: Callable[..., None]) -> None:
    """Convert. Events: `writing` with what is being written, `note`, and at a failure `error`.

    A request without a target only asks what the model's settings tell: `unsupported`, why no schedule can apply, and
    `layers`, the fields of `ModelLayers`.
    """
    converter = Path(request["converter"])
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    os.environ["TQDM_DISABLE"] = "1"
    last_error = _LastError(logging.ERROR)
    logging.getLogger().addHandler(last_error)
    logging.getLogger().addHandler(logging.StreamHandler())
    logging.getLogger().setLevel(logging.INFO)
    amend_converter()
    if "target" not in request:
        _judge_settings(Path(request["checkpoint"]), emit)
        return
    try:
        _wrap_pre_tokenizer(request.get("pre_tokenizer"), emit)
        if request.get("lora"):
            merge_while_converting(request["lora"]["path"], request["lora"]["scale"], emit)
        _wrap_writer(request.get("schedule"), emit)
        sys.argv = [
            str(converter),
            request["checkpoint"],
            "--outfile",
            request["target"],
            "--outtype",
            request["out_type"],
        ]
        runpy.run_path(str(converter), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            emit(error=last_error.message or f"upstream's converter stopped with exit code {stop.code}")
        raise
    except ImportError as error:
        emit(error=str(error), missing=error.name or "")
        raise
    except AssertionError as error:
        traceback.print_exc()
        emit(error=_what_was_asserted(error))
        raise SystemExit(1) from None
    except Exception as error:
        traceback.print_exc()
        emit(error=f"upstream's converter stopped: {type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _what_was_asserted(error: AssertionError) -> str:
    """Upstream's assertions have no words of their own."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    where, names = traceback.extract_tb(trace)[-1], trace.tb_frame.f_locals
    condition = (where.line or "").removeprefix("assert ")
    size, vocabulary = names.get("vocab_size"), getattr(names.get("tokenizer"), "vocab", None)
    if "vocab_size" in condition and size is not None and vocabulary:
        return (
            f"the tokenizer has tokens up to number {max(vocabulary.values())}, but the model has {size} tokens "
            "(vocab_size in config.json): take away what was added to the tokenizer (tokenizer.json, "
            "added_tokens.json), or give the model room for it (resize_token_embeddings in transformers)"
        )
    told = f"{error}" or f"it wants {condition}"
    return f"upstream's converter stopped: {told} ({Path(where.filename).name}, line {where.lineno})"


def _judge_settings(directory: Path, emit: Callable[..., None]) -> None:
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    from swaa_local.model_file.unsupported import unsupported_reason

    hparams = ModelBase.load_hparams(directory, False)
    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    model = model_class(directory, gguf.LlamaFileType.MOSTLY_F16, directory / "unused.gguf")
    model.set_gguf_parameters()
    keys = {key: entry.value for key, entry in model.gguf_writer.kv_data[0].items()}
    layers = _layers_of(model.gguf_writer.arch, keys)
    emit(
        unsupported=unsupported_reason(model.gguf_writer.arch, keys, keys.get),
        layers=asdict(layers) | {"kinds": [kind.value for kind in layers.kinds]},
    )


def _layers_of(architecture: str, keys: dict[str, Any]) -> ModelLayers:
    n_layer = keys[f"{architecture}.block_count"] - keys.get(f"{architecture}.nextn_predict_layers", 0)
    return layer_kinds(architecture, n_layer, keys.get)


def _wrap_pre_tokenizer(name: str | None, emit: Callable[..., None]) -> None:
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    @functools.wraps(original)
    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            known = original(self, tokenizer)
        except NotImplementedError:
            known = None
        if name is None and known is None:
            emit(error="unknown pre-tokenizer", unknown_pre_tokenizer=True)
            raise SystemExit(1)
        if name is not None and known not in (None, name):
            emit(note=f"upstream takes this tokenizer for {known}; writing {name} because --pre-tokenizer says so")
        emit(pre_tokenizer=name or known)
        return name or known

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def _wrap_writer(schedule: dict[str, Any] | None, emit: Callable[..., None]) -> None:
    import gguf

    from swaa_local.model_file.unsupported import unsupported_reason

    original = gguf.GGUFWriter.write_header_to_file

    @functools.wraps(original)
    def write_header_to_file(self: Any, path: Path | None = None) -> None:
        keys = {key: entry.value for key, entry in self.kv_data[0].items()}
        architecture = self.arch
        if schedule is not None:
            if reason := unsupported_reason(architecture, keys, keys.get):
                emit(error=f"no schedule can apply: {reason}; convert without one, or choose another model")
                raise SystemExit(1)
            modes = schedule["layer_modes"]
            layers = _layers_of(architecture, keys)
            if len(modes) != layers.n_layer:
                emit(error=f"the schedule has {len(modes)} layers, but the converted model has {layers.n_layer}")
                raise SystemExit(1)
            if reason := layers.refusal(modes):
                emit(error=f"the schedule has {reason}")
                raise SystemExit(1)
            add_schedule(self, schedule)
        n_bytes = sum(tensor.nbytes for shard in self.tensors for tensor in shard.values())
        emit(writing=n_bytes, architecture=architecture, file_type=int(keys.get("general.file_type", 0)))
        original(self, path)

    gguf.GGUFWriter.write_header_to_file = write_header_to_file


if __name__ == "__main__":
    child_main(handle)
