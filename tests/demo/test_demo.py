"""The demo, end to end, in short: its questions, its counting, its table; and what it says without what it needs."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swaa_local import Llama
from swaa_local.demo import run as demo
from swaa_local.demo.terminal import conclusion
from swaa_local.engine.options import EngineOptions
from swaa_local.needle import documents as facts
from tests.support.program import environment, fails, run
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys

pytestmark = pytest.mark.usefixtures("engine")

TITLES = [
    "full attention",
    "naive window",
    "window, sinks",
    "window, FA decode",
    "window, full layers",
    "window, thinking first",
    "file's schedule, no tail",
    "file's schedule",
    "file's schedule, thinking first",
]


@pytest.fixture(scope="module")
def model(tiny_model_factory) -> Path:
    """Random weights: it answers nothing right, but every row differs in schedule."""
    return tiny_model_factory(schedule=ScheduleKeys(64, 4, [FULL, PREFILL, FULL, PREFILL], tail=24))


def test_a_plain_run_prints_the_table_and_what_it_means(model):
    done = run("demo", "-m", model, "-n", 3, "--length", 1500, "-t", 1)
    assert done.returncode == 0, done.stderr
    table = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == TITLES
    for row in table[2:]:
        cells = [cell.strip() for cell in row]
        assert re.fullmatch(r"[\d,]+ tok/s", cells[1])
        assert re.fullmatch(r"[\d.]+ [KM]iB", cells[3])
        assert re.fullmatch(r"[0-3]/3 = \d+ %", cells[4])
        assert cells[6].endswith(("(right)", "(wrong)"))
    assert re.search(r"^Full attention answers \d of 3\. A window of 64 tokens alone reads ", done.stdout, re.M)
    assert done.stderr.count("question ") == 3
    assert "windows long" in done.stderr
    assert "[y/N]" not in done.stderr  # nobody is there to be asked


def test_rows_are_the_strategies_of_the_files_schedule(model):
    outcome = demo.run_demo(model, n_questions=2, seed=3, length=1500, engine=EngineOptions(n_threads=1))
    modes = [tuple(row.variant.schedule.layer_modes) for row in outcome.rows]
    assert [row.title for row in outcome.rows] == TITLES
    assert modes == [
        (FULL,) * 4,
        (ALWAYS,) * 4,
        (ALWAYS,) * 4,
        (PREFILL,) * 4,
        (FULL, ALWAYS, FULL, ALWAYS),
        (ALWAYS,) * 4,
        *[(FULL, PREFILL, FULL, PREFILL)] * 3,
    ]
    assert [row.variant.schedule.sinks for row in outcome.rows[1:]] == [0, 4, 0, 0, 0, 4, 4, 4]
    assert [row.variant.schedule.tail for row in outcome.rows] == [0] * 7 + [24, 24]
    assert [row.variant.think for row in outcome.rows] == [False] * 5 + [True, False, False, True]
    assert outcome.rows[1].kv_bytes < outcome.rows[4].kv_bytes < outcome.rows[0].kv_bytes
    assert all(row.kv_bytes == outcome.rows[0].kv_bytes for row in outcome.rows[6:])
    assert all(len(row.verdicts) == 2 for row in outcome.rows)


def test_a_schedule_without_a_tail_has_no_row_for_that(tiny_model_factory):
    path = tiny_model_factory(schedule=ScheduleKeys(64, 4, [FULL, PREFILL, FULL, PREFILL]))
    outcome = demo.run_demo(path, n_questions=1, seed=3, length=1500, engine=EngineOptions(n_threads=1))
    assert [row.title for row in outcome.rows] == [title for title in TITLES if title != demo.WITHOUT_TAIL]
    assert "tail" not in conclusion(outcome)


def test_the_document_alone_has_no_tail(model, monkeypatch):
    """It ends with the document, and the tail is for what follows: the question."""
    pieces: list[tuple[int, bool]] = []
    evaluate = Llama.eval

    def watched(self: Llama, tokens: Any, decode: bool = False, *, ends_prompt: bool = True) -> None:
        pieces.append((len(tokens), ends_prompt))
        evaluate(self, tokens, decode, ends_prompt=ends_prompt)

    monkeypatch.setattr(Llama, "eval", watched)
    demo.run_demo(model, n_questions=1, seed=3, length=1500, engine=EngineOptions(n_threads=1))
    read = [ends_prompt for n, ends_prompt in pieces if n > 900]
    assert read == [False] * len(TITLES)


@pytest.mark.parametrize(("without", "said"), [(1, "without it 1 is right"), (0, "without it 0 are"), (2, None)])
def test_what_the_tail_did_is_said_where_it_did_something(model, without, said):
    outcome = demo.run_demo(model, n_questions=2, seed=3, length=1500, engine=EngineOptions(n_threads=1))
    for row in outcome.rows:
        n_right = without if row.title == demo.WITHOUT_TAIL else 2
        row.verdicts = [demo.Verdict("", i < n_right) for i in range(2)]
    text = conclusion(outcome)
    assert "answers 2 at once, 2 after thinking." in text
    assert ("its tail: the last 24 tokens" in text) == (said is not None)
    assert said is None or said in text


class _Recorder(demo.View):
    def __init__(self) -> None:
        self.documents: list[facts.Document] = []
        self.asked: list[demo.Asked] = []

    def document(self, document: facts.Document, n_tokens: int, window: int) -> None:
        assert n_tokens > 8 * window
        self.documents.append(document)

    def asking(self, asked: demo.Asked) -> None:
        self.asked.append(asked)


def test_questions_are_spread_over_the_document_and_different(model, monkeypatch):
    monkeypatch.setattr(demo, "_QUESTIONS_A_DOCUMENT", 4)
    view = _Recorder()
    outcome = demo.run_demo(model, n_questions=6, seed=0, length=1800, engine=EngineOptions(n_threads=1), view=view)
    assert [asked.number for asked in view.asked] == [1, 2, 3, 4, 5, 6]
    assert tuple(view.asked) == outcome.questions
    assert len(view.documents) == 2  # more questions than one document takes
    first = [asked for asked in view.asked if asked.document is view.documents[0]]
    assert len({asked.placed for asked in first}) == 4
    depths = sorted(asked.depth for asked in first)
    assert depths[0] < 0.5 < depths[-1]


@pytest.fixture
def terminal(model, tmp_path) -> Iterator[Any]:
    """The demo at a terminal, in short."""
    pexpect = pytest.importorskip("pexpect")
    command = ["-m", "swaa_local", "demo", "-m", str(model), "-n", "2", "--length", "1500", "-t", "1"]
    env = environment(TERM="xterm", XDG_STATE_HOME=str(tmp_path), PROMPT_TOOLKIT_NO_CPR="1")
    child = pexpect.spawn(sys.executable, command, env=env, encoding="utf-8", timeout=60, dimensions=(50, 160))
    child.eof = pexpect.EOF
    yield child
    child.close(force=True)


def test_at_a_terminal_it_draws_the_table_and_goes_on_to_chat(terminal):
    terminal.expect("question 2 of 2")
    terminal.expect("Full attention answers")
    assert all(title in terminal.before for title in TITLES)
    terminal.expect(r"You could ask:\s+What is the .*\(it says .*\)[\s\S]*\[y/N\] ")
    terminal.sendline("y")
    terminal.expect(r"document\.txt: [\d,]+ tokens, goes with your first message")
    terminal.expect(">>>")
    terminal.send("\x04")
    terminal.expect(terminal.eof)
    assert terminal.wait() == 0


def test_ctrl_c_stops_it_and_leaves_the_terminal_whole(terminal):
    terminal.expect("reading the document")
    terminal.sendintr()
    terminal.expect(terminal.eof)
    assert terminal.wait() == 130
    assert "\x1b[?25h" in terminal.before  # the cursor is back
    assert "Traceback" not in terminal.before


def test_the_seed_decides_the_document():
    def text(seed: int) -> str:
        return demo._write(random.Random(seed), 900, lambda message: len(message.split()), 16).text

    assert text(1) == text(1) != text(2)


def test_what_is_missing_is_said_in_a_line(model, tiny_model, tmp_path):
    assert "has no schedule to show; swaa-local convert adds one" in fails("demo", "-m", tiny_model)
    assert "300 tokens hold no document with facts" in fails("demo", "-m", model, "--length", 300, "-t", 1)
    assert "nope.gguf: no such file" in fails("demo", "-m", tmp_path / "nope.gguf")
    assert "0 is not in the range" in fails("demo", "-n", 0, code=2)
