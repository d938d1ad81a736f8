"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

from swaa_local.text.printable import printable


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells, so that it reads well as plain text too; the first one is aligned left."""
    head, rows = [printable(cell) for cell in head], [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(head), f"| {' | '.join(rule)} |", *(line(row) for row in rows)])
