"""Notes and progress on stderr, drawn by rich."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich import console as rich_console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from swaa_local.report.progress import Reporter
from swaa_local.text.printable import printable


class Console(rich_console.Console):
    """rich's, for stderr unless said otherwise. That nobody reads is an error like any other; rich exits with 1."""

    def __init__(self, *, stderr: bool = True, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=soft_wrap)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Count(MofNCompleteColumn):
    """Done of total, once a total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class TerminalReporter(Reporter):
    """A bar with ETA on a terminal; one line a step where stderr is a file or a pipe."""

    def __init__(self) -> None:
        self._console = Console()

    def note(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def step(self, label: str, total: int | None = None, *, is_bytes: bool = False) -> Iterator[Callable[..., None]]:
        if not self._console.is_terminal:
            self.note(f"{label} ...")
            yield lambda done, total=None: None
            return
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()]
        columns += [DownloadColumn(), TransferSpeedColumn()] if is_bytes else [_Count()]
        columns += [TimeElapsedColumn() if total is None else TimeRemainingColumn()]
        with Progress(*columns, console=self._console, transient=total is None and not is_bytes) as progress:
            task = progress.add_task(printable(label), total=total)

            def update(done: int, total: int | None = None) -> None:
                progress.update(task, completed=done)
                if total is not None:
                    progress.update(task, total=total)

            try:
                yield update
            finally:
                if progress.tasks[0].total is None:
                    progress.remove_task(task)  # it was a sign of life, and what it did is done
