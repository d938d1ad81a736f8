"""A fine-tune on the terminal: a bar with loss, rate and time left on stderr, and the table of what came of it."""

from __future__ import annotations

from collections import deque

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from swaa_local.report.tables import markdown_table
from swaa_local.report.terminal import TerminalReporter
from swaa_local.schedule.text import in_words
from swaa_local.text.printable import printable
from swaa_local.text.units import format_bytes, format_duration
from swaa_local.tune.results import Step, TuneResult
from swaa_local.tune.watch import Watch

_RECENT = 10  # steps whose mean is shown
_LINES = 10  # where there is no terminal, of a run


class TerminalWatch(TerminalReporter, Watch):
    """Draws on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._recent: deque[Step] = deque(maxlen=_RECENT)

    def training(self, n_steps: int, done: int) -> None:
        if done:
            self.note(f"going on after step {done}")
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("tuning"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
        )
        self._progress.add_task("", total=n_steps, completed=done, figures="")
        self._progress.start()

    def trained(self, step: Step, n_steps: int) -> None:
        self._recent.append(step)
        figures = self._figures(step, n_steps)
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step.number, figures=figures)
        elif step.number % max(1, n_steps // _LINES) == 0 or step.number == n_steps:
            self.note(f"step {step.number}/{n_steps}: {figures}")

    def end(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _figures(self, step: Step, n_steps: int) -> str:
        n, seconds = len(self._recent), sum(each.seconds for each in self._recent)
        loss = sum(each.loss for each in self._recent) / n
        rate = sum(each.tokens for each in self._recent) / seconds if seconds else 0.0
        left = format_duration(seconds / n * (n_steps - step.number))
        return f"loss {loss:.3f} · {rate:,.0f} tok/s · {left} left"


def table(result: TuneResult) -> str:
    """The held-out answers' NLL before and after, and what the training took."""
    rows = [[printable(nll.where), nll.schedule, f"{nll.before:.4f}", f"{nll.after:.4f}"] for nll in result.nlls]
    head = ["measured in", "schedule", "NLL without the adapter", "NLL with it"]
    now = sum(1 for step in result.steps if step.tokens)
    resumed = "" if now == len(result.steps) else f", the last {now} of them"
    took = f"{len(result.steps)} steps on {result.n_examples} examples{resumed} in {format_duration(result.train_s)}"
    peak = "" if result.peak_bytes is None else f", {format_bytes(result.peak_bytes)} of GPU memory at most"
    lines = [
        markdown_table(head, rows),
        "",
        f"NLL: mean negative log-likelihood of the tokens of {result.n_held_out} held-out answers. Tuned for "
        f"{in_words(result.schedule)}: {took}{peak}.",
    ]
    return "\n".join(lines)
