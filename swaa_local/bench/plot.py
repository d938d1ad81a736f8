"""Plots of a benchmark: prefill rate, and time to the first token, against the length of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swaa_local.bench.figures import RowFigures, figures
from swaa_local.bench.results import Bench, Setting
from swaa_local.bench.run import BenchError
from swaa_local.report.plotting import MARKERS, as_title, check_plot, make_figure, save_figure
from swaa_local.report.spread import Spread


def plot(bench: Bench, path: Path) -> list[Path]:
    """Write rate against length, time against length and, where it was measured, decode rate against depth.

    Returns the file written; an existing one is replaced. Raises `PlotError`.
    """
    check_plot(path)
    rows = figures(bench)
    panels: list[tuple[str, str, str]] = []
    if any(row.prefill for row in rows):
        panels += [
            ("prefill", "prompt, tokens", "prefill, tokens/s"),
            ("ttft_s", "prompt, tokens", "time to first token, s"),
        ]
    if any(row.decode for row in rows):
        panels.append(("decode", "depth, tokens", "decode, tokens/s"))
    if not panels:
        raise BenchError("no measurement can be plotted")
    figure = make_figure(figsize=(4.6 * len(panels) + 1.8, 4.2))
    axes = figure.subplots(1, len(panels), squeeze=False).flat
    settings = list(dict.fromkeys(row.setting for row in rows))
    handles: dict[str, Any] = {}
    for ax, (name, x_label, y_label) in zip(axes, panels, strict=True):
        for number, setting in enumerate(settings):
            points = sorted(
                (_x(row, name), spread) for row in rows if row.setting == setting and (spread := _spread(row, name))
            )
            if not points:
                continue
            xs = [x for x, _ in points]
            ys = [spread.median for _, spread in points]
            limit = setting.kind == "limit"
            line = ax.errorbar(
                xs,
                ys,
                yerr=[[s.median - s.bounds[0] for _, s in points], [s.bounds[1] - s.median for _, s in points]],
                marker=None if limit else MARKERS[number % len(MARKERS)],
                color="0.5" if limit else f"C{number % 10}",
                linestyle="--" if limit else "-",
                capsize=3,
            )
            handles.setdefault(_label(setting, settings), line)
        ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, None), xlim=(0, None))
        ax.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    single = all(row.repetitions == 1 for row in rows)
    told = "one repetition, so there are no bars" if single else "medians, bars from least to greatest"
    figure.suptitle(f"{as_title(Path(bench.model.path).name)}; {told}", fontsize=11)
    save_figure(figure, path)
    return [path]


def _spread(row: RowFigures, name: str) -> Spread | None:
    """The limit has no first token: its time is that of reading as many tokens."""
    if name == "ttft_s" and row.setting.kind == "limit" and row.prefill:
        n = row.size.n_prompt
        low, high = row.prefill.low, row.prefill.high
        return Spread(n / row.prefill.median, high and n / high, low and n / low)
    spread: Spread | None = getattr(row, name)
    return spread


def _x(row: RowFigures, name: str) -> int:
    return row.size.decode_depth if name == "decode" else row.size.n_prompt


def _label(setting: Setting, settings: list[Setting]) -> str:
    """The variant's name, and what else tells it from others of that name."""
    namesakes = [other for other in settings if other.variant == setting.variant]
    label = setting.variant
    if len({other.flash_attn for other in namesakes}) > 1:
        label += {None: " fa auto", True: " fa", False: " nofa"}[setting.flash_attn]
    if len({other.n_ubatch for other in namesakes}) > 1:
        label += f" ub {setting.n_ubatch}"
    return label
