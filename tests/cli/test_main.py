"""The command line as such: help, version, exit codes, pipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from swaa_local import __version__
from swaa_local.schedule.presets import PRESETS
from tests.support.program import ROOT, environment, fails, run, succeeds


def test_help_teaches_and_loads_no_engine(tmp_path):
    for name in ("llama_cpp", "gguf", "numpy", "huggingface_hub", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was loaded')")
    for command in ((), ("convert",), ("inspect",), ("bench",)):
        for flag in ("--help", "-h"):
            done = run(*command, flag, PYTHONPATH=f"{tmp_path}:{ROOT}")
            assert done.returncode == 0, done.stderr
            assert f"swaa-local {' '.join(command) or 'convert'} " in done.stdout


@pytest.mark.parametrize("command", ["chat", "eval", "calibrate"])
def test_help_of_the_rope_scale_is_words_and_an_example(command):
    text = " ".join(succeeds(command, "--help").split())
    [told] = re.findall(r"--rope-scale FACTOR (.*?) --", text)
    assert told == "By what to stretch the length that it was trained on, such as 4 [the model's]."


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("0", "0 is not between 0.000001 and 1000000"),
        ("nan", "nan is not between 0.000001 and 1000000"),
        ("four", "'four' is not a number such as 4 or 0.5"),
    ],
)
def test_a_rope_scale_that_cannot_be_is_named_with_what_can(value, problem):
    assert problem in fails("chat", "--rope-scale", value, code=2)


def test_help_of_convert_names_sources_presets_and_the_extra():
    text = " ".join(succeeds("convert", "--help").split())
    for part in ("org/name:file.gguf", "swaa-local[convert]", "--list-presets", "--pre-tokenizer", *PRESETS):
        assert part in text


def test_presets_are_listed_with_what_is_known_about_them():
    text = succeeds("convert", "--list-presets")
    for preset in PRESETS.values():
        assert preset.name in text
        assert all(note in text for note in preset.notes)


def test_version():
    assert succeeds("--version").startswith(f"swaa-local {__version__} (llama-cpp-python ")


@pytest.mark.parametrize("args", [("nonsense",), ("convert",), ("inspect",), ("inspect", "--nonsense", "x")])
def test_wrong_usage_is_exit_code_2_with_a_hint(args):
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--help" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_quiet():
    """As under a shell, where SIGPIPE ends a program with 128 + 13."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "swaa_local", "convert", "--list-presets"]
    done = subprocess.run(command, env=environment(), stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_child_of_a_command_imports_nothing_from_the_users_folder(tmp_path, tiny_model):
    for name in ("json", "gguf", "runpy", "inspect", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported from the working directory')")
    code = (
        "import sys; sys.path.pop(0); sys.path.insert(0, sys.argv[1]);"
        "from swaa_local.convert.quantize import engine_refusal; from pathlib import Path;"
        "print(engine_refusal(Path(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tiny_model)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(None")
