"""The fuzzer of model files: it sees what it is to see, gives the same files again, and finds nothing in a few."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import fuzz_gguf
import gguf_faults
from swaa_local.needle.model import bundled_model
from tests.support.program import ROOT, environment

SCRIPT = ROOT / "scripts" / "fuzz_gguf.py"


def take_memory() -> int:
    return (b"x" * (400 << 20))[-1] - ord("x")


def wait() -> int:
    time.sleep(60)
    return 0


def say(text: str, code: int = 0) -> int:
    print(text, file=sys.stderr)
    return code


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (lambda: 0, None),
        (lambda: say("swaa-local: error: no", 1), None),
        (os.abort, "signal 6"),
        (lambda: os.kill(os.getpid(), 9), "signal 9"),
        (lambda: int("x"), "traceback"),
        (wait, "did not end in time"),
        (take_memory, "took "),
        (lambda: 1, "an error without its line"),
        (lambda: 7, "exit code 7"),
        (lambda: say("a\x1b[31mb"), "control character '\\x1b'"),
        (lambda: say("swaa-local: error: the check was ended by signal 6", 1), "a child of it was ended"),
        (lambda: say("ops.cpp:1: runtime error: signed integer overflow"), "sanitizer: runtime error"),
    ],
)
def test_what_counts_as_a_fault(monkeypatch, tmp_path, act: Callable[[], int], fault):
    monkeypatch.setattr(fuzz_gguf, "_run", lambda *_: 0)
    [idle] = fuzz_gguf.try_file(tmp_path / "x.gguf", ("inspect",), fuzz_gguf.Limits(peak_bytes=1 << 40))
    monkeypatch.setattr(fuzz_gguf, "_run", lambda *_: act())
    limits = fuzz_gguf.Limits(seconds=3 if act is wait else 60, peak_bytes=idle.peak_bytes + (200 << 20))
    [outcome] = fuzz_gguf.try_file(tmp_path / "x.gguf", ("inspect",), limits)
    assert (outcome.fault or "").startswith(fault or "")
    assert (outcome.fault is None) == (fault is None)


def test_a_file_taken_apart_and_put_together_is_the_same_file():
    data = bundled_model().read_bytes()
    assert gguf_faults.take_apart(data).encode() == data


def test_equal_seeds_give_equal_files_and_others_give_others():
    mutator = fuzz_gguf.mutators(bundled_model())["swaa"]
    one, again, other = mutator.make("3/1"), mutator.make("3/1"), mutator.make("3/2")
    assert one == again
    assert one[1] != other[1]


def test_without_a_schedule_there_is_no_key_of_one():
    for kind, expected in (("swaa", True), ("plain", False)):
        source = fuzz_gguf.mutators(bundled_model())[kind]._source
        assert (b"swaa.window" in source) is expected


def fuzz(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("engine")
def test_a_good_file_is_taken_by_every_program():
    # A child begins with the memory of its parent, which is much here: this process has been running other tests.
    limits = dataclasses.replace(fuzz_gguf.Limits(), peak_bytes=1 << 40)
    for outcome in fuzz_gguf.try_file(bundled_model(), fuzz_gguf.DEFAULT_PROGRAMS, limits):
        assert outcome.fault is None
        assert "swaa-local: error" not in outcome.said, outcome.program


@pytest.mark.usefixtures("engine")
def test_a_first_few_random_files():
    assert "40 files, seed 11: 0 faults" in fuzz("-n", "20", "--seed", "11", "--programs", "inspect,llama")
    assert "4 files, seed 12: 0 faults" in fuzz("-n", "2", "--seed", "12", "--programs", "convert,serve")


@pytest.mark.usefixtures("engine")
def test_the_named_faults():
    assert f"{len(gguf_faults.FAULTS)} files" in fuzz("--named", "--programs", "llama")


def test_one_file_is_made_again():
    """`--only` gives one file again, with what was done to it."""
    shown = fuzz("--seed", "11", "--only", "5", "--programs", "inspect", "--kinds", "plain")
    assert shown.startswith("5 plain [")
