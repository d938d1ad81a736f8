"""A calibration's progress on stderr: a line that is drawn anew on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import time

from rich.progress import Progress, SpinnerColumn, TextColumn

from swaa_local.calibrate.results import Candidate, Scale
from swaa_local.calibrate.watch import Watch
from swaa_local.report.terminal import Console, TerminalReporter
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import in_words
from swaa_local.text.printable import printable
from swaa_local.text.units import format_duration


class TerminalWatch(Watch):
    """Draws on stderr. Use as a context manager, so that the line goes away whatever happens."""

    def __init__(self, budget_s: float) -> None:
        self._console = Console()
        self._reporter = TerminalReporter()
        self._budget_s, self._began = budget_s, time.perf_counter()
        self._progress: Progress | None = None
        self._stage = self._what = self._best = ""
        self._tried = 0

    def __enter__(self) -> TerminalWatch:
        return self

    def __exit__(self, *args: object) -> None:
        self.end()

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def stage(self, what: str) -> None:
        self._stage = what
        passed = format_duration(time.perf_counter() - self._began)
        if self._console.is_terminal:
            if self._progress is None:
                columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
                self._progress = Progress(*columns, console=self._console, transient=True)
                self._progress.add_task("")
                self._progress.start()
            self._draw("")
        else:
            self.note(f"{passed}: {what}{self._best}")

    def trying(self, schedule: Schedule, what: str) -> None:
        self._what = f"{_short(schedule)} on {what}"
        self._draw("")

    def on_prefill(self, done: int, total: int) -> None:
        self._draw(f" {done / total:.0%}" if done < total else "")

    def tried(self, schedule: Schedule, scale: Scale, best: Candidate | None, left_s: float) -> None:
        self._tried += 1
        if best is not None and not best.schedule.is_full:
            time_of = "" if best.prefill is None else f", {1 / best.prefill:.2f}x as fast"
            self._best = f" · best so far {_short(best.schedule)}: quality {best.quality.value:.3f}{time_of}"
        self._draw("")

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, share: str) -> None:
        if self._progress is None:
            return
        left = max(0.0, self._budget_s - (time.perf_counter() - self._began))
        # The end is cut off where the terminal is narrow.
        text = f"{format_duration(left)} left · {self._stage} · {self._what}{share}{self._best} · {self._tried} tried"
        self._progress.update(self._progress.task_ids[0], description=printable(text))


def _short(schedule: Schedule) -> str:
    words = in_words(schedule)
    return words if len(words) <= 44 else f"{words[:41]}..."
