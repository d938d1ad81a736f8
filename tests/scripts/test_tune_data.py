"""scripts/tune_data.py: prompts and answers that `swaa-local tune` reads, and that eval does not ask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_local.tune.data import read_conversations
from tests.support.program import ROOT, environment, run

pytestmark = pytest.mark.usefixtures("engine")


def tune_data(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "tune_data.py"), *map(str, args)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_answers_are_those_of_the_questions(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.jsonl"
    options = ("--task", "niah_single_1,facts", "--length", "700,900", "-n", 2)
    done = tune_data(tiny_model, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    found = read_conversations(out)
    assert len(found) == 2 * 3 * 2
    for conversation in found:
        [(role, prompt), (_, answer)] = conversation.messages
        assert role == "user"
        value = answer.split()[-1].strip(".")
        assert value in prompt
    # eval's own questions are others
    ask = ("--variants", "full", "--max-tokens", 1, "-t", 1, "--results", tmp_path / "r.jsonl")
    assert run("eval", tiny_model, "--task", "niah_single_1", "--length", 700, "-n", 2, *ask).returncode == 0
    asked = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert not {row["prompt"] for row in asked if row["kind"] == "question"} & {c.messages[0][1] for c in found}


def test_what_cannot_be_made_is_said(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.jsonl"
    done = tune_data(tiny_model, "-o", out, "--task", "guessing")
    assert done.returncode == 1
    assert done.stderr.startswith("tune_data.py: error: unknown task 'guessing'")
    assert not out.exists()
