"""What all plots share: matplotlib, which is optional, and files that it can write."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.files.output_file import OutputError, write_output
from swaa_local.text.extras import install
from swaa_local.text.printable import printable

MARKERS = "osD^vP*X<>"
FORMATS = (".png", ".svg", ".pdf")


class PlotError(SWAAError):
    """A plot that cannot be made; the message says what to do."""


def check_plot(path: Path) -> None:
    """Fail before the work and not after it. Raises `PlotError`."""
    if path.suffix.lower() not in FORMATS:
        raise PlotError(f"{path}: a plot is a file of type {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"{path}: the directory {path.parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError(f"plots need matplotlib: {install('plot')}") from None


def as_title(text: str) -> str:
    """A name as matplotlib takes it: bytes that are no UTF-8 replaced, and a `$` that begins no formula."""
    return printable(text).replace("$", r"\$")


def make_figure(**kwargs: Any) -> Any:
    """A matplotlib figure that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **kwargs)


def save_figure(figure: Any, path: Path) -> None:
    """Write the file; an existing one is replaced. Raises `PlotError`."""
    image = BytesIO()
    figure.savefig(image, format=path.suffix[1:].lower(), dpi=150)
    try:
        write_output(path, image.getvalue(), force=True)
    except OutputError as error:
        raise PlotError(str(error)) from None
