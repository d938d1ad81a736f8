"""A calibration as a page with pictures, to be published beside a model. Knows results; matplotlib draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swaa_local.calibrate.results import CalibrateError, Calibration, Candidate
from swaa_local.calibrate.table import COSTS, as_json, front_of, markdown
from swaa_local.files.output_file import OutputError, write_output
from swaa_local.report.plotting import as_title, check_plot, make_figure, save_figure
from swaa_local.schedule.config import LayerMode
from swaa_local.text.printable import printable

PAGE, FIGURES = "README.md", "calibration.json"
TIME, MEMORY, LAYERS = "quality-time.svg", "quality-memory.svg", "layers.svg"


def check_report(folder: Path, *, force: bool) -> None:
    """Before the work: raise `CalibrateError` or `PlotError` for a place where no report can be, or where one is."""
    if folder.exists() and not folder.is_dir():
        raise CalibrateError(f"{folder} is a file; --report names a folder")
    if not folder.absolute().parent.is_dir():
        raise CalibrateError(f"{folder}: the folder {folder.parent} does not exist")
    taken = [name for name in (PAGE, FIGURES, TIME, MEMORY, LAYERS) if (folder / name).exists()]
    if taken and not force:
        raise CalibrateError(f"{folder / taken[0]} exists; pass --force to replace it, or name another folder")
    check_plot(folder.parent / TIME)


def write_report(result: Calibration, folder: Path, *, force: bool) -> list[Path]:
    """Write the page, its pictures and all figures; the files that were written. Raises `CalibrateError`."""
    try:
        folder.mkdir(exist_ok=True)
        pictures = [(TIME, _quality_cost(result, "reading time")), (MEMORY, _quality_cost(result, "KV cache"))]
        if result.gains:
            pictures.append((LAYERS, _layers(result)))
        for name, figure in pictures:
            save_figure(figure, folder / name)
        write_output(folder / FIGURES, as_json(result).encode() + b"\n", force=force)
        write_output(folder / PAGE, page(result, [name for name, _ in pictures]).encode(errors="replace"), force=force)
    except OSError as error:
        raise CalibrateError(f"cannot write {folder}: {error.strerror}") from None
    except OutputError as error:
        raise CalibrateError(str(error)) from None
    return [folder / name for name in (PAGE, FIGURES, *(name for name, _ in pictures))]


def page(result: Calibration, pictures: Sequence[str]) -> str:
    """The page in Markdown."""
    captions = {
        TIME: "Quality against the time to read a prompt, as shares of full attention's; bars are 95 % intervals",
        MEMORY: "Quality against the size of the KV cache",
        LAYERS: "By how much the answers' negative log-likelihood falls if a layer alone has full attention",
    }
    seen = "\n\n".join(f"![{captions[name]}]({name})\n\n*{captions[name]}.*" for name in pictures)
    machine = result.machine
    facts = [
        f"- command: `{printable(result.command)}`",
        f"- prompts: {result.length} tokens, seed {result.seed}, questions of the kinds {', '.join(result.kinds)}; "
        f"digest {result.digest}",
    ]
    if machine is not None:
        facts.append(
            f"- machine: {printable(machine.where(on_gpu=result.on_gpu))}; {printable(machine.system)}; "
            f"llama-cpp-python {machine.engine}, swaa-local {machine.version}; {machine.time}"
        )
    title, _, rest = markdown(result).partition("\n")
    return f"{title}\n{rest.rstrip()}\n\n## Pictures\n\n{seen}\n\n## How it was made\n\n" + "\n".join(facts) + "\n"


def _quality_cost(result: Calibration, cost: str) -> Any:
    def price(each: Candidate) -> float:
        return (COSTS[cost](each) or 0.0) / (COSTS[cost](result.full) or 1.0)

    figure = make_figure(figsize=(8.0, 5.2))
    ax = figure.subplots()
    timed = [each for each in result.candidates if each.prefill is not None]
    front = front_of(timed, cost)
    rest = [
        each for each in timed if each not in front and not each.schedule.is_naive and each.schedule != result.searched
    ]
    _points(ax, price, rest, "tried", color="0.6", marker="o", size=4)
    if front:
        ax.plot([price(each) for each in front], [each.quality.value for each in front], color="C0", zorder=1)
    _points(
        ax, price, [each for each in front if each.schedule != result.searched], "front", color="C0", marker="o", size=5
    )
    _points(
        ax, price, [each for each in timed if each.schedule.is_naive], "window alone", color="C3", marker="X", size=8
    )
    _points(
        ax,
        price,
        [each for each in timed if each.schedule == result.searched],
        "chosen",
        color="C2",
        marker="*",
        size=14,
    )
    ax.plot([1.0], [1.0], marker="s", color="black", linestyle="none", label="full attention")
    ax.axhline(result.keep, color="0.5", linestyle=":", linewidth=1)
    ax.annotate(f"{result.keep:.0%}", (1.0, result.keep), fontsize=8, color="0.4", va="top", ha="right")
    ax.set(xlabel=f"{cost}, as a share of full attention's", ylabel="quality, as a share of full attention's")
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    ax.set_title(f"{as_title(result.model)}, prompts of {result.length} tokens", fontsize=11)
    return figure


def _points(
    ax: Any,
    price: Callable[[Candidate], float],
    points: Sequence[Candidate],
    label: str,
    *,
    color: str,
    marker: str,
    size: int,
) -> None:
    if not points:
        return
    values = [each.quality.value for each in points]
    bars = [
        [max(0.0, each.quality.value - each.quality.low) for each in points],
        [max(0.0, each.quality.high - each.quality.value) for each in points],
    ]
    ax.errorbar(
        [price(each) for each in points],
        values,
        yerr=bars,
        fmt=marker,
        color=color,
        markersize=size,
        capsize=2,
        linewidth=0.8,
        label=label,
        zorder=2,
    )


def _layers(result: Calibration) -> Any:
    figure = make_figure(figsize=(8.0, 3.6))
    ax = figure.subplots()
    kept = set() if result.chosen is None else set(result.chosen.layers(LayerMode.FULL))
    colors = ["C2" if gain.layer in kept else "C0" for gain in result.gains]
    bars = ax.bar([gain.layer for gain in result.gains], [gain.gain for gain in result.gains], color=colors)
    for bar, gain in zip(bars, result.gains, strict=True):
        if not gain.alone:
            bar.set_alpha(0.4)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set(xlabel="layer (green: full in the chosen schedule; pale: measured in a group)", ylabel="NLL falls by")
    ax.set_title(f"{as_title(result.model)}: one layer full, {as_title(result.gains_at)}", fontsize=11)
    return figure
