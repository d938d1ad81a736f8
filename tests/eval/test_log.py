"""The results file: continued, refused, and never left in a state that it cannot be continued from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swaa_local.eval.log import EvalLog, EvalLogError
from swaa_local.eval.results import AnswerRecord, QuestionRecord
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.variants import Variant

CONFIG = {"model": "m.gguf", "model_sha256": "ab" * 32, "seed": 0, "think": "on", "max_tokens": None}
QUESTION = QuestionRecord("vt/100/0", "vt", 100, 0, "Prömpt\n", "", ("a", "b"), "all", 30, 90, None, None)
ANSWER = AnswerRecord("vt/100/0", "full", "Änswer", "", "stop", 0.5, False, 0.1, 3, 0.2, 1024)
FULL = Variant("full", Schedule.full(2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def fill(path: Path, config: dict[str, Any] = CONFIG) -> bytes:
    with EvalLog(path, config) as log:
        log.add_variant(FULL)
        log.add_question(QUESTION)
        log.add_answer(ANSWER)
    return path.read_bytes()


def test_a_file_is_json_lines_that_hold_everything(path):
    rows = [json.loads(line) for line in fill(path).splitlines()]
    assert [row["kind"] for row in rows] == ["config", "variant", "question", "answer"]
    assert rows[2]["prompt"] == "Prömpt\n"
    assert (rows[3]["answer"], rows[3]["share"], rows[3]["prefill_s"]) == ("Änswer", 0.5, 0.1)


def test_a_file_is_continued_with_what_it_has(path):
    before = fill(path)
    with EvalLog(path, CONFIG) as log:
        assert (log.questions, log.answers) == ({"vt/100/0": QUESTION}, {("vt/100/0", "full"): ANSWER})
        log.add_variant(FULL)
        log.add_question(QUESTION)
        assert path.read_bytes() == before
        log.add_answer(replace(ANSWER, variant="naive"))
    assert path.read_bytes().startswith(before)


def test_whatever_line_the_program_died_in_the_file_goes_on_from_there(path):
    whole = fill(path)
    last_config = whole.index(b"\n") + 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert fill_missing(path) == whole, size
        assert path.read_bytes()[:last_config] == whole[:last_config]


def fill_missing(path: Path) -> bytes:
    with EvalLog(path, CONFIG) as log:
        log.add_variant(FULL)
        log.add_question(QUESTION)
        if ("vt/100/0", "full") not in log.answers:
            log.add_answer(ANSWER)
    return path.read_bytes()


def test_another_configuration_is_refused_by_what_differs(path):
    before = fill(path)
    with pytest.raises(
        EvalLogError, match=r"another configuration: seed was 0 and is now 3; think was on and is now off"
    ):
        EvalLog(path, CONFIG | {"seed": 3, "think": "off"})
    with pytest.raises(EvalLogError, match=r"model_sha256 was abababababab\.\.\. and is now null; name another file"):
        EvalLog(path, {key: value for key, value in CONFIG.items() if key != "model_sha256"})
    assert path.read_bytes() == before


def test_another_schedule_or_question_under_a_known_name_is_refused(path):
    before = fill(path)
    with EvalLog(path, CONFIG) as log:
        for variant in (replace(FULL, think=True), Variant("full", Schedule(8, 0, (LayerMode.ALWAYS,) * 2))):
            with pytest.raises(EvalLogError, match="another schedule under the name 'full'"):
                log.add_variant(variant)
        with pytest.raises(EvalLogError, match=r"another question vt/100/0 \(its prompt differs\)"):
            log.add_question(replace(QUESTION, prompt="Other"))
    assert path.read_bytes() == before


def test_another_tail_is_another_schedule_where_a_layer_has_one(path):
    def variant(mode: LayerMode, tail: int) -> Variant:
        return Variant(mode.name, Schedule(8, 0, (mode,) * 2, tail))

    for tail in (0, 5):
        with EvalLog(path, CONFIG) as log:
            log.add_variant(variant(LayerMode.PREFILL, 5))
            log.add_variant(variant(LayerMode.ALWAYS, tail))
            with pytest.raises(EvalLogError, match="another schedule under the name 'PREFILL'"):
                log.add_variant(variant(LayerMode.PREFILL, tail + 1))


@pytest.mark.parametrize(
    "text", ["hello\n", "hello", '{"kind": "answer"}\n', "[]\n", "\x00\xff", '{"kind": "config"}\n']
)
def test_other_files_are_refused_and_left_alone(path, text):
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(EvalLogError, match=r"is not (a results file|of a results file)|has format"):
        EvalLog(path, CONFIG)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_spoilt_line_is_named(path):
    whole = fill(path).replace(b'"share": 0.5', b'"share": ')
    path.write_bytes(whole)
    with pytest.raises(EvalLogError, match="line 4 is not of a results file"):
        EvalLog(path, CONFIG)
    assert path.read_bytes() == whole


def test_a_file_in_use_is_refused(path):
    pytest.importorskip("fcntl", reason="this system has no file locks")
    with EvalLog(path, CONFIG):
        with pytest.raises(EvalLogError, match="in use by another run"):
            EvalLog(path, CONFIG)
    fill(path)


def test_a_run_that_never_began_leaves_no_file(path):
    with EvalLog(path, CONFIG):
        pass
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(EvalLogError, match=r"nope/a\.jsonl: No such file"):
        EvalLog(tmp_path / "nope" / "a.jsonl", CONFIG)
