"""`swaa-local convert` from a hub id, against a stand-in for the hub: choice of files, resume, offline, refusals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.sources.checkpoint_files import checkpoint_files
from swaa_local.sources.hub import HubId, parse_hub_id
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.gguf_edit import write_split
from tests.support.program import fails, interrupt, run, succeeds

OPTIONS = ("--window", 8, "--sinks", 2, "--full-layers", "0::2", "--fa-decode")
SCHEDULE = Schedule(8, 2, (LayerMode.FULL, LayerMode.PREFILL) * 2)
CONFIG = json.dumps({"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4}).encode()


@pytest.fixture
def hub(tiny_model, tmp_path_factory) -> Iterator[FakeHub]:
    model = tiny_model.read_bytes()
    repos = {
        "org/one": {"README.md": b"hello", "one.gguf": model, "mmproj-one.gguf": b"x", "one.mmproj-F16.gguf": b"x"},
        "org/many": {"many-Q4_K_M.gguf": b"", "many-Q8_0.gguf": model, "sub/many-Q6_K.gguf": b""},
        "org/lacking": {"lack-00001-of-00003.gguf": model, "lack-00003-of-00003.gguf": b""},
        "org/forged": {"a\x1b[31m.gguf": model},
        "org/hf": {
            "config.json": CONFIG,
            "tokenizer.json": b"{}",
            "model.safetensors": bytes(1000),
            "hf.gguf": model,
            "original/w.bin": b"",
        },
        "org/split": {
            f"{kind}-{kind}-0000{i + 1}-of-00002.gguf": part.read_bytes()
            for kind in ("Q8_0", "Q4_0")
            for i, part in enumerate(write_split(tiny_model, tmp_path_factory.mktemp(kind), kind, 2))
        },
        "org/nothing": {"README.md": b"hello"},
        "org/gated": {"g.gguf": model},
    }
    with FakeHub(repos, gated={"org/gated"}).serve() as hub:
        yield hub


@pytest.fixture
def env(hub, tmp_path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_ETAG_TIMEOUT": "5"}


def test_the_only_gguf_is_taken_and_cached(hub, env, tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    done = run("convert", "org/one", "-o", out, *OPTIONS, **env)
    assert done.returncode == 0, done.stderr
    assert read_schedule(out) == SCHEDULE
    assert f"downloading 1.7 MiB to {tmp_path}/hf/hub/models--org--one" in done.stderr
    assert [name for name, _ in hub.bodies()] == ["one.gguf"]
    succeeds("convert", "org/one", "-o", tmp_path / "again.gguf", *OPTIONS, **env)
    assert [name for name, _ in hub.bodies()] == ["one.gguf"]
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("name", ["many-Q8_0.gguf", "q8_0"])
def test_a_file_is_named_by_name_or_type(hub, env, tmp_path, name):
    succeeds("convert", f"org/many@v2:{name}", "-o", tmp_path / "out.gguf", *OPTIONS, **env)
    assert read_schedule(tmp_path / "out.gguf") == SCHEDULE
    assert [name for name, _ in hub.bodies()] == ["many-Q8_0.gguf"]
    assert any(path == "/api/models/org/many/revision/v2" for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/many", "holds 3 GGUF models; name one, as in org/many:many-Q4_K_M.gguf"),
        ("org/many:Q5_0", "'Q5_0' is not in the repository; its GGUF models are many-Q4_K_M.gguf, many-Q8_0.gguf"),
        ("org/many:many", "'many' matches several models"),
        ("org/lacking", "lack-00001-of-00003.gguf has 3 parts, and the repository lacks lack-00002-of-00003.gguf"),
        ("org/forged", "has a file with control characters in its name"),
        ("org/one:F16", "'F16' is not in the repository; its GGUF models are one.gguf"),
        ("org/one:README.md", "README.md is not a GGUF file"),
        (
            "org/nothing",
            "holds no GGUF file, and no checkpoint that can be converted: it has no config.json",
        ),
        ("org/none", "org/none is not on the hub, or private"),
        ("org/one@v9", "org/one has no revision 'v9'"),
        ("org/gated", "org/gated is gated: accept its terms"),
    ],
)
def test_what_is_unclear_or_not_there(hub, env, tmp_path, source, message):
    assert message in fails("convert", source, "-o", tmp_path / "o.gguf", *OPTIONS, **env)
    assert hub.bodies() == []
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("name", ["q8_0", "Q8_0-Q8_0-00001-of-00002.gguf", "Q8_0-Q8_0-00002-of-00002.gguf"])
def test_a_model_in_parts_is_fetched_whole_and_merged(hub, env, tmp_path, tiny_model, name):
    """By its type, by the name that the list of models advises, or by any other part's."""
    advised = fails("convert", "org/split", "-o", tmp_path / "o.gguf", **env)
    assert "holds 2 GGUF models; name one, as in org/split:Q8_0-Q8_0-00001-of-00002.gguf" in advised
    succeeds("convert", f"org/split:{name}", "-o", tmp_path / "out.gguf", **env)
    assert (tmp_path / "out.gguf").read_bytes() == tiny_model.read_bytes()
    assert {name for name, _ in hub.bodies()} == {f"Q8_0-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)}


def test_a_model_in_parts_is_chatted_with(hub, env):
    succeeds("chat", "org/split:Q4_0", "-t", "1", "-c", "256", "-n", "2", "-p", "Hi", **env)
    succeeds("chat", "org/split:Q4_0", "-t", "1", "-c", "256", "-n", "2", "-p", "Hi", **env, HF_HUB_OFFLINE="1")


def test_who_runs_a_model_takes_the_only_gguf_beside_a_checkpoint(hub, env):
    succeeds("chat", "org/hf", "-t", "1", "-c", "256", "-n", "2", "-p", "Hi", **env)
    assert [name for name, _ in hub.bodies()] == ["hf.gguf"]


def test_a_token_opens_what_is_gated(env, tmp_path):
    succeeds("convert", "org/gated", "-o", tmp_path / "out.gguf", *OPTIONS, **env, HF_TOKEN="hf_good")
    assert read_schedule(tmp_path / "out.gguf") == SCHEDULE


def test_mistakes_are_found_before_the_download(hub, env, tmp_path):
    (tmp_path / "there.gguf").touch()
    out = tmp_path / "out.gguf"
    assert "exists" in fails("convert", "org/one", "-o", tmp_path / "there.gguf", *OPTIONS, **env)
    assert "nothing to do for org/one" in fails("convert", "org/one", "-o", out, **env)
    assert "goes past the model's 4 layers" in fails(
        "convert", "org/hf", "-o", out, "--window", 8, "--full-layers", "9", **env
    )
    assert [name for name, _ in hub.bodies() if name != "config.json"] == []


@pytest.fixture
def big(hub, tiny_model) -> FakeHub:
    """A model of 22 MB; what follows the tensors of a GGUF does no harm. huggingface-hub writes pieces of 10 MiB."""
    hub.repos["org/big"] = {"big.gguf": tiny_model.read_bytes() + bytes(20 << 20)}
    return hub


def interrupt_download(hub: FakeHub, env: dict[str, str], tmp_path: Path, number: int = signal.SIGINT) -> Path:
    """Stop the download of org/big, as with Ctrl-C, when one piece is there; its part file."""

    def parts() -> list[Path]:
        return [file for file in (tmp_path / "hf").rglob("*.incomplete") if file.stat().st_size]

    hub.stall_after = 15 << 20
    args = ("convert", "org/big", "-o", tmp_path / "out.gguf", *OPTIONS)
    code = 130 if number == signal.SIGINT else -number
    assert interrupt(*args, when=lambda: bool(parts()), number=number, **env) == code
    hub.stall_after = None
    assert not (tmp_path / "out.gguf").exists()
    (part,) = parts()
    return part


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_is_resumed(big, env, tmp_path, number):
    part = interrupt_download(big, env, tmp_path, number)
    done = part.stat().st_size
    # Ctrl-C lets a piece be written to its end.
    assert done == 10 << 20 or (number == signal.SIGKILL and 0 < done < 10 << 20)
    succeeds("convert", "org/big", "-o", tmp_path / "out.gguf", *OPTIONS, **env)
    assert big.bodies() == [("big.gguf", None), ("big.gguf", f"bytes={done}-")]
    assert read_schedule(tmp_path / "out.gguf") == SCHEDULE
    assert list((tmp_path / "hf").rglob("*.incomplete")) == []
    # The file lies where huggingface-hub looks for it.
    succeeds("convert", "org/big", "-o", tmp_path / "b.gguf", *OPTIONS, **env, HF_HUB_OFFLINE="1")


def test_a_damaged_part_is_found_out(big, env, tmp_path):
    part = interrupt_download(big, env, tmp_path)
    part.write_bytes(bytes(10 << 20))
    args = ("convert", "org/big", "-o", tmp_path / "out.gguf", *OPTIONS)
    assert "big.gguf is damaged and was thrown away" in fails(*args, **env)
    assert not (tmp_path / "out.gguf").exists()
    succeeds(*args, **env)


def test_a_whole_download_of_something_else_is_found_out(big, env, tmp_path):
    content = big.repos["org/big"]["big.gguf"]
    big.served["org/big", "big.gguf"] = content[:-1] + b"x"
    args = ("convert", "org/big", "-o", tmp_path / "out.gguf", *OPTIONS)
    assert "big.gguf is damaged and was thrown away" in fails(*args, **env)
    assert not (tmp_path / "out.gguf").exists()
    big.served.clear()
    succeeds(*args, **env)


def test_dry_run_fetches_no_weights(hub, env, tmp_path):
    text = succeeds("convert", "org/one", "-o", tmp_path / "o.gguf", *OPTIONS, "--dry-run", **env)
    for part in ("org/one:one.gguf", "download  1.7 MiB in 1 file to", "models--org--one", "known after the download"):
        assert part in text
    assert hub.bodies() == []
    pytest.importorskip("torch", reason="PyTorch is not installed, so no checkpoint is converted")
    text = succeeds("convert", "org/hf", "-o", tmp_path / "o.gguf", *OPTIONS, "--dry-run", **env)
    for part in ("Qwen3ForCausalLM, 4 layers", "FPFP", "in 3 files to"):
        assert part in text
    assert [name for name, _ in hub.bodies()] == ["config.json"]


def test_offline_the_cache_is_used_and_said(hub, env, tmp_path):
    args = ("convert", "org/one", *OPTIONS)
    offline = env | {"HF_HUB_OFFLINE": "1"}
    message = fails(*args, "-o", tmp_path / "a.gguf", **offline)
    assert "HF_HUB_OFFLINE is set" in message
    assert "not in the cache" in message
    succeeds(*args, "-o", tmp_path / "b.gguf", **env)
    done = run(*args, "-o", tmp_path / "c.gguf", **offline)
    assert done.returncode == 0, done.stderr
    assert f"the hub cannot be asked; using {tmp_path}/hf/hub/models--org--one/snapshots/{COMMIT}" in done.stderr
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_an_unreachable_hub_is_one_line(env, tmp_path):
    away = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    message = fails("convert", "org/one", "-o", tmp_path / "a.gguf", *OPTIONS, **away)
    assert "cannot ask the hub for org/one" in message
    assert "Connection refused" in message


def test_an_architecture_is_refused_before_its_weights_are_downloaded(hub, env, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed, so no checkpoint is converted")
    pytest.importorskip("transformers", reason="transformers is not installed, so no checkpoint is converted")
    config = {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "layer_types": ["sliding_attention"] * 4,
    }
    files = {"tokenizer.json": b"{}", "model.safetensors": bytes(1000)}
    hub.repos["org/own-window"] = {"config.json": json.dumps(config).encode()} | files
    message = fails("convert", "org/own-window", "-o", tmp_path / "o.gguf", *OPTIONS, **env)
    assert "no schedule can apply: architecture 'olmo2' has no layer that can slide: own window (4096 tokens)" in (
        message
    )
    assert [name for name, _ in hub.bodies()] == ["config.json"]


def test_a_checkpoint_is_downloaded_and_converted(hub, env, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed, so no checkpoint is converted")
    pytest.importorskip("transformers", reason="transformers is not installed, so no checkpoint is converted")
    from tests.support.tiny_hf import write_checkpoint

    directory = write_checkpoint(tmp_path / "qwen3", "qwen3")
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    hub.repos["org/real"] = files | {"original/consolidated.safetensors": b"big", "README.md": b"---\n---\n"}
    out = tmp_path / "out.gguf"
    succeeds("convert", "org/real", "-o", out, *OPTIONS, **env)
    assert read_schedule(out) == SCHEDULE
    fetched = {name for name, _ in hub.bodies()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= fetched
    assert not any(name.startswith("original") for name in fetched)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/na.me-1:f.gguf", HubId("org/na.me-1", None, "f.gguf")),
        ("org/name@refs/pr/1:sub/f.gguf", HubId("org/name", "refs/pr/1", "sub/f.gguf")),
        ("name", None),
        ("./name", None),
        ("../name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/na me", None),
    ],
)
def test_hub_ids(text, expected):
    assert parse_hub_id(text) == expected
    assert expected is None or str(expected) == text


def test_of_a_checkpoint_only_what_the_converter_reads_is_fetched():
    names = ["config.json", "model-1.safetensors", "consolidated.safetensors", "pytorch_model.bin", "onnx/m.onnx"]
    names += ["original/x.json", "tokenizer.model", "vocab.txt", "a.gguf", "run.py", "._model-1.safetensors", ".json"]
    files = ("model-1.safetensors", "config.json", "tokenizer.model", "vocab.txt")
    assert checkpoint_files(names) == (files, None)
    names = ["pytorch_model-1.bin", "x.bin", "config.json", "qwen.tiktoken"]
    assert checkpoint_files(names) == (("pytorch_model-1.bin", "config.json", "qwen.tiktoken"), None)
    indexed = ["model.safetensors.index.json", "part-a.safetensors", "config.json", "tokenizer.json"]
    assert "part-a.safetensors" in checkpoint_files(indexed)[0]


def test_a_local_path_comes_before_a_hub_id(tmp_path, tiny_model, hub, env):
    (tmp_path / "org").mkdir()
    Path(tmp_path, "org", "one").write_bytes(tiny_model.read_bytes())
    succeeds("convert", "org/one", "-o", "out.gguf", *OPTIONS, cwd=tmp_path, **env)
    assert hub.requests == []
    assert os.listdir(tmp_path / "org") == ["one"]
