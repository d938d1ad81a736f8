"""`swaa-local convert` from a Hugging Face checkpoint: upstream's converter, pre-tokenizers, quantizing, refusals."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from swaa_local.convert import checkpoint
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.schedule.config import LayerMode, Schedule
from tests.support.program import ROOT, fails, interrupt, run, succeeds

F, P = LayerMode.FULL, LayerMode.PREFILL
OPTIONS = ("--window", 8, "--sinks", 2, "--full-layers", "0::2", "--fa-decode")
SCHEDULE = Schedule(8, 2, (F, P, F, P))
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4}


def nothing_left(directory: Path, *names: str) -> bool:
    return sorted(os.listdir(directory)) == sorted(names)


def write_safetensors(path: Path, shape=(8, 8), *, cut: int = 0) -> Path:
    """One float16 tensor; `cut` bytes are missing at the end."""
    n_bytes = 2 * int(np.prod(shape))
    header = json.dumps({"w": {"dtype": "F16", "shape": list(shape), "data_offsets": [0, n_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(n_bytes - cut))
    return path


@pytest.fixture
def outline(tmp_path) -> Path:
    """A checkpoint's folder with a config and weights, but nothing that could be converted."""
    directory = tmp_path / "outline"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    write_safetensors(directory / "model.safetensors")
    return directory


# What needs no PyTorch


def test_folders_that_are_no_checkpoints(tmp_path):
    out = tmp_path / "o.gguf"
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fails("convert", tmp_path / "empty", "-o", out)
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "model-q8_0.gguf").touch()
    assert "holds GGUF files; name one of them: model-q8_0.gguf" in fails("convert", tmp_path / "ggufs", "-o", out)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").touch()
    assert "LoRA adapter; merge it" in fails("convert", tmp_path / "lora", "-o", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "names no architecture"),
        ('{"architectures": 5}', "names no architecture"),
        ('{"text_config": [1]}', "text_config is [1], expected an object"),
        (json.dumps({"architectures": ["NoSuchForCausalLM"]}), "NoSuchForCausalLM is not known to this version"),
    ],
)
def test_bad_configs(tmp_path, outline, config, message):
    (outline / "config.json").write_text(config)
    assert message in fails("convert", outline, "-o", tmp_path / "o.gguf")


def test_missing_and_damaged_weights(tmp_path, outline):
    out, weights = tmp_path / "o.gguf", outline / "model.safetensors"
    write_safetensors(weights, cut=10)
    assert "model.safetensors is truncated: 202 bytes expected, 192 there" in fails("convert", outline, "-o", out)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is not a whole safetensors file" in fails("convert", outline, "-o", out)
    assert "is one file of a checkpoint; name its directory" in fails("convert", weights, "-o", out, *OPTIONS)
    weights.unlink()
    assert "has a config.json but no weights" in fails("convert", outline, "-o", out)


@pytest.mark.parametrize(
    ("files", "gone", "message"),
    [
        (
            ("adapter_config.json", "adapter_model.safetensors"),
            ("model.safetensors",),
            "it is a LoRA adapter; merge",
        ),
        (("adapter_model.safetensors",), ("model.safetensors", "config.json"), "it is a LoRA adapter; merge"),
        (
            ("unet.safetensors",),
            ("model.safetensors",),
            "does not read (unet.safetensors); it reads model*",
        ),
        (("consolidated.safetensors",), ("model.safetensors",), "in Mistral's own format alone"),
        (("._model.safetensors",), ("model.safetensors",), "a config.json but no weights"),
        (("model-00002-of-00003.safetensors",), (), "model-00001-of-00003.safetensors is missing; download it too"),
        (("pytorch_model-00001-of-00002.bin",), ("model.safetensors",), "pytorch_model-00002-of-00002.bin is missing"),
        (("tokenizer_config.json",), ("tokenizer.json",), "it has no tokenizer (tokenizer.json, tokenizer.model or"),
        (("model.gguf",), ("model.safetensors", "config.json"), "holds GGUF files; name one of them: model.gguf"),
    ],
)
@pytest.mark.parametrize("options", [(), OPTIONS])
def test_a_folder_that_lacks_something_says_what_it_is(tmp_path, outline, files, gone, message, options):
    for name in files:
        write_safetensors(outline / name)
    for name in gone:
        (outline / name).unlink()
    good = tmp_path / "good.gguf"
    good.write_bytes(b"precious")
    assert message in fails("convert", outline, "-o", good, "--force", *options)
    assert good.read_bytes() == b"precious"


def test_an_index_tells_what_is_missing(tmp_path, outline):
    index, out = outline / "model.safetensors.index.json", tmp_path / "o.gguf"
    index.write_text(json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}))
    write_safetensors(outline / "second.safetensors")
    message = fails("convert", outline, "-o", out)
    assert "model.safetensors.index.json names 2 files of weights, and first.safetensors is missing" in message
    index.write_text("[]")
    assert "model.safetensors.index.json is damaged; download it again" in fails("convert", outline, "-o", out)


def test_what_lies_beside_the_weights_counts_for_nothing(tmp_path, outline):
    """macOS writes ._ files to foreign disks; Mistral ships the weights a second time."""
    (outline / "._model.safetensors").write_bytes(b"\0\5\26\7 Mac OS X")
    (outline / "._config.json").write_bytes(b"\0\5\26\7 Mac OS X")
    write_safetensors(outline / "consolidated.safetensors", (800, 800))
    write_safetensors(outline / "adapter_model.safetensors", (80, 80))
    found = checkpoint.read_checkpoint(outline)
    assert found.n_params == 64
    assert found.weight_bytes == (outline / "model.safetensors").stat().st_size


def test_without_pytorch_the_error_says_what_to_install_and_that_a_gguf_needs_none(tmp_path, outline):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = lambda name, *a: None if name in ('torch', 'transformers') else find(name, *a)\n"
    )
    message = fails("convert", outline, "-o", tmp_path / "o.gguf", PYTHONPATH=f"{tmp_path}:{ROOT}")
    for part in ("PyTorch, transformers", "pip install 'swaa-local[convert]'", "a ready GGUF"):
        assert part in message


def test_parameters_are_counted_from_headers(outline):
    write_safetensors(outline / "model-2.safetensors", (3, 5))
    assert checkpoint.read_checkpoint(outline).n_params == 64 + 15


def test_layer_counts_by_every_name():
    for config, expected in (
        ({"num_hidden_layers": 4}, 4),
        ({"n_layer": 5}, 5),
        ({"text_config": {"num_hidden_layers": 6}}, 6),
        ({}, None),
    ):
        assert checkpoint.n_layer_of(config) == expected


def test_names_are_read_from_upstreams_converter():
    names = checkpoint.pre_tokenizers()
    assert {"qwen2", "llama-bpe", "default", "tekken"} <= set(names)
    assert {"Qwen3ForCausalLM", "LlamaForCausalLM"} <= checkpoint.known_architectures()


# What needs PyTorch


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """qwen3 with a SentencePiece tokenizer, olmo2 with a BPE one that no hash is known of."""
    pytest.importorskip("torch", reason="PyTorch is not installed, so no checkpoint is converted")
    pytest.importorskip("transformers", reason="transformers is not installed, so no checkpoint is converted")
    from tests.support.tiny_hf import write_checkpoint

    directory = tmp_path_factory.mktemp("checkpoints")
    for kind in ("qwen3", "olmo2"):
        write_checkpoint(directory / kind, kind)
    return directory


def test_a_checkpoint_becomes_a_gguf_with_its_schedule(tmp_path, checkpoints):
    from safetensors.numpy import load_file

    out = tmp_path / "out.gguf"
    done = run("convert", checkpoints / "qwen3", "-o", out, "--outtype", "F32", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert read_schedule(out) == SCHEDULE
    info = read_model_info(out)
    assert (info.architecture, info.n_layer, info.file_type) == ("qwen3", 4, "F32")
    tensors = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    weights = load_file(checkpoints / "qwen3" / "model.safetensors")
    assert np.array_equal(tensors["blk.2.ffn_up.weight"], weights["model.layers.2.mlp.up_proj.weight"])
    assert nothing_left(tmp_path, "out.gguf")


def test_what_goes_without_saying_is_noted(tmp_path, checkpoints):
    out = tmp_path / "out.gguf"
    done = run("convert", checkpoints / "qwen3", "-o", out, "--pre-tokenizer", "qwen2", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "no schedule: the file will run with full attention; " in done.stderr
    assert "--preset quality adds one, or calibrate finds one if its architecture takes one" in done.stderr
    assert "--pre-tokenizer qwen2 had no effect" in done.stderr
    assert "blk.0.attn_q.weight" in done.stderr  # the converter's log
    assert read_schedule(out) is None
    assert read_model_info(out).file_type == "F16"


def test_other_types_go_through_the_quantizer(tmp_path, checkpoints):
    out = tmp_path / "out.gguf"
    done = run("convert", checkpoints / "qwen3", "-o", out, "--outtype", "q5_0", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "quantizing to Q5_0" in done.stderr
    assert read_schedule(out) == SCHEDULE
    assert read_model_info(out).file_type == "Q5_0"
    assert nothing_left(tmp_path, "out.gguf")


def test_an_unknown_pre_tokenizer_has_to_be_named(tmp_path, checkpoints):
    out = tmp_path / "out.gguf"
    message = fails("convert", checkpoints / "olmo2", "-o", out)
    assert "--pre-tokenizer NAME" in message
    assert all(name in message for name in ("qwen2", "llama-bpe", "smollm"))
    assert nothing_left(tmp_path)
    assert "unknown --pre-tokenizer 'qwen9'; known are" in fails(
        "convert", checkpoints / "olmo2", "-o", out, "--pre-tokenizer", "qwen9"
    )
    succeeds("convert", checkpoints / "olmo2", "-o", out, *OPTIONS, "--pre-tokenizer", "qwen2")
    assert gguf.GGUFReader(out).fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert read_schedule(out) == SCHEDULE


def with_settings(checkpoint: Path, directory: Path, settings: dict[str, object]) -> Path:
    """The checkpoint with other settings in its config.json."""
    directory.mkdir()
    for file in checkpoint.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_layers_with_windows_of_their_own_are_known_before_the_weights_are_converted(tmp_path, checkpoints):
    """The list of full layers counts those that can slide: the first of layers 1 and 3."""
    own = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
    directory, out = with_settings(checkpoints / "olmo2", tmp_path / "olmo2", own), tmp_path / "o.gguf"
    command = ("convert", directory, "-o", out, "--pre-tokenizer", "qwen2", *OPTIONS)
    assert "  0 wFwP\n" in succeeds(*command, "--dry-run")
    succeeds(*command)
    assert read_schedule(out) == Schedule(8, 2, (F, F, F, P))
    assert read_model_info(out).layers.own_window == 64
    named = ("convert", directory, "-o", out, "--force", "--window", 8, "--full-layers", "2")
    assert "layer 2 has a window of its own (64 tokens) and cannot slide" in fails(*named)


def test_an_architecture_is_refused_before_its_weights_are_written(tmp_path, checkpoints):
    own = {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 4}
    directory = with_settings(checkpoints / "olmo2", tmp_path / "olmo2", own)
    message = fails("convert", directory, "-o", tmp_path / "o.gguf", "--pre-tokenizer", "qwen2", *OPTIONS)
    assert "architecture 'olmo2' has no layer that can slide: own window (4096 tokens)" in message
    assert nothing_left(tmp_path, "olmo2")


def test_what_upstreams_converter_cannot_do_is_one_line(tmp_path, checkpoints):
    directory = tmp_path / "broken"
    directory.mkdir()
    for file in (checkpoints / "qwen3").iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "model.safetensors").unlink()
    write_safetensors(directory / "model.safetensors")
    message = fails("convert", directory, "-o", tmp_path / "o.gguf", *OPTIONS)
    assert "upstream's converter stopped: ValueError: Can not map tensor 'w'" in message
    assert nothing_left(tmp_path, "broken")


def linked(source: Path, target: Path, *, without: str) -> Path:
    """A checkpoint's folder of links to another's files, all but one."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != without:
            (target / file.name).symlink_to(file)
    return target


@pytest.mark.parametrize("options", [(), OPTIONS])
def test_what_was_written_must_run_before_it_replaces_anything(tmp_path, checkpoints, options):
    """The converter writes what it is given: here, a model without its last layer."""
    from safetensors.numpy import load_file, save_file

    directory = linked(checkpoints / "qwen3", tmp_path / "lacking", without="model.safetensors")
    weights = load_file(checkpoints / "qwen3" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.3." not in name}
    save_file(kept, directory / "model.safetensors")
    good = tmp_path / "good.gguf"
    good.write_bytes(b"precious")
    message = fails("convert", directory, "-o", good, "--force", *options)
    assert "the engine would not run" in message
    assert "blk.3" in message
    assert good.read_bytes() == b"precious"
    assert nothing_left(tmp_path, "good.gguf", "lacking")


def test_a_vocabulary_larger_than_the_model_s_is_said_in_numbers(tmp_path, checkpoints):
    directory = linked(checkpoints / "olmo2", tmp_path / "larger", without="config.json")
    config = json.loads((checkpoints / "olmo2" / "config.json").read_text())
    n_vocab = config["vocab_size"]
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": n_vocab - 3}))
    message = fails("convert", directory, "-o", tmp_path / "o.gguf", "--pre-tokenizer", "qwen2")
    assert f"the tokenizer has tokens up to number {n_vocab - 1}, but the model has {n_vocab - 3} tokens" in message
    assert "resize_token_embeddings" in message
    assert nothing_left(tmp_path, "larger")


def test_dry_run_shows_the_plan(tmp_path, checkpoints):
    text = succeeds("convert", checkpoints / "qwen3", "-o", tmp_path / "o.gguf", "--outtype", "q4_k_m", "--dry-run")
    for part in (
        "Qwen3ForCausalLM, 4 layers",
        "schedule  none",
        "1. convert the checkpoint",
        "2. quantize it to Q4_K_M",
    ):
        assert part in text
    assert nothing_left(tmp_path)


def test_stopping_the_converter_leaves_nothing(tmp_path, checkpoints):
    args = ("convert", checkpoints / "qwen3", "-o", tmp_path / "out.gguf", *OPTIONS)
    assert interrupt(*args, when=lambda: any(tmp_path.glob(".swaa-local-*"))) == 130
    assert nothing_left(tmp_path)
