"""What an evaluation shows while it runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from swaa_local.eval.log import EvalLog
from swaa_local.eval.results import AnswerRecord, Cell, QuestionRecord
from swaa_local.eval.terminal import TerminalWatch
from swaa_local.report.progress import TimeLeft
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.variants import Variant
from swaa_local.text.units import format_duration

QUESTIONS = [
    QuestionRecord(f"vt/100/{i}", "vt", 100, i, "P", "", ("a",), "all", 30, 1000, None, None) for i in range(2)
]
CELLS = [Cell("vt", 100, name, tuple(q.id for q in QUESTIONS)) for name in ("full", "naive")]


def answer(question: QuestionRecord, variant: str) -> AnswerRecord:
    return AnswerRecord(question.id, variant, "a", "", "stop", 1.0, True, 4.0, 3, 1.0, 1024)


def test_time_left_is_worked_out_for_each_variant_where_it_is_known():
    left = TimeLeft()
    assert left.estimate({"full": 100}) is None
    left.took("full", 1000, 20.0)
    assert left.estimate({"full": 500, "naive": 0}) == pytest.approx(10)
    assert left.estimate({"full": 0, "naive": 500}) == pytest.approx(10)  # not known yet: as the others
    left.took("naive", 1000, 4.0)
    assert left.estimate({"full": 500, "naive": 500}) == pytest.approx(12)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11100, "3 h 05 min")]
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text


def show(path: Path, *, terminal: bool) -> str:
    """A run of four answers, one of which is in the file already."""
    out = io.StringIO()
    with EvalLog(path, {}) as log, TerminalWatch() as watch:
        console: Any = Console(file=out, force_terminal=terminal, width=100, highlight=False)
        watch.console = watch._reporter._console = console
        log.add_variant(Variant("full", Schedule.full(1)))
        for question in QUESTIONS:
            log.add_question(question)
        log.add_answer(answer(QUESTIONS[0], "full"))
        watch.begin(CELLS, log)
        for question, variant in ((QUESTIONS[1], "full"), (QUESTIONS[0], "naive"), (QUESTIONS[1], "naive")):
            watch.asking(variant, question)
            watch.on_prefill(500, 1000)
            watch.answered(answer(question, variant))
        watch.end()
    return out.getvalue()


def test_a_file_gets_a_line_for_each_cell(tmp_path):
    lines = show(tmp_path / "r.jsonl", terminal=False).splitlines()
    assert lines[0].endswith("r.jsonl has 1 of 4 answers already")
    assert lines[1].startswith("full · vt 100: 2 of 2 right · 2/4 answers · ")
    assert lines[1].endswith(" left")
    assert lines[2].startswith("naive · vt 100: 2 of 2 right · 4/4 answers · 0 s left")
    assert len(lines) == 3


def test_a_terminal_gets_a_bar_with_the_time_left(tmp_path):
    shown = show(tmp_path / "r.jsonl", terminal=True)
    assert "naive · vt 100" in shown
    assert "4/4 answers · 0 s left" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
