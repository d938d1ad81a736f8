"""An evaluation's progress on stderr: a bar with the time left on a terminal, a line a cell elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from swaa_local.eval.log import EvalLog
from swaa_local.eval.results import AnswerRecord, Cell, QuestionRecord
from swaa_local.eval.watch import Watch
from swaa_local.report.progress import TimeLeft
from swaa_local.report.terminal import Console, TerminalReporter
from swaa_local.text.printable import printable
from swaa_local.text.units import format_duration


class TerminalWatch(Watch):
    """Draws on stderr. Use as a context manager, so that the bar goes away whatever happens."""

    def __init__(self) -> None:
        self.console = Console()
        self._reporter = TerminalReporter()
        self._time = TimeLeft()
        self._left: dict[str, int] = defaultdict(int)
        self._progress: Progress | None = None
        self._cells: dict[tuple[str, str], Cell] = {}
        self._open: dict[tuple[str, str | None, int | None], int] = {}
        self._right: dict[tuple[str, str | None, int | None], int] = defaultdict(int)
        self._tokens: dict[str, int] = {}
        self._n_answers = self._n_done = 0
        self._asked_at = 0.0

    def __enter__(self) -> TerminalWatch:
        return self

    def __exit__(self, *args: object) -> None:
        self._stop()

    def note(self, text: str) -> None:
        self._reporter.note(text)

    @contextmanager
    def making(self, task: str, length: int | None, n: int) -> Iterator[Callable[[int], None]]:
        size = "" if length is None else f" of {length} tokens"
        if not self.console.is_terminal:
            yield lambda done: None
            return
        with self._reporter.step(f"making questions: {task}{size}", n) as update:
            yield update

    def begin(self, cells: Sequence[Cell], log: EvalLog) -> None:
        for cell in cells:
            for question, variant in cell.keys:
                self._cells[question, variant] = cell
                self._tokens[question] = log.questions[question].prompt_tokens
                known = log.answers.get((question, variant))
                if known is None:
                    self._left[variant] += self._tokens[question]
                    key = (variant, cell.task, cell.length)
                    self._open[key] = self._open.get(key, 0) + 1
                else:
                    self._n_done += 1
                    self._right[variant, cell.task, cell.length] += known.correct
                    self._time.took(variant, self._tokens[question], known.prefill_s + known.decode_s)
        self._n_answers = len(self._cells)
        if self._n_done:
            self.note(f"{log.path} has {self._n_done} of {self._n_answers} answers already")
        if self.console.is_terminal and self._n_done < self._n_answers:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[counts]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._progress.add_task("", total=max(1, self._n_answers), completed=self._n_done, counts="")
            self._progress.start()

    def asking(self, variant: str, question: QuestionRecord) -> None:
        self._asked_at = time.perf_counter()
        if self._progress:
            size = "" if question.length is None else f" {question.length}"
            self._progress.update(
                self._progress.task_ids[0],
                description=printable(f"{variant} · {question.task}{size}"),
                counts=self._counts(),
            )

    def on_prefill(self, done: int, total: int) -> None:
        if self._progress:
            share = 0.9 * done / total
            self._progress.update(self._progress.task_ids[0], completed=self._n_done + share, counts=self._counts())

    def answered(self, answer: AnswerRecord) -> None:
        cell = self._cells[answer.question, answer.variant]
        tokens = self._tokens[answer.question]
        self._left[answer.variant] -= tokens
        self._time.took(answer.variant, tokens, time.perf_counter() - self._asked_at)
        self._n_done += 1
        key = (answer.variant, cell.task, cell.length)
        self._right[key] += answer.correct
        self._open[key] -= 1
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=self._n_done, counts=self._counts())
        elif self._open[key] == 0:
            size = "" if cell.length is None else f" {cell.length}"
            right = f"{self._right[key]} of {len(cell.questions)} right"
            self.note(f"{answer.variant} · {cell.task}{size}: {right} · {self._counts()}")

    def end(self) -> None:
        self._stop()

    def _counts(self) -> str:
        seconds = self._time.estimate(self._left)
        left = "" if seconds is None else f" · {format_duration(seconds)} left"
        return f"{self._n_done}/{self._n_answers} answers{left}"

    def _stop(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
