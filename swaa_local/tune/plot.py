"""The loss curve of a fine-tune."""

from __future__ import annotations

from pathlib import Path

from swaa_local.report.plotting import as_title, make_figure, save_figure
from swaa_local.schedule.text import in_words
from swaa_local.tune.results import TuneResult

_SMOOTHED = 20  # steps that one point is the mean of


def plot(result: TuneResult, path: Path) -> None:
    """Write loss against step, as it is and smoothed. Raises `PlotError`."""
    figure = make_figure(figsize=(6.4, 4.0))
    ax = figure.subplots()
    numbers, losses = [step.number for step in result.steps], [step.loss for step in result.steps]
    ax.plot(numbers, losses, color="0.75", label="each step")
    means = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i + 1 - _SMOOTHED) : i + 1])]
    ax.plot(numbers, means, color="C0", label=f"mean of {_SMOOTHED}")
    ax.set(xlabel="step", ylabel="loss on the answers", title=as_title(f"{result.base}, {in_words(result.schedule)}"))
    ax.grid(alpha=0.3)
    ax.legend()
    save_figure(figure, path)
