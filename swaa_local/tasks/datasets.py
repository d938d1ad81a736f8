"""Questions from a file: what RULER's own generator writes, and datasets in the form that the SWAA paper's code reads.

RULER (NVIDIA/RULER, scripts/data/prepare.py), JSONL: `input`, `outputs` (a list), and `answer_prefix`, which older
versions leave in the input. SWAA (arXiv 2512.10411; LongMemEval_24k and others), JSONL or Parquet: `prompt`, or
`context` and `question`; `answer`. The paper lets a language model judge these answers; here an answer is right if it
contains the reference, which is another measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaa_local.tasks.base import Question, TaskError
from swaa_local.tasks.scoring import Metric
from swaa_local.text.extras import install

# Answer lengths of RULER's tasks by the beginning of their names, in tokens, and the one measured by any reference.
_RULER_TOKENS = {"niah": 128, "vt": 30, "variable_tracking": 30, "cwe": 120, "common_words": 120, "fwe": 50, "freq": 50}
_RULER_TOKENS |= {"qa": 32}
_RULER_DEFAULT_TOKENS = 128
_ANSWER_TOKENS = 512
_ANY_OF = "qa"


@dataclass(frozen=True)
class Dataset:
    """questions: as given, in order; they share the metric."""

    name: str
    questions: tuple[Question, ...]
    metric: Metric


def read_dataset(path: Path) -> Dataset:
    """Read a dataset by the fields of its rows. Raises `TaskError`, naming the line, for what is neither form."""
    if not path.is_file():
        raise TaskError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file")
    parquet = path.suffix.lower() in (".parquet", ".pq")
    name = _name(path)
    questions = []
    for where, row in _parquet_rows(path) if parquet else json_rows(path):
        questions.append(_question(row, name, where))
    if not questions:
        raise TaskError(f"{path} has no rows")
    metrics = {question.metric for question in questions}
    if len(metrics) > 1:
        raise TaskError(f"{path} mixes rows of RULER (input, outputs) with others (prompt, answer)")
    return Dataset(name, tuple(questions), metrics.pop())


def _name(path: Path) -> str:
    """RULER writes TASK/validation.jsonl: the folder names the task then."""
    return path.parent.name if path.stem in ("validation", "test") and path.parent.name else path.stem


def json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each object of a file of JSON lines is, and the object. Raises `TaskError` for what is none."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line.rstrip("\r\n"))
                except json.JSONDecodeError as error:
                    raise TaskError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
                except RecursionError:
                    raise TaskError(f"{where} nests JSON too deeply") from None
                if not isinstance(row, dict):
                    raise TaskError(f"{where} is not a JSON object")
                yield where, row
        except UnicodeDecodeError as error:
            raise TaskError(f"{path} is not UTF-8 ({error.reason})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise TaskError(f"{path} is Parquet, which needs pyarrow: {install('parquet')}") from None
    wanted = ("input", "outputs", "answer_prefix", "prompt", "context", "question", "answer")
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in wanted if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path} is not a readable Parquet file: {error}") from None


def _question(row: Mapping[str, Any], name: str, where: str) -> Question:
    if "input" in row and "outputs" in row:
        return _of_ruler(row, name, where)
    if row.get("prompt") is not None or row.get("context") is not None:
        return _of_paper(row, where)
    raise TaskError(
        f"{where} has the fields {', '.join(row) or 'none'}; needed are input and outputs (RULER), or prompt and answer"
    )


def _of_ruler(row: Mapping[str, Any], name: str, where: str) -> Question:
    prompt, prefix = _text(row, "input", where), row.get("answer_prefix") or ""
    references = _references(row["outputs"], "outputs", where)
    task = next((task for task in _RULER_TOKENS if name.startswith(task)), None)
    needle_at = depth = None
    if len(references) == 1 and task == "niah":
        offset = prompt.rfind(references[0])
        if offset >= 0:
            needle_at, depth = offset, offset / len(prompt)
    return Question(
        prompt=prompt,
        references=references,
        metric="part" if task == _ANY_OF else "all",
        max_tokens=_RULER_TOKENS.get(task or "", _RULER_DEFAULT_TOKENS),
        answer_prefix=str(prefix).strip(),
        needle_at=needle_at,
        depth=depth,
    )


def _of_paper(row: Mapping[str, Any], where: str) -> Question:
    if row.get("prompt") is not None:
        prompt = _text(row, "prompt", where)
    else:
        prompt = f"Context: {_text(row, 'context', where)}\n\nQuestion: {_text(row, 'question', where)}"
    references = _references(row.get("answer"), "answer", where)
    return Question(prompt, references, "contains", _ANSWER_TOKENS)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: {field} is {value!r}, not a text")
    return _whole(value, field, where)


def _whole(text: str, field: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TaskError(f"{where}: {field} has half of a character that takes two (a lone surrogate)") from None
    return text


def _references(value: Any, field: str, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    references = tuple(str(v).strip() for v in values if isinstance(v, (str, int, float)) and not isinstance(v, bool))
    if not references or len(references) < len(values) or not all(references):
        raise TaskError(f"{where}: {field} is {value!r}, not an answer or a list of answers")
    return tuple(_whole(reference, field, where) for reference in references)
