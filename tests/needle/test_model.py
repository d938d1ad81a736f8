"""The bundled model's accuracy on fixed questions: a broken mask, phase or cache shows here as a collapse.

The document is more than 8 windows long. With full attention and with the schedule in the file the model answers, at
once or after thinking; without the schedule's tail, with the window alone, or with any single strategy, it cannot know.
Bounds are far from what it does (100 % and 0 to 10 %).
"""

from __future__ import annotations

import json
import random
import shlex
from hashlib import sha256
from pathlib import Path

import pytest

from needle import recipe
from swaa_local.demo.run import Outcome, run_demo
from swaa_local.engine.options import EngineOptions
from swaa_local.eval.run import EvalRequest, evaluate
from swaa_local.eval.table import figures
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.needle.documents import make_document
from swaa_local.needle.model import bundled_model
from swaa_local.schedule.config import SWAAConfig
from tests.support.program import ROOT, succeeds

pytestmark = pytest.mark.usefixtures("engine")

DOCS = ROOT / "docs"
N = 20
ENGINE = EngineOptions(n_threads=1)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return run_demo(bundled_model(), n_questions=N, seed=11, length=2560, engine=ENGINE)


def test_it_is_small_and_has_a_schedule():
    assert bundled_model().stat().st_size <= 12 << 20
    schedule = read_schedule(bundled_model())
    assert schedule is not None
    assert schedule.window * 8 <= 2560 - 160


def test_its_schedule_is_the_one_that_the_training_log_chose_with_a_tail():
    chosen = json.loads((DOCS / "needle-log.json").read_text())["evaluation"]
    schedule = read_schedule(bundled_model())
    assert schedule is not None
    assert schedule.config() == SWAAConfig(chosen["window"], chosen["sinks"], True, chosen["full_layers"], recipe.TAIL)


def test_it_is_the_file_that_the_documented_options_make(tmp_path: Path):
    chosen = json.loads((DOCS / "needle-log.json").read_text())["evaluation"]
    options = recipe.schedule_options(chosen["full_layers"])
    assert shlex.join(options) in (DOCS / "notebook.md").read_text("utf-8")
    plain, made = tmp_path / "plain.gguf", tmp_path / "made.gguf"
    succeeds("convert", bundled_model(), "-o", plain, "--no-swaa")
    succeeds("convert", plain, "-o", made, *options)
    assert read_schedule(plain) is None
    assert made.read_bytes() == bundled_model().read_bytes()
    assert sha256(made.read_bytes()).hexdigest() in (DOCS / "needle.md").read_text("utf-8")


@pytest.mark.parametrize("title", ["full attention", "file's schedule", "file's schedule, thinking first"])
def test_full_attention_and_the_recipe_find_the_facts(outcome, title):
    [row] = [row for row in outcome.rows if row.title == title]
    assert row.right >= 0.9 * N, [verdict.answer for verdict in row.verdicts]


@pytest.mark.parametrize(
    "title",
    [
        "naive window",
        "window, sinks",
        "window, FA decode",
        "window, full layers",
        "window, thinking first",
        "file's schedule, no tail",
    ],
)
def test_a_window_with_one_strategy_alone_and_a_question_without_a_tail_do_not(outcome, title):
    [row] = [row for row in outcome.rows if row.title == title]
    assert row.right <= 0.3 * N, [verdict.answer for verdict in row.verdicts]


def test_chat_answers_at_once_with_the_tail_and_not_without_it(tmp_path: Path):
    document = make_document(random.Random(5), "statements", 2600, lambda text: len(text) // 4, n_facts=12)
    file = tmp_path / "notes.txt"
    file.write_text(document.text)
    asked = [placed for placed in document.facts if document.depth(placed) < 0.6][:3]
    assert len(asked) == 3

    def right(*options: object) -> int:
        chat = ("chat", "--no-think", "-t", 1, "--file", file, *options)
        return sum(placed.fact.value in succeeds(*chat, "-p", placed.fact.question) for placed in asked)

    assert right() == 3
    assert right("--tail", 0) < 3


def test_eval_finds_the_same_on_documents_that_are_read_anew(tmp_path: Path):
    request = EvalRequest(
        bundled_model(), tmp_path / "r.jsonl", lengths=[1152], samples=4, variants="full,naive,file", engine=ENGINE
    )
    cells = {(cell.task, cell.variant): cell for cell in figures(evaluate(request))}
    for task in ("facts_statements", "facts_sections"):
        assert cells[task, "full"].accuracy.right >= 3
        assert cells[task, "file"].accuracy.right >= 3
        beyond = cells[task, "naive"].beyond
        assert beyond is not None
        assert beyond.n >= 3
        assert beyond.right <= 1
