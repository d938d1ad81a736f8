"""`swaa-local calibrate` from outside, on the bundled model: what it finds, writes and says, and how it goes on.

How much is tried depends on the machine's speed; what is asserted does not.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from swaa_local.engine.options import EngineOptions
from swaa_local.model_file.schedule_keys import read_schedule, read_stored
from swaa_local.needle.documents import make_document
from swaa_local.needle.model import bundled_model
from swaa_local.schedule.config import LayerMode
from tests.support.program import ROOT, fails, interrupt, run, succeeds
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys

pytestmark = pytest.mark.usefixtures("engine")

# At 2048 tokens sections are far longer than a window of 64, so that layers must be full.
QUICK = split("-t 1 --length 2048 --window 64 --keep 0.9 --seed 3")
# Half as long, where it does not matter what is found.
SHORT = split("-t 1 --length 1024 --window 48 --keep 0.5 --seed 3")


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, path.read_bytes().splitlines()) if row["kind"] == kind]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with out.gguf, log.jsonl and report/, and what was printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("calibrated")
    arguments = split("--budget 90s -o out.gguf --log log.jsonl --report report")
    return folder, succeeds("calibrate", *QUICK, *arguments, cwd=folder)


# What it finds


@pytest.mark.timeout(400)
def test_the_bundled_models_layers_are_found_and_keep_its_answers(calibrated):
    folder, table = calibrated
    result = json.loads((folder / "report" / "calibration.json").read_text())
    full, *checks = result["checks"]
    chosen = next(check for check in checks if check["schedule"] == result["chosen"])
    assert full["n"] >= 16
    assert chosen["right"] >= 0.85 * full["right"] > 0
    assert set(result["kinds"]) == {"statements", "sections"}  # what it was trained for
    # Without a full layer it cannot tell whose a section's fact is; with all of them nothing is saved.
    modes = result["chosen"]["layer_modes"]
    assert 1 <= modes.count(FULL) <= 4
    without = [each for each in result["candidates"] if FULL not in each["schedule"]["layer_modes"]]
    assert all(each["quality"] < 0.9 for each in without)
    assert "(chosen)" in table
    assert "On 48 questions" in table or "questions that the search has not seen" in table


def test_the_output_is_the_model_with_the_schedule_and_what_it_was_found_with(calibrated):
    folder, _ = calibrated
    result = json.loads((folder / "report" / "calibration.json").read_text())
    stored = read_stored(folder / "out.gguf")
    assert stored.schedule is not None
    assert stored.schedule.as_dict() == result["chosen"]
    said = json.loads(stored.calibration or "")
    assert said["length"] == 2048
    assert said["keep"] == 0.9
    assert said["prompts"] == result["prompts"]
    assert said["n"] == result["checks"][0]["n"]
    # Tensors are MODEL's: they stand at the end, byte for byte.
    tensors = bundled_model().read_bytes()[-5_000_000:]
    assert (folder / "out.gguf").read_bytes().endswith(tensors)


def test_the_speed_that_it_ends_with_is_the_one_of_the_check(calibrated):
    folder, table = calibrated
    result = json.loads((folder / "report" / "calibration.json").read_text())
    [checked] = [check for check in result["checks"] if check["schedule"] == result["chosen"]]
    [chosen] = [
        each
        for each in result["candidates"]
        if each["schedule"] | {"tail": 0} == result["chosen"] | {"tail": 0} and f"{each['name']} (chosen)" in table
    ]
    measured, searched = (f"{1 / each['prefill_share']:.2f}" for each in (checked, chosen))
    verdict = table.splitlines()[2]
    assert f"It reads {measured} times as fast, as measured on these ({searched} in the search)." in verdict
    assert verdict.count("times as fast") == 1
    said = json.loads(read_stored(folder / "out.gguf").calibration or "")
    assert (f"{said['speed']:.2f}", said["speed_in"]) == (measured, "check")
    assert f"reads {measured} times as fast in the check" in succeeds("inspect", folder / "out.gguf")


def test_inspect_shows_what_it_was_found_with(calibrated):
    folder, _ = calibrated
    assert "calibrated with prompts of 2048 tokens: keeps " in succeeds("inspect", folder / "out.gguf")
    assert json.loads(succeeds("inspect", folder / "out.gguf", "--json"))["calibration"].startswith("{")
    assert json.loads(succeeds("inspect", bundled_model(), "--json"))["calibration"] is None


def test_the_report_has_page_pictures_and_the_command(calibrated):
    folder, _ = calibrated
    page = (folder / "report" / "README.md").read_text()
    assert "swaa-local calibrate -t 1 --length 2048" in page
    assert "(chosen)" in page
    assert "quality-time.svg" in page
    result = json.loads((folder / "report" / "calibration.json").read_text())
    assert f"digest {result['prompts']}" in page
    for picture in (folder / "report").glob("*.svg"):
        assert picture.read_text().lstrip().startswith("<?xml")
    assert "exists; pass --force" in fails("calibrate", *QUICK, "--report", "report", cwd=folder)


def test_auto_takes_the_calibrated_schedule(calibrated, tmp_path):
    folder, _ = calibrated
    found = read_schedule(folder / "out.gguf")
    succeeds("convert", folder / "out.gguf", "-o", tmp_path / "copy.gguf", "--preset", "auto")
    assert read_stored(tmp_path / "copy.gguf") == read_stored(folder / "out.gguf")
    succeeds("convert", folder / "out.gguf", "-o", tmp_path / "other.gguf", *split("--preset auto --window 99"))
    other = read_stored(tmp_path / "other.gguf")
    assert found is not None
    assert other.schedule is not None
    assert (other.schedule.window, other.schedule.layer_modes) == (99, found.layer_modes)
    assert other.calibration is None  # it is no longer what was measured
    question = "Ada Klein's pin code is 40417. What is the pin code of Ada Klein?"
    done = run("chat", folder / "out.gguf", "--preset", "auto", "--no-think", "-t", "1", "-p", question)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["chat", "serve", "convert"])
def test_auto_without_a_calibration_says_which_command_makes_one(tmp_path, tiny_model_factory, command):
    schedule = ScheduleKeys(window=64, sinks=4, layer_modes=[FULL, PREFILL, ALWAYS, PREFILL])
    arguments = {"chat": ["-p", "x"], "serve": [], "convert": ["-o", tmp_path / "o.gguf"]}[command]
    for model, has in (
        (tiny_model_factory(), "no schedule"),
        (tiny_model_factory(schedule=schedule), "not calibrated"),
    ):
        said = fails(command, model, "--preset", "auto", *arguments)
        assert has in said
        assert "swaa-local calibrate MODEL -o OUT.gguf" in said
    assert not (tmp_path / "o.gguf").exists()


# How it goes on


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_stopped_run_goes_on_from_its_log(tmp_path, number):
    log, output = tmp_path / "log.jsonl", tmp_path / "o.gguf"
    arguments = ["calibrate", *SHORT, "--log", log, "-o", output, "--budget"]

    def has_begun() -> bool:
        return log.exists() and log.read_bytes().count(b'"kind": "trial"') >= 4

    code = interrupt(*arguments, "15s", when=has_begun, number=number)
    assert code == (130 if number == signal.SIGINT else -number)
    # Ctrl-C gives the best so far; what is killed writes nothing.
    assert output.exists() == (number == signal.SIGINT)
    assert not list(tmp_path.glob("*.part*"))
    before = log.read_bytes()
    done = run(*arguments, "25s", "--force")  # in which the time before counts
    assert done.returncode == 0, done.stderr
    whole = before[: before.rindex(b"\n") + 1]
    assert log.read_bytes().startswith(whole)
    trials = [(json.dumps(row["schedule"]), row["scale"], row["text"]) for row in rows(log, "trial")]
    assert len(trials) == len(set(trials)) > 4
    assert output.exists()


def test_ctrl_c_gives_the_best_so_far(tmp_path):
    import os
    import subprocess
    import sys
    import time

    from tests.support.program import environment

    log = tmp_path / "log.jsonl"
    output = tmp_path / "o.gguf"
    command = [sys.executable, "-m", "swaa_local", "calibrate", *QUICK, "--budget", "100s", "--log", str(log)]
    command += ["-o", str(output)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b'"kind": "trial"') >= 6):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "(chosen)" in out
    assert "It was stopped before the check." in out
    assert json.loads(read_stored(output).calibration or "")["evidence"] == "search"
    assert "the same command with --force goes on from the log" in error


def test_without_time_for_the_full_length_short_prompts_decide_and_it_says_so(tmp_path, monkeypatch):
    """In this process, to let the first short prompt expect that a long one takes forever."""
    from swaa_local.calibrate import run as calibrate_run
    from swaa_local.calibrate.report import write_report
    from swaa_local.calibrate.request import CalibrateRequest
    from swaa_local.calibrate.table import markdown, stored_line

    monkeypatch.setattr(calibrate_run, "_LONGER_READING", 1e9)
    request = CalibrateRequest(
        bundled_model(), tmp_path / "log.jsonl", length=4096, windows=[256], budget_s=30.0, keep=0.5,
        engine=EngineOptions(n_threads=1),
    )  # fmt: skip
    result = calibrate_run.calibrate(request)
    assert result.evidence == "short prompts"
    assert result.chosen is not None
    assert result.keeps
    assert result.checks == ()
    assert {row["scale"] for row in rows(tmp_path / "log.jsonl", "trial")} == {"short"}
    page = markdown(result)
    assert "This is by short prompts alone: there was no time to try one of 4096 tokens." in page
    assert "all this is by prompts of 1024 with windows of a quarter" in page
    assert json.loads(stored_line(result, "1"))["evidence"] == "short prompts"
    pytest.importorskip("matplotlib")
    write_report(result, tmp_path / "report", force=False)
    assert "short prompts alone" in (tmp_path / "report" / "README.md").read_text()


def test_without_time_for_anything_it_says_how_long_a_prompt_takes(tmp_path):
    done = run("calibrate", *QUICK, *split("--budget 0.1s -o o.gguf"), cwd=tmp_path)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("swaa-local: error: no schedule was tried in")
    assert "give a larger --budget. One prompt takes about" in said
    assert not (tmp_path / "o.gguf").exists()


def test_what_keeps_too_little_is_written_with_what_is_known_of_it_and_is_an_error(tmp_path):
    """Whatever a few trials with so small a window find; 100 % of full attention is hard to keep with it."""
    arguments = split("-t 1 --length 1024 --window 16 --keep 1 --budget 15s -o o.gguf")
    done = run("calibrate", *arguments, cwd=tmp_path)
    stored = json.loads(read_stored(tmp_path / "o.gguf").calibration or "")
    assert stored["keep"] == 1
    assert (done.returncode, "o.gguf has the best that" in done.stderr) == (
        (0, False) if stored["keeps"] else (1, True)
    )


def test_another_configuration_does_not_go_on_from_it(calibrated):
    folder, _ = calibrated
    said = fails("calibrate", *split("-t 1 --length 2048 --window 128 --log log.jsonl"), cwd=folder)
    assert "log.jsonl is of another configuration: windows was [64] and is now [128]" in said


# The user's documents and questions


@pytest.mark.timeout(400)
def test_own_questions_are_asked(tmp_path):
    import random

    lines = []
    for seed in range(6):
        document = make_document(random.Random(seed), "statements", 1800, lambda text: len(text) // 3 + 1, n_facts=6)
        early = [placed for placed in document.facts if document.depth(placed) < 0.7]
        for placed in early[:3]:
            row = {"text": document.text, "question": placed.fact.question, "answer": placed.fact.value}
            lines.append(json.dumps(row))
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
    arguments = split("-t 1 --window 64 --keep 0.5 --budget 15s --questions q.jsonl --json")
    done = run("calibrate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kinds"] == ["own"]
    assert result["checks"][0]["right"] == result["checks"][0]["n"] > 0  # what full attention answers is the measure


@pytest.mark.timeout(400)
def test_own_documents_are_the_haystack(tmp_path):
    done = run("calibrate", *SHORT, *split("--budget 15s --json --data"), ROOT / "docs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chosen"] is not None


# What it refuses


def test_documents_that_are_too_short_are_refused_with_what_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("A short text. " * 100)
    said = fails("calibrate", *split("--length 4096 --data"), tmp_path / "short.txt", cwd=tmp_path)
    assert "but a prompt takes 4096; give" in said
    assert "times as much text" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "short.txt"]


def test_a_model_that_cannot_answer_is_no_measure(tmp_path, tiny_model_factory):
    model = tiny_model_factory(n_ctx_train=16384)
    said = fails("calibrate", model, *split("-t 1 --length 16384 --window 64 --budget 60s"), cwd=tmp_path)
    assert "does not answer questions about texts of 4096 tokens" in said
    assert "pass a shorter --length, your own --questions, or take a better model" in said


def test_a_window_that_shows_the_answers_is_refused(tmp_path):
    said = fails("calibrate", *split("--length 2048 --window 256,1500"), cwd=tmp_path)
    assert "a window of 1500 tokens shows more than half of a prompt of 2048" in said
    assert "pass --length 6000 or a smaller --window" in said


def test_questions_that_need_more_than_the_length_are_refused(tmp_path):
    row = json.dumps({"text": "word " * 3000, "question": "What?"})
    (tmp_path / "q.jsonl").write_text(f"{row}\n" * 4)
    said = fails("calibrate", *split("--length 1024 --window 64 --questions q.jsonl"), cwd=tmp_path)
    assert "tokens but --length is 1024; pass --length" in said


def test_a_context_that_the_memory_cannot_hold_is_refused(tmp_path):
    said = fails("calibrate", *split("--length 500000000 --window 64"), cwd=tmp_path)
    assert "a context of 500000000 tokens needs a KV cache of" in said


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path):
    (tmp_path / "o.gguf").write_text("mine")
    assert "o.gguf exists; pass --force" in fails("calibrate", "-o", "o.gguf", cwd=tmp_path)
    assert "is not a directory" in fails("calibrate", "-o", "no/o.gguf", cwd=tmp_path)
    assert (tmp_path / "o.gguf").read_text() == "mine"
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_model_that_takes_no_schedule_is_refused(tmp_path, tiny_model_factory):
    model = tiny_model_factory(extra={"qwen3.ssm.state_size": 4})
    assert "no schedule can apply" in fails("calibrate", model, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--budget 15", "'15' is not a time such as 90s, 15m or 1.5h"),
        ("--budget 0s", "is not a time"),
        ("--keep 1.5", "1.5 is not in the range"),
        ("--data x.txt --questions q.jsonl", "--questions bring their own texts; leave out --data"),
    ],
)
def test_wrong_usage(arguments, said):
    done = run("calibrate", *split(arguments))
    assert done.returncode == 2
    assert said in done.stderr


def test_modes_that_the_schedule_counts_are_those_of_the_engine():
    assert (FULL, PREFILL, ALWAYS) == (LayerMode.FULL, LayerMode.PREFILL, LayerMode.ALWAYS)
