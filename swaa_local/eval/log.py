"""The file of an evaluation: every prompt, answer and score, one JSON object a line, so that a stopped run continues.

Lines have a `kind`: `config` (the first line: what all answers depend on), `variant` (a name and its schedule),
`question` and `answer`. A line is written whole or, if the program dies in it, cut off when the file is opened again.
Knows files only; answers were scored before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from swaa_local.errors import SWAAError
from swaa_local.eval.results import AnswerRecord, QuestionRecord
from swaa_local.schedule.variants import Variant

FORMAT = 1


class EvalLogError(SWAAError):
    """A results file that cannot be used; the message says what to do."""


class EvalLog:
    """Opens or begins a results file, and holds what is in it. Use as a context manager.

    config: must be what the file was begun with. variants: must have the schedules that they have in the file, if they
    are in it. Raises `EvalLogError`.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.questions: dict[str, QuestionRecord] = {}
        self.answers: dict[tuple[str, str], AnswerRecord] = {}
        self._variants: dict[str, Any] = {}
        self._file = self._open()
        try:
            begun = self._read()
            if begun is not None:
                self._check(begun, config)
            # Written with the first line behind it, so that what goes wrong before leaves no file.
            self._unwritten = None if begun is not None else {"kind": "config", "format": FORMAT} | dict(config)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> EvalLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unwritten is not None:
            self.path.unlink()
        self._file.close()

    def add_variant(self, variant: Variant) -> None:
        """Note a variant's schedule. Raises `EvalLogError` if the file has another under this name."""
        spelled = _as_row(variant)
        known = self._variants.get(variant.name)
        if known is None:
            self._variants[variant.name] = spelled
            self._write({"kind": "variant", "name": variant.name} | spelled)
        elif known != spelled:
            raise EvalLogError(
                f"{self.path} has answers of another schedule under the name {variant.name!r}; {self._remedy}"
            )

    def add_question(self, question: QuestionRecord) -> None:
        """Note a question. Raises `EvalLogError` if the file has another one in its place."""
        known = self.questions.get(question.id)
        if known is None:
            self.questions[question.id] = question
            self._write({"kind": "question"} | asdict(question))
        elif known != question:
            changed = next(f.name for f in fields(known) if getattr(known, f.name) != getattr(question, f.name))
            raise EvalLogError(
                f"{self.path} has another question {question.id} (its {changed} differs): of another version of the "
                f"tasks, another haystack or another dataset; {self._remedy}"
            )

    def add_answer(self, answer: AnswerRecord) -> None:
        self.answers[answer.question, answer.variant] = answer
        self._write({"kind": "answer"} | asdict(answer))

    @property
    def _remedy(self) -> str:
        return "name another file with --results, or remove this one"

    def _open(self) -> IO[bytes]:
        if self.path.exists() and not self.path.is_file():
            raise EvalLogError(f"{self.path} is not a regular file; {self._remedy}")
        try:
            file = self.path.open("a+b")
        except OSError as error:
            raise EvalLogError(f"{self.path}: {error.strerror}") from None
        if not _lock(file):
            file.close()
            raise EvalLogError(
                f"{self.path} is in use by another run; wait for it, or name another file with --results"
            )
        return file

    def _read(self) -> dict[str, Any] | None:
        self._file.seek(0)
        config: dict[str, Any] | None = None
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            where = f"{self.path} line {number}"
            try:
                row = json.loads(line)
                kind = row.pop("kind")
                if number == 1:
                    if kind != "config":
                        raise KeyError
                    config = row
                elif kind == "variant":
                    self._variants[row.pop("name")] = row
                elif kind == "question":
                    question = QuestionRecord(**row | {"references": tuple(row["references"])})
                    self.questions[question.id] = question
                elif kind == "answer":
                    answer = AnswerRecord(**row)
                    self.answers[answer.question, answer.variant] = answer
                else:
                    raise KeyError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EvalLogError(f"{where} is not of a results file of swaa-local eval; {self._remedy}") from None
        if config is None and whole == 0 and self._file.seek(0, os.SEEK_END) > 0 and not self._is_ours():
            raise EvalLogError(f"{self.path} is not a results file of swaa-local eval; {self._remedy}")
        self._file.truncate(whole)
        return config

    def _is_ours(self) -> bool:
        """True for the beginning of a first line that the program died in."""
        self._file.seek(0)
        ours = b'{"kind": "config", "format": '
        begun = self._file.read(len(ours))
        return ours.startswith(begun)

    def _check(self, begun: dict[str, Any], config: Mapping[str, Any]) -> None:
        if begun.get("format") != FORMAT:
            raise EvalLogError(f"{self.path} has format {begun.get('format')}, and this is {FORMAT}; {self._remedy}")
        wanted = json.loads(json.dumps(dict(config)))
        differing = [
            f"{name} was {_short(begun.get(name))} and is now {_short(wanted.get(name))}"
            for name in {**begun, **wanted}
            if name != "format" and begun.get(name) != wanted.get(name)
        ]
        if differing:
            raise EvalLogError(f"{self.path} is of another configuration: {'; '.join(differing)}; {self._remedy}")

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._unwritten is not None:
            first, self._unwritten = self._unwritten, None
            self._write(first)
        self._file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()


def _as_row(variant: Variant) -> dict[str, Any]:
    """Without window and sinks where no layer slides."""
    schedule = variant.schedule
    meaning = {} if schedule.is_full else {"window": schedule.window, "sinks": schedule.sinks}
    if schedule.active_tail:  # files from before there were tails go on
        meaning["tail"] = schedule.active_tail
    return {"think": variant.think, "layer_modes": [int(mode) for mode in schedule.layer_modes]} | meaning


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) > 40 else text


def _lock(file: IO[bytes]) -> bool:
    """Keep others from writing until the file is closed; True where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
