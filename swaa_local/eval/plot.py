"""Plots of an evaluation: accuracy against time, as in the SWAA paper's figure 2, and needle depth against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swaa_local.eval.results import Evaluation
from swaa_local.eval.table import N_DEPTHS, Accuracy, CellFigures, figures
from swaa_local.report.plotting import MARKERS, as_title, check_plot, make_figure, save_figure


def plot(evaluation: Evaluation, path: Path) -> list[Path]:
    """Write accuracy against time to `path` and, if needles are single, depth against length beside it.

    Returns the files written; an existing one is replaced. Raises `PlotError`.
    """
    check_plot(path)
    cells = figures(evaluation)
    drawn = [(_accuracy_time(cells, evaluation), path)]
    if any(depth for cell in cells for depth in cell.depths):
        drawn.append((_depth_length(cells, evaluation.model), path.with_stem(f"{path.stem}-depth")))
    for figure, target in drawn:
        save_figure(figure, target)
    return [target for _, target in drawn]


def _accuracy_time(cells: Sequence[CellFigures], evaluation: Evaluation) -> Any:
    """A panel for each task and length: what an answer takes, and how often it is right."""
    groups = list(dict.fromkeys((cell.task, cell.length) for cell in cells))
    n_columns = min(3, len(groups))
    n_rows = -(-len(groups) // n_columns)
    figure = make_figure(figsize=(4.8 * n_columns + 1.6, 4.0 * n_rows))
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    names = list(dict.fromkeys(cell.variant for cell in cells))
    handles: dict[str, Any] = {}
    for i, ax in enumerate(axes):
        if i >= len(groups):
            ax.set_visible(False)
            continue
        task, length = groups[i]
        group = [cell for cell in cells if (cell.task, cell.length) == (task, length)]
        baseline = [
            _point(cell) for name in (evaluation.naive, evaluation.full) for cell in group if cell.variant == name
        ]
        if len(baseline) == 2:
            ax.plot(*zip(*baseline, strict=True), color="0.7", linestyle="--", zorder=1)
        for cell in group:
            x, y = _point(cell)
            low, high = (100 * bound for bound in cell.accuracy.interval)
            number = names.index(cell.variant)
            handles[cell.variant] = ax.errorbar(
                x,
                y,
                yerr=[[max(0, y - low)], [max(0, high - y)]],
                fmt=MARKERS[number % len(MARKERS)],
                color=f"C{number % 10}",
                capsize=3,
                zorder=2,
            )
        ax.set(xlabel="seconds an answer (prefill and decode)", ylabel="right, %", ylim=(-4, 108))
        ax.set_xlim(0, 1.15 * max(_point(cell)[0] for cell in group))
        ax.set_title(
            f"{as_title(task)}{'' if length is None else f', {length} tokens'}, n = {group[0].accuracy.n}", fontsize=10
        )
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{as_title(evaluation.model)}: accuracy and time; bars are 95 % intervals", fontsize=11)
    return figure


def _point(cell: CellFigures) -> tuple[float, float]:
    return cell.prefill_s + cell.decode_s, 100 * cell.accuracy.share


def _depth_length(cells: Sequence[CellFigures], model: str) -> Any:
    """A heat map for each variant, over all tasks with single needles."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    n_columns = min(4, len(variants))
    n_rows = -(-len(variants) // n_columns)
    figure = make_figure(figsize=(2 + (1.2 + 0.6 * len(lengths)) * n_columns, 0.8 + 2.6 * n_rows))
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    image = None
    for i, ax in enumerate(axes.flat):
        if i >= len(variants):
            ax.set_visible(False)
            continue
        shares = []
        for depth in range(N_DEPTHS):
            shares.append([_mean(cells, variants[i], length, depth) for length in lengths])
        image = ax.imshow(shares, vmin=0, vmax=100, cmap="RdYlBu", aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if share == share:  # not NaN
                    ink = "white" if not 15 <= share <= 85 else "black"  # the colours of both ends are dark
                    ax.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color=ink)
        ax.set_title(variants[i], fontsize=9)
        ax.set_xticks(range(len(lengths)), ["all" if n is None else str(n) for n in lengths], fontsize=8)
        edges = [f"{100 * d // N_DEPTHS}-{100 * (d + 1) // N_DEPTHS} %" for d in range(N_DEPTHS)]
        ax.set_yticks(range(N_DEPTHS), edges if i % n_columns == 0 else [], fontsize=8)
    figure.supxlabel("length, tokens", fontsize=9)
    figure.supylabel("needle depth", fontsize=9)
    figure.suptitle(f"{as_title(model)}: right, %", fontsize=11)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _mean(cells: Sequence[CellFigures], variant: str, length: int | None, depth: int) -> float:
    found: list[Accuracy] = [
        accuracy
        for cell in cells
        if (cell.variant, cell.length) == (variant, length) and (accuracy := cell.depths[depth])
    ]
    n = sum(accuracy.n for accuracy in found)
    return 100 * sum(accuracy.right for accuracy in found) / n if n else float("nan")
