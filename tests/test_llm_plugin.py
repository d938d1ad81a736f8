"""The plugin in the real `llm`, through its own command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.program import environment
from tests.support.scripted import thinker

pytest.importorskip("llm")

# An installed package is found by its entry point; a checkout that is not installed, by this.
_RUN = """
import sys
from importlib.metadata import entry_points
import llm.plugins
if not entry_points(group="llm", name="swaa-local"):
    import swaa_local.llm_plugin
    llm.plugins.pm.register(swaa_local.llm_plugin)
from llm.cli import cli
cli()
"""


@pytest.fixture
def model(tmp_path) -> Path:
    return thinker(tmp_path / "thinker.gguf")


def llm(*args: object, home: Path, before: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    directories = {
        "LLM_USER_PATH": str(home / "llm"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hf"),
    }
    return subprocess.run(
        [*before, sys.executable, "-c", _RUN, *map(str, args)],
        env=environment(**directories, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_entry_point_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["llm"] == {"swaa-local": "swaa_local.llm_plugin"}


def test_a_question_and_a_second_one_in_the_same_conversation(model, tmp_path):
    options = ["-m", "swaa-local", "-o", "model", model, "-o", "ctx", 2048, "-o", "threads", 1]
    done = llm(*options, "Is it?", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Yes!\n"), done.stderr
    again = llm(*options, "-c", "Sure?", home=tmp_path)
    assert again.stdout == "Yes!\n", again.stderr
    first, second = json.loads(llm("logs", "--json", home=tmp_path).stdout)[-2:]
    if first["prompt"] != "Is it?":
        first, second = second, first
    assert second["input_tokens"] > first["input_tokens"] + len("Yes!Sure?")


def test_a_fragment_is_a_document_and_is_read_once(model, tmp_path):
    (tmp_path / "book.txt").write_text("A book. " * 60)
    options = ["-m", "swaa-local", "-o", "model", model, "-o", "ctx", 2048, "-o", "threads", 1]
    for question in ("Is it?", "Is it so?"):
        done = llm(*options, "-f", tmp_path / "book.txt", question, home=tmp_path)
        assert done.stdout == "Yes!\n", done.stderr
    rows = json.loads(llm("logs", "--json", home=tmp_path).stdout)
    [second] = [row for row in rows if row["prompt"].endswith("Is it so?")]
    assert json.loads(second["token_details"])["cached"] > 480
    assert llm(*options, "-o", "cache", "false", "Is it?", home=tmp_path).stdout == "Yes!\n"


def test_models_of_the_hub_cache_have_names(model, tmp_path):
    snapshot = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "m.gguf").write_bytes(model.read_bytes())
    assert "swaa-local/org/name:m.gguf" in llm("models", home=tmp_path).stdout


def test_errors_are_sentences(tmp_path, model):
    assert "name a model: -o model FILE.gguf" in llm("-m", "swaa-local", "x", home=tmp_path).stderr
    done = llm("-m", "swaa-local", "-o", "model", tmp_path / "no.gguf", "x", home=tmp_path)
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr
    done = llm("-m", "swaa-local", "-o", "model", model, "-o", "ctx", 256, "x" * 400, home=tmp_path)
    assert "but the context is 256; pass -o ctx 1024" in done.stderr


def test_a_file_that_cannot_be_read_is_a_sentence(model, tmp_path):
    """Also for root, whose right to read everything is taken away."""
    model.chmod(0)
    rights: list[str] = []
    if os.geteuid() == 0:
        if (setpriv := shutil.which("setpriv")) is None:
            pytest.skip("root reads everything, and there is no setpriv to prevent it")
        rights = [setpriv, "--bounding-set=-dac_override,-dac_read_search", "--"]
    done = llm("-m", "swaa-local", "-o", "model", model, "x", home=tmp_path, before=rights)
    assert done.returncode != 0
    assert "Error: " in done.stderr
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory", "/gone"), OSError("something")])
def test_an_error_of_the_system_is_llms_own(monkeypatch, error):
    """One that comes while the model is read: the file is removed, its disk fails."""
    llm_package = pytest.importorskip("llm")
    from swaa_local import llm_plugin

    def fail(*_args: object) -> None:
        raise error

    monkeypatch.setattr(llm_plugin, "_open", fail)
    model = llm_plugin.SWAALocal("swaa-local", None)
    with pytest.raises(llm_package.ModelError, match=r"/gone: No such file|something"):
        model.prompt("x").text()


def test_warnings_are_notes(model, tmp_path):
    (tmp_path / "book.txt").write_text("A book. " * 60)
    (tmp_path / "cache").write_text("in the way")
    options = ["-m", "swaa-local", "-o", "model", model, "-o", "ctx", 8192, "-o", "threads", 1]
    done = llm(*options, "-f", tmp_path / "book.txt", "Is it?", home=tmp_path)
    assert done.stdout == "Yes!\n"
    notes = done.stderr.splitlines()
    assert len(notes) == 2
    assert all(note.startswith("swaa-local: ") for note in notes)
    assert "more than the 4096" in notes[0]
    assert "what was read is not kept" in notes[1]
