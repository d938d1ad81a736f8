"""Datasets: what RULER's generator writes, what the SWAA paper's code reads, and what neither does."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from swaa_local.tasks import TaskError
from swaa_local.tasks.datasets import read_dataset


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


RULER = {"index": 0, "input": "A text with 1234567 in it. Which?", "outputs": ["1234567"], "length": 4000}


def test_rulers_rows_are_measured_as_their_task_is(tmp_path):
    row = RULER | {"answer_prefix": " The number is"}
    dataset = read_dataset(write(tmp_path / "niah_single_1" / "validation.jsonl", row))
    [question] = dataset.questions
    assert (dataset.name, dataset.metric) == ("niah_single_1", "all")
    assert (question.prompt, question.references) == (RULER["input"], ("1234567",))
    assert (question.answer_prefix, question.max_tokens) == ("The number is", 128)
    assert question.needle_at == RULER["input"].index("1234567")  # type: ignore[attr-defined]
    assert question.depth == pytest.approx(12 / 33)


@pytest.mark.parametrize(
    ("name", "metric", "max_tokens"),
    [
        ("vt", "all", 30),
        ("cwe", "all", 120),
        ("fwe", "all", 50),
        ("qa_1", "part", 32),
        ("niah_multivalue", "all", 128),
        ("other", "all", 128),
    ],
)
def test_tasks_are_known_by_the_file_or_its_folder(tmp_path, name, metric, max_tokens):
    row = {"input": "Text", "outputs": ["a", "b"]}
    for path in (tmp_path / f"{name}.jsonl", tmp_path / name / "validation.jsonl"):
        dataset = read_dataset(write(path, row))
        [question] = dataset.questions
        assert (dataset.name, question.metric, question.max_tokens) == (name, metric, max_tokens)
        assert (question.references, question.depth) == (("a", "b"), None)


def test_the_papers_rows_hold_a_prompt_or_its_parts(tmp_path):
    rows = [
        {"prompt": "All of it", "context": None, "question": "Why?", "answer": "because"},
        {"context": "A text", "question": "How many?", "answer": 5},
        {"prompt": None, "context": "A text", "question": "Who?", "answer": ["Ada", "Ada Klein"]},
    ]
    path = tmp_path / "long.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([r | {"answer": str(r["answer"])} for r in rows]), path)
    for dataset in (read_dataset(write(tmp_path / "long.jsonl", *rows)), read_dataset(path)):
        assert (dataset.name, dataset.metric) == ("long", "contains")
        assert [question.prompt for question in dataset.questions] == [
            "All of it",
            "Context: A text\n\nQuestion: How many?",
            "Context: A text\n\nQuestion: Who?",
        ]
        assert dataset.questions[1].references == ("5",)
    assert read_dataset(tmp_path / "long.jsonl").questions[2].references == ("Ada", "Ada Klein")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["{"], r"line 1 is not JSON: .* at column 2"),
        (['{"prompt": "a"\n'], r"line 1 is not JSON: .* at column 15"),
        ([RULER, "[1]\n"], "line 2 is not a JSON object"),
        ([{"text": "a"}], "line 1 has the fields text; needed are input and outputs"),
        ([{}], "has the fields none"),
        ([RULER | {"outputs": []}], r"outputs is \[\], not an answer"),
        ([RULER | {"outputs": ["a", None]}], "not an answer or a list of answers"),
        ([RULER | {"input": " "}], "input is ' ', not a text"),
        ([{"prompt": "a"}], "answer is None"),
        ([{"prompt": "a", "answer": ""}], "answer is ''"),
        ([{"context": "a", "answer": "b"}], "question is None, not a text"),
        ([{"prompt": "\ud83d", "answer": "b"}], "half of a character"),
        ([RULER, {"prompt": "a", "answer": "b"}], "mixes rows of RULER"),
        ([], "has no rows"),
        (["\n"], "has no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, reason):
    with pytest.raises(TaskError, match=reason):
        read_dataset(write(tmp_path / "a.jsonl", *rows))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(TaskError, match="no such file"):
        read_dataset(tmp_path / "nope.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(TaskError, match="is not UTF-8"):
        read_dataset(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskError, match="not a readable Parquet file"):
        read_dataset(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TaskError, match=r"needs pyarrow: pip install 'swaa-local\[parquet\]'"):
        read_dataset(tmp_path / "a.parquet")
