"""A model by its hub id, as far as a machine without a network can go: from huggingface-hub's cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_local.sources.find import ModelNotFound, find_gguf
from tests.support.gguf_edit import write_split
from tests.support.program import environment, fails, succeeds
from tests.support.scripted import thinker


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache that holds org/name with one GGUF, org/parts with one in two files, and org/checkpoint."""
    model = thinker(tmp_path / "thinker.gguf")
    parts = {path.name: path for path in write_split(model, tmp_path, "thinker", 2)}
    for repo, files in {"name": {"thinker-f32.gguf": model}, "parts": parts, "checkpoint": {}}.items():
        folder = tmp_path / "hub" / f"models--org--{repo}"
        snapshot = folder / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123abc")
        for name, source in files.items():
            shutil.copy(source, snapshot / name)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "hub" / "models--org--checkpoint" / "snapshots" / "0123abc" / name).write_text("{}")
    return tmp_path / "hub"


def offline(cache: Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}


def test_chat_takes_hub_ids(cache):
    for model in ("org/name", "org/name:thinker-f32.gguf", "org/name:f32"):
        assert succeeds("chat", model, "-t", 1, "-c", 256, "-p", "hi", **offline(cache)) == "Yes!\n"


def test_a_checkpoint_must_be_converted_first(cache):
    error = fails("chat", "org/checkpoint", "-p", "hi", **offline(cache))
    assert "swaa-local convert org/checkpoint -o model.gguf" in error


def test_what_is_neither_here_nor_on_the_hub(cache):
    assert "is not in the cache" in fails("chat", "org/other", "-p", "hi", **offline(cache))


def test_from_pretrained_takes_patterns(cache):
    code = (
        "from swaa_local import Llama\n"
        "llm = Llama.from_pretrained('org/name', '*f32.gguf', n_ctx=256, n_threads=1)\n"
        "print(type(llm).__module__, llm.n_ctx())\n"
        "print(Llama.from_pretrained('org/parts', '*.gguf', n_ctx=256, n_threads=1).n_ctx())\n"
        "try: Llama.from_pretrained('org/name', '*q8_0.gguf')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**offline(cache)), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "swaa_local.llama 256",
        "256",
        "org/name: no file is '*q8_0.gguf'; its files are thinker-f32.gguf",
    ]


@pytest.mark.parametrize("name", ["nope", "nope.gguf", "dir/nope.gguf", "/no/such/file", ""])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelNotFound, match="no such file, and not a hub id"):
        find_gguf(name)
