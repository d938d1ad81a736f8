"""The schedule of the bundled model, but for its full layers: these are searched for after a training.

Knows no PyTorch, so that tests can compare it with the file.
"""

from __future__ import annotations

from collections.abc import Iterable

WINDOW, SINKS, TAIL = 256, 16, 32
"""In tokens. A question takes up to 16 tokens, and what the template puts behind it up to 10."""


def schedule_options(full_layers: Iterable[int]) -> list[str]:
    """The options of `swaa-local convert` that give the file its schedule."""
    layers = ",".join(map(str, full_layers))
    numbers = ["--window", str(WINDOW), "--sinks", str(SINKS), "--full-layers", layers]
    return [*numbers, "--fa-decode", "--tail", str(TAIL)]
