"""`swaa-local convert` from a Hugging Face checkpoint: upstream's converter, pre-tokenizers, quantizing, refusals."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from program import ROOT, fails, interrupt, run, succeeds

from swaa_local import checkpoint
from swaa_local.config import LayerMode, Schedule
from swaa_local.gguf_meta import read_model_info, read_schedule

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
    from tiny_hf import write_checkpoint

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
    assert "no schedule: the file will run with full attention" in done.stderr
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
    message = fails("convert", checkpoints / "olmo2", "-o", out, *OPTIONS)
    assert "--pre-tokenizer NAME" in message
    assert all(name in message for name in ("qwen2", "llama-bpe", "smollm"))
    assert nothing_left(tmp_path)
    assert "unknown --pre-tokenizer 'qwen9'; known are" in fails(
        "convert", checkpoints / "olmo2", "-o", out, "--pre-tokenizer", "qwen9"
    )
    succeeds("convert", checkpoints / "olmo2", "-o", out, *OPTIONS, "--pre-tokenizer", "qwen2")
    assert gguf.GGUFReader(out).fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert read_schedule(out) == SCHEDULE


def test_an_architecture_is_refused_before_its_weights_are_written(tmp_path, checkpoints):
    directory = tmp_path / "olmo2"
    directory.mkdir()
    for file in (checkpoints / "olmo2").iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text()) | {"sliding_window": 4096}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    message = fails("convert", directory, "-o", tmp_path / "o.gguf", "--pre-tokenizer", "qwen2", *OPTIONS)
    assert "architecture 'olmo2' has a sliding window of its own (4096 tokens)" in message
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
