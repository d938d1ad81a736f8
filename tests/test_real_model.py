"""A schedule on a model with learnt weights: what full attention knows, a window forgets, and sinks, FA decode and a
tail bring back. Random weights can say nothing of this.

The questions are of prompts of about 1,450 tokens, each with a number at least 510 tokens before the end, which is two
windows back. Where the model is right, its first choice leads the second by 0.6 to 7 in the logits of every digit
(measured on an AMD Zen 5), so another CPU's rounding may change one answer, and the bounds allow for one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.schedule.config import SWAAConfig
from tests.support.program import succeeds

# the first use also downloads 98 MB
pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(900)]

WINDOW, SINKS, TAIL = 256, 32, 64
N = 4


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "swaa.gguf"
    options = ("--window", WINDOW, "--sinks", SINKS, "--fa-decode", "--tail", TAIL)
    succeeds("convert", smollm2, "-o", output, *options)
    return output


@pytest.fixture(scope="module")
def results(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By variant: what `eval` says of it."""
    log = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    task = ("--task", "niah_single_2-synth", "--length", 1600, "-n", N, "--seed", 1, "--max-tokens", 16)
    printed = succeeds(
        "eval", converted, *task, "--variants", "full,naive,file", "-t", 1, "-o", "json", "--results", log
    )
    return {row["variant"]: row for row in json.loads(printed)["results"]}


def test_the_file_has_the_schedule_that_was_asked_for(converted: Path) -> None:
    schedule = read_schedule(converted)
    assert schedule is not None
    assert schedule.n_layer == 30
    assert schedule.config() == SWAAConfig(WINDOW, SINKS, True, prompt_tail=TAIL)


def test_every_number_is_beyond_the_window(results: dict[str, dict[str, Any]]) -> None:
    """The premise of what follows."""
    assert results["naive"]["beyond"]["n"] == results["file"]["beyond"]["n"] == N
    assert all(row["prompt_tokens"] > 5 * WINDOW for row in results.values())


def test_full_attention_answers(results: dict[str, dict[str, Any]]) -> None:
    assert results["full"]["accuracy"]["right"] >= N - 1


def test_a_window_alone_does_not(results: dict[str, dict[str, Any]]) -> None:
    assert results["naive"]["accuracy"]["right"] <= 1


def test_sinks_fa_decode_and_a_tail_do(results: dict[str, dict[str, Any]]) -> None:
    assert results["file"]["accuracy"]["right"] >= N - 1
