"""A benchmark's progress on stderr: a bar with the time left on a terminal, a line a visit elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from swaa_local.bench.figures import decode_rate, prefill_rate
from swaa_local.bench.results import Sample, Setting
from swaa_local.bench.watch import Measurement, Watch
from swaa_local.report.progress import TimeLeft
from swaa_local.report.terminal import Console, TerminalReporter
from swaa_local.text.printable import printable
from swaa_local.text.units import format_duration


class TerminalWatch(Watch):
    """Draws on stderr. Use as a context manager, so that the bar goes away whatever happens.

    The bar is drawn when something happens and not by a thread of its own, which would take time from what is measured.
    """

    def __init__(self) -> None:
        self.console = Console()
        self._reporter = TerminalReporter()
        self._time = TimeLeft()
        self._work: list[tuple[str, int]] = []
        self._n_done = 0
        self._n_repetitions = 0
        self._started = 0.0
        self._progress: Progress | None = None

    def __enter__(self) -> TerminalWatch:
        return self

    def __exit__(self, *args: object) -> None:
        self._stop()

    def note(self, text: str) -> None:
        self._reporter.note(text)

    @contextmanager
    def loading(self, name: str) -> Iterator[None]:
        if self.console.is_terminal:
            with self.console.status(Text(printable(f"loading {name}"))):
                yield
        else:
            yield

    @contextmanager
    def probing(self, n_prompt: int, n: int) -> Iterator[Callable[[int], None]]:
        label = f"full attention with and without flash attention, {n_prompt} tokens"
        if not self.console.is_terminal:
            self.note(f"{label} ...")
            yield lambda done: None
            return
        self._start_bar(label, n, f"0/{n} runs")
        try:
            yield lambda done: self._update(completed=done, counts=f"{done}/{n} runs")
        finally:
            self._stop()

    def begin(self, visits: Sequence[Measurement], work: Sequence[int]) -> None:
        self._work = [(_key(visit.setting), n) for visit, n in zip(visits, work, strict=True)]
        self._n_repetitions = 1 + max(visit.repetition for visit in visits)
        if self.console.is_terminal:
            self._start_bar("", sum(work), "")

    def visiting(self, visit: Measurement) -> None:
        self._started = time.perf_counter()
        self._draw(f"{self._name(visit)}", 0.0)

    def on_tokens(self, done: int, total: int) -> None:
        self._draw(None, done / total)

    def visited(self, visit: Measurement, sample: Sample) -> None:
        key, work = self._work[self._n_done]
        self._time.took(key, work, time.perf_counter() - self._started)
        self._n_done += 1
        self._draw(None, 0.0)
        if self._progress is None:
            rates = [
                f"{rate:.1f} tok/s {name}"
                for name, rate in (("prefill", prefill_rate(sample)), ("decode", decode_rate(sample)))
                if rate is not None
            ]
            self.note(f"{self._name(visit)}: {', '.join(rates)} · {self._counts()}")

    def end(self) -> None:
        self._stop()

    def _name(self, visit: Measurement) -> str:
        return f"{visit.repetition + 1}/{self._n_repetitions} · {_key(visit.setting)} · {visit.size}"

    def _draw(self, description: str | None, share: float) -> None:
        done = sum(n for _, n in self._work[: self._n_done])
        if self._n_done < len(self._work):
            done += int(share * self._work[self._n_done][1])
        self._update(completed=done, counts=self._counts(), description=description)

    def _counts(self) -> str:
        left: dict[str, int] = defaultdict(int)
        for key, work in self._work[self._n_done :]:
            left[key] += work
        seconds = self._time.estimate(left)
        told = "" if seconds is None else f" · {format_duration(seconds)} left"
        return f"{self._n_done}/{len(self._work)} runs{told}"

    def _start_bar(self, description: str, total: int, counts: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[counts]}", markup=False),
            console=self.console,
            transient=True,
            auto_refresh=False,
        )
        self._progress.add_task(description, total=total, counts=counts)
        self._progress.start()

    def _update(self, **changes: Any) -> None:
        if self._progress:
            self._progress.update(self._progress.task_ids[0], refresh=True, **changes)

    def _stop(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


def _key(setting: Setting) -> str:
    fa = {None: "auto", True: "on", False: "off"}[setting.flash_attn]
    return f"{setting.variant} (fa {fa}, ub {setting.n_ubatch})"
