"""scripts/wheels.py: what it refuses, and that a wrong answer, or none, never passes for a right one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wheels
from tests.support.program import ROOT

DEMO = """\
|                                 |     reads |         right |   last answer |
| :------------------------------ | --------: | ------------: | ------------: |
| full attention                  | 900 tok/s | {full}/4 = 100 % | 11111 (right) |
| naive window                    | 900 tok/s |     0/4 = 0 % | 33333 (wrong) |
| file's schedule, no tail        | 900 tok/s |     0/4 = 0 % | 33333 (wrong) |
| file's schedule                 | 900 tok/s | {direct}/4 = 100 % | 11111 (right) |
| file's schedule, thinking first | 900 tok/s | {thinking}/4 = 100 % | 11111 (right) |
"""
LOADED = "load_backend: loaded CPU backend from /venv/llama_cpp/lib/libggml-cpu-{}.so\n"


@pytest.fixture
def program(tmp_path: Path) -> Any:
    """`program(stdout, stderr) -> command` of a program that prints them, whatever it is asked."""

    def make(stdout: str, stderr: str) -> list[str]:
        source = tmp_path / "program.py"
        source.write_text(f"import sys; sys.stdout.write({stdout!r}); sys.stderr.write({stderr!r})")
        return [sys.executable, str(source)]

    return make


def test_a_demo_that_answers_right_passes(program: Any, tmp_path: Path) -> None:
    command = program(DEMO.format(full=4, direct=4, thinking=4), LOADED.format("zen4"))
    assert wheels.try_demo(command, {}, tmp_path).variant == "zen4"


@pytest.mark.parametrize(
    ("stdout", "stderr", "said"),
    [
        (
            DEMO.format(full=4, direct=4, thinking=3),
            LOADED.format("zen4"),
            '"file\'s schedule, thinking first" answered 3 of 4',
        ),
        (DEMO.format(full=4, direct=3, thinking=4), LOADED.format("zen4"), '"file\'s schedule" answered 3 of 4'),
        (DEMO.format(full=0, direct=4, thinking=4), LOADED.format("zen4"), "'full attention' answered 0 of 4"),
        (
            DEMO.format(full=4, direct=4, thinking=4).rpartition("| file")[0],
            LOADED.format("zen4"),
            "no table of answers",
        ),
        (DEMO.format(full=4, direct=4, thinking=4), "", "loaded none of its CPU backends"),
        (DEMO.format(full=4, direct=4, thinking=4), LOADED.format("zen4") + LOADED.format("x64"), "['x64', 'zen4']"),
    ],
)
def test_a_demo_that_does_not_fails(program: Any, tmp_path: Path, stdout: str, stderr: str, said: str) -> None:
    with pytest.raises(wheels.WheelError) as failure:
        wheels.try_demo(program(stdout, stderr), {}, tmp_path)
    assert said in str(failure.value)


@pytest.mark.parametrize(
    ("right", "variant", "said"),
    [
        ((1, 1), "haswell", None),
        ((1, 0), "haswell", "answered wrong"),
        ((1,), "haswell", "answered wrong"),
        ((1, 1), "sse42", "loaded sse42, and haswell is its best"),
    ],
)
def test_an_older_cpu_has_to_load_its_best_and_answer_right(
    program: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    right: tuple[int, ...],
    variant: str,
    said: str | None,
) -> None:
    results = [{"variant": str(i), "accuracy": {"n": 1, "right": n}} for i, n in enumerate(right)]
    command = program(json.dumps({"results": results}), LOADED.format(variant))
    imitator = tmp_path / "qemu"
    imitator.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    imitator.chmod(0o755)
    monkeypatch.setattr(wheels, "qemu", lambda: str(imitator))
    if said is None:
        assert wheels.try_older("Haswell-noTSX", command, {}, tmp_path).variant == "haswell"
    else:
        with pytest.raises(wheels.WheelError, match=said):
            wheels.try_older("Haswell-noTSX", command, {}, tmp_path)


def test_a_program_that_dies_is_told_by_its_signal(tmp_path: Path) -> None:
    with pytest.raises(wheels.WheelError, match="died of SIGILL: "):
        wheels.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--check", "nowhere.whl"], "wheels.py: error: nowhere.whl: no such file"),
        (["--cpu", "Nehalem,i486"], "unknown CPU 'i486'; known are Nehalem, "),
    ],
)
def test_what_cannot_be_tried_is_told(arguments: list[str], said: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "wheels.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr
