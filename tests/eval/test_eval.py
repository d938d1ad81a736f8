"""`swaa-local eval` from outside: what it prints and keeps, that a killed run continues, and what it refuses.

Models are tiny: random ones, whose answers depend on the schedule, and scripted ones, whose answers are known.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from tests.support.program import environment, fails, interrupt, run, succeeds
from tests.support.scripted import NEWLINE, THINKING_TEMPLATE, scripted_model, thinker
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys

pytestmark = pytest.mark.usefixtures("engine")

ONE_THREAD = ("-t", "1")
FULL_ALONE = (*ONE_THREAD, "--variants", "full")
RAMBLING = [chr(c) for c in range(0x22, 0x7F) if chr(c) not in "Yes!<>/"]
SCHEDULE = ScheduleKeys(window=64, sinks=4, layer_modes=[FULL, PREFILL, ALWAYS, PREFILL])


@pytest.fixture(scope="module")
def model(tiny_model_factory) -> Path:
    return tiny_model_factory(schedule=SCHEDULE, n_ctx_train=8192)


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def dataset(path: Path, *answers: str, n: int = 1) -> Path:
    """Prompts that differ, with these answers in turn."""
    lines = [{"prompt": f"Question {i}?", "answer": answers[i % len(answers)]} for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# What it says


def test_the_same_questions_go_to_every_variant(model, tmp_path):
    results = tmp_path / "r.jsonl"
    arguments = split("--task niah_single_1,niah_multikey_2 --length 900,700 -n 2 --max-tokens 12 -t 1")
    variants = ("full", "naive", "file", "w32 k2 1")
    table = succeeds("eval", model, *arguments, "--variants", ",".join(variants), "--results", results)
    questions = rows(results, "question")
    assert [question["id"] for question in questions] == [
        f"{task}/{length}/{index}"
        for length in (700, 900)
        for task in ("niah_single_1", "niah_multikey_2")
        for index in (0, 1)
    ]
    assert all(question["prompt_tokens"] + 12 <= question["length"] for question in questions)
    asked = Counter(row["question"] for row in rows(results, "answer"))
    assert asked == {question["id"]: 4 for question in questions}
    found = rows(results, "answer")
    answers = {tuple(row["answer"] for row in found if row["variant"] == variant) for variant in variants}
    assert len(answers) == 4  # each saw the text through a mask of its own
    assert table.count("### ") == 4
    assert "### niah_multikey_2, 900 tokens, 2 questions" in table
    assert table.count("| w32 k2 1") == 8  # and in a table by depth


def test_without_a_schedule_known_ones_are_compared(tiny_model, tmp_path):
    done = run("eval", tiny_model, *split("-n 1 --length 600 -t 1 -o json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "has no schedule; comparing full,quality,speed (choose with --variants)" in done.stderr
    assert "which the window of quality and of speed holds whole" in done.stderr
    assert {cell["variant"] for cell in json.loads(done.stdout)["results"]} == {"full", "quality", "speed"}


def test_where_no_schedule_can_apply_it_says_why(tiny_model_factory, tmp_path):
    model = tiny_model_factory(extra={"qwen3.ssm.state_size": 4})
    done = run("eval", model, *split("-n 1 --length 600 -t 1 -o json"), cwd=tmp_path)
    assert "has no schedule; full attention alone is measured: architecture 'qwen3' has recurrent" in done.stderr


def test_accuracy_is_counted_from_the_answers(tmp_path):
    model = thinker(tmp_path / "m.gguf")
    data = dataset(tmp_path / "d.jsonl", "yes!", "no", "YES", n=9)
    results = tmp_path / "r.jsonl"
    done = run("eval", model, *FULL_ALONE, "--dataset", data, "--results", results, "-o", "json")
    assert done.returncode == 0, done.stderr
    [cell] = json.loads(done.stdout)["results"]
    assert (cell["variant"], cell["task"], cell["length"], cell["metric"]) == ("full", "d", None, "contains")
    assert (cell["accuracy"]["n"], cell["accuracy"]["right"]) == (9, 6)
    assert (cell["accuracy"]["low"], cell["accuracy"]["high"]) == pytest.approx((0.354, 0.879), abs=1e-3)
    assert "an answer is right if it contains the reference; no judge reads it" in done.stderr
    first = rows(results, "answer")[0]
    assert (first["thinking"], first["answer"], first["finish"]) == ("hm", "Yes!", "stop")


def test_csv_has_a_line_for_each_cell_and_depth(model, tmp_path):
    arguments = split("--task niah_single_1 --length 800 -n 3 --variants full,file --max-tokens 2 -o csv -t 1")
    text = succeeds("eval", model, *arguments, "--results", tmp_path / "r.jsonl")
    lines = list(csv.DictReader(io.StringIO(text)))
    cells = [line for line in lines if not line["depth_to"]]
    assert [(line["variant"], line["length"], line["n"]) for line in cells] == [
        ("full", "800", "3"),
        ("file", "800", "3"),
    ]
    assert all(float(line["prefill_s"]) > 0 and int(line["kv_bytes"]) > 0 for line in cells)
    depths = [line for line in lines if line["depth_to"] and line["variant"] == "file"]
    assert sum(int(line["n"]) for line in depths) == 3


def test_plots_are_written_beside_each_other(model, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = split("--task niah_single_1 --length 600,800 -n 2 --variants full,naive --max-tokens 2 -t 1")
    plot = tmp_path / "p.svg"
    done = run("eval", model, *arguments, "--results", tmp_path / "r.jsonl", "--plot", plot)
    assert done.returncode == 0, done.stderr
    for path in (plot, tmp_path / "p-depth.svg"):
        assert f"wrote {path}" in done.stderr
        assert path.read_text().lstrip().startswith("<?xml")


# Thinking


def test_think_off_is_an_answer_without_a_thought(tmp_path):
    model = thinker(tmp_path / "m.gguf")
    data = dataset(tmp_path / "d.jsonl", "yes")
    for i, (think, thought) in enumerate((("on", "hm"), ("off", ""), ("auto", "hm"))):
        results = tmp_path / f"{i}.jsonl"
        succeeds("eval", model, *FULL_ALONE, "--dataset", data, "--think", think, "--results", results)
        [answer] = rows(results, "answer")
        assert (answer["thinking"], answer["answer"], answer["correct"]) == (thought, "Yes!", True)


def test_a_variant_decides_for_itself_whether_to_think(tmp_path):
    model = thinker(tmp_path / "m.gguf")
    results = tmp_path / "r.jsonl"
    variants = ("--variants", "full,full think,full direct", "--think", "off")
    data = dataset(tmp_path / "d.jsonl", "yes")
    succeeds("eval", model, "--dataset", data, *variants, "--results", results, *ONE_THREAD)
    assert [row["thinking"] for row in rows(results, "answer")] == ["", "hm", ""]


def test_a_thought_without_end_is_a_miss_and_no_error(tmp_path):
    # It thinks "Yes", which is right but no answer, and ends there; or it is cut in the thought, or the context is.
    model = scripted_model(
        tmp_path / "m.gguf", [NEWLINE, "<think>", *"Yes!", *RAMBLING], chat_template=THINKING_TEMPLATE, n_ctx_train=256
    )
    data = dataset(tmp_path / "d.jsonl", "yes")
    for i, (limit, n_tokens) in enumerate(((2048, len(RAMBLING) + 6), (5, 6), (40, 41))):
        results = tmp_path / f"{i}.jsonl"
        arguments = ("--dataset", data, "--max-tokens", 8, "--think-tokens", limit, "--results", results, *FULL_ALONE)
        table = succeeds("eval", model, *arguments)
        [answer] = rows(results, "answer")
        assert answer["thinking"].startswith("Yes!")
        assert (answer["answer"], answer["finish"], answer["correct"]) == ("", "thinking", False)
        assert answer["generated_tokens"] == n_tokens
        assert table.splitlines()[2].endswith("cut |")


def test_an_answer_prefix_begins_the_answer_unless_there_is_a_thought(tmp_path):
    # "Y" leads on to "es!", and a line break to a thought.
    model = thinker(tmp_path / "m.gguf")
    row = {"input": "Is it?", "outputs": ["es!"], "answer_prefix": " The answer is Y"}
    (tmp_path / "niah.jsonl").write_text(json.dumps(row))
    for i, (think, thought, answer) in enumerate((("off", "", "es!"), ("on", "hm", "Yes!"))):
        results = tmp_path / f"{i}.jsonl"
        succeeds(
            "eval", model, *FULL_ALONE, "--dataset", tmp_path / "niah.jsonl", "--think", think, "--results", results
        )
        [got] = rows(results, "answer")
        assert (got["thinking"], got["answer"], got["correct"]) == (thought, answer, True)


# Stopped and continued

# About a second of work: long enough to be stopped in it.
WORK = split("--task facts_statements --length 1200 -n 6 --variants full,naive,file --max-tokens 8 -t 1")


def answers_of(path: Path) -> dict[tuple[str, str], Any]:
    """Without their times."""
    found = rows(path, "answer")
    keys = [(row["question"], row["variant"]) for row in found]
    assert len(keys) == len(set(keys)), "an answer was given twice"
    kept = ("answer", "thinking", "finish", "share", "correct", "generated_tokens", "kv_bytes")
    return {key: {name: row[name] for name in kept} for key, row in zip(keys, found, strict=True)}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_continues_without_gap_or_double(model, tmp_path, number):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    table = succeeds("eval", model, *WORK, "--results", whole)
    command = ("eval", model, *WORK, "--results", stopped)

    def n_answers() -> int:
        return stopped.read_bytes().count(b'"kind": "answer"') if stopped.exists() else 0

    code = interrupt(*command, when=lambda: n_answers() >= 4, number=number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    n_before = n_answers()
    assert 4 <= n_before < 18
    before = stopped.read_bytes()
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "of 18 answers already" in done.stderr
    assert stopped.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert answers_of(stopped) == answers_of(whole)
    assert len(answers_of(stopped)) == 18
    # Right answers and bytes are the same; times are not.
    assert [line.split("|")[1:3] for line in done.stdout.splitlines() if "|" in line] == [
        line.split("|")[1:3] for line in table.splitlines() if "|" in line
    ]


def test_a_finished_run_asks_nothing_again_and_a_larger_one_only_what_is_new(model, tmp_path):
    results = tmp_path / "r.jsonl"
    base = ("eval", model, "--task", "niah_single_1", "--results", results, "--max-tokens", 2, *ONE_THREAD)
    table = succeeds(*base, "--length", 700, "-n", 2, "--variants", "full")
    before = results.read_bytes()
    assert succeeds(*base, "--length", 700, "-n", 2, "--variants", "full") == table
    assert results.read_bytes() == before
    succeeds(*base, "--length", "700,900", "-n", 3, "--variants", "full,naive")
    assert results.read_bytes().startswith(before)
    assert len(rows(results, "answer")) == 2 * 3 * 2
    # And a smaller one shows its part alone.
    assert "900 tokens, 1 question\n" in succeeds(*base, "--length", 900, "-n", 1, "--variants", "naive")


def test_without_a_file_name_results_are_named_after_the_model(model, tmp_path):
    shutil.copy(model, tmp_path / "mine.gguf")
    arguments = split("--task niah_single_1 --length 700 -n 1 --max-tokens 2 -t 1")
    succeeds("eval", "mine.gguf", *arguments, cwd=tmp_path)
    assert rows(tmp_path / "mine.eval.jsonl", "answer")


def test_a_changed_configuration_is_refused(model, tmp_path, tiny_model_factory):
    results = tmp_path / "r.jsonl"
    command = [*split("--task niah_single_1 --length 700 -n 1 --variants full,w32 --max-tokens 2 --results"), results]
    succeeds("eval", model, *command, *ONE_THREAD)
    before = results.read_bytes()
    for changed, reason in (
        (["--seed", 1], "seed was 0 and is now 1"),
        (["--max-tokens", 3], "max_tokens was 2 and is now 3"),
        (["-ctk", "q8_0", "-fa", "on"], "flash_attn was null and is now true; type_k was null and is now q8_0"),
        (["--rope-scale", "2"], "rope_scale was null and is now 2.0"),
        (["-t", "2"], "n_threads was 1 and is now 2"),
    ):
        said = fails("eval", model, *command, *ONE_THREAD, *changed)
        assert f"is of another configuration: {reason}" in said
        assert "name another file with --results" in said
    other = tiny_model_factory(schedule=SCHEDULE, n_ctx_train=8192, seed=5)
    assert "model_sha256 was " in fails("eval", other, *command, *ONE_THREAD)
    assert results.read_bytes() == before


# What is refused


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--task", "nope"], "unknown task 'nope'; known are facts, ruler"),
        (["--task", "niah_single_2"], "niah_single_2 needs a text: --haystack FILE"),
        (["--task", "niah_single_2", "--haystack", "nope.txt"], "nope.txt: No such file"),
        (["--task", "niah_single_1", "--haystack", "nope.txt"], "leave out --haystack"),
        (["--task", "vt", "--length", "50"], "vt needs more than 50 tokens"),
        (["--variants", "full,fast"], "variant 'fast': unknown word 'fast'"),
        (["--variants", "w8 9"], "past the model's 4 layers"),
        (["--dataset", "nope.jsonl"], "nope.jsonl: no such file"),
        (["--plot", "p.gif"], "p.gif: a plot is a file of type .png, .svg, .pdf"),
        (["--plot", "nope/p.png"], "the directory nope does not exist"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(model, tmp_path, arguments, reason):
    assert reason in fails("eval", model, *arguments, *ONE_THREAD, cwd=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--length", "4k"], "'4k' is not a list of positive numbers"),
        (["--length", "0"], "is not a list of positive numbers"),
        (["-n", "0"], "0 is not in the range"),
        (["--think", "maybe"], "'maybe' is not one of"),
        (["--dataset", "d.jsonl", "--task", "vt"], "leave out --task and --length"),
        (["-c", "100"], "-c and --skip-long are for --dataset"),
        (["-m", "other.gguf"], "MODEL is given twice"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(model, arguments, reason):
    assert reason in fails("eval", model, *arguments, code=2)


def test_prompts_that_do_not_fit_are_refused_or_left_out(tmp_path):
    model = thinker(tmp_path / "m.gguf", n_ctx_train=1024)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * n, "answer": "yes"}) + "\n" for n in (10, 600, 20)))
    command = ("eval", model, "--dataset", data, *ONE_THREAD)
    said = fails(*command, "--results", tmp_path / "a.jsonl")
    assert "question 2 of d needs " in said
    assert "but the context is 1024; pass -c " in said
    done = run(*command, "--results", tmp_path / "b.jsonl", "--skip-long")
    assert done.returncode == 0, done.stderr
    assert "left out 1 questions of d that need more than 1024 tokens" in done.stderr
    assert [row["id"] for row in rows(tmp_path / "b.jsonl", "question")] == ["d/0", "d/2"]
    assert "3 questions" in succeeds(*command, "--results", tmp_path / "c.jsonl", "-c", 1500)
    said = fails(*command, "--results", tmp_path / "d2.jsonl", "--skip-long", "-c", 50)
    assert "no question of d fits a context of 50 tokens" in said


def test_a_model_that_no_schedule_fits_can_only_be_measured_as_it_is(tiny_model_factory, tmp_path):
    model = tiny_model_factory(file_arch="gemma3", extra={"gemma3.attention.sliding_window": 512})
    assert "gemma3" in fails("eval", model, "--variants", "w32", "--results", tmp_path / "r.jsonl")


def test_plots_without_matplotlib_say_what_to_install_before_the_work(model, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    said = fails("eval", model, "--plot", tmp_path / "p.png", "--results", tmp_path / "r.jsonl", PYTHONPATH=path)
    assert "plots need matplotlib: pip install 'swaa-local[plot]'" in said
    assert not (tmp_path / "r.jsonl").exists()


def test_tasks_are_listed():
    listed = succeeds("eval", "--list-tasks").splitlines()
    assert "facts: facts_statements, facts_sections" in listed
    assert {"niah_multikey_3", "cwe", "niah_multiquery-synth"} <= set(listed)
