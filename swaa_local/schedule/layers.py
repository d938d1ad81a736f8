"""Lists of layers as people write them: read, formatted, in their shortest form. Knows nothing of modes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from swaa_local.errors import ScheduleError


def parse_layers(text: str, n_layer: int, *, clip_layers: bool = False) -> tuple[int, ...]:
    """Layer numbers from a comma-separated list of numbers (`1`), ranges (`0-3`, both ends) and slices (`1::2`).

    Slices are Python's: negative bounds count from the end, a missing bound is the end. An empty string is no layer.
    A number or a bound past the model's last layer is a `ScheduleError` unless `clip_layers` drops it.
    """
    layers: set[int] = set()
    for item in (part.strip() for part in text.split(",")):
        if not item:
            if text.strip():
                raise ScheduleError(f"empty item in layer list {text!r}; write for instance 1,3,5 or 0-3 or 1::2")
            continue
        layers.update(_parse_item(item, n_layer, clip_layers))
    return tuple(sorted(layers))


def format_layers(layers: Iterable[int]) -> str:
    """The shortest of a slice-free list: `0-3,7`; what `parse_layers` reads back. Empty: an empty string."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def compact_layers(layers: Sequence[int], n_layer: int) -> str:
    """Layer numbers in the shorter of the forms that the command line takes: a slice, or numbers and ranges."""
    if len(layers) > 2:
        step = layers[1] - layers[0]
        if step > 1 and list(range(layers[0], n_layer, step)) == list(layers):
            return f"{layers[0]}::{step}"
    return format_layers(layers)


def _parse_item(item: str, n_layer: int, clip: bool) -> Iterable[int]:
    def beyond(number: int, limit: int) -> bool:
        if number <= limit:
            return False
        if not clip:
            raise ScheduleError(
                f"layer list item {item!r} goes past the model's {n_layer} layers (0 to {n_layer - 1}); "
                "shorten it, or pass --clip-layers to drop layers past the last one"
            )
        return True

    if re.fullmatch(r"\d+", item):
        number = int(item)
        return () if beyond(number, n_layer - 1) else (number,)
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", item):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ScheduleError(f"layer range {item!r} runs backwards; write {last}-{first}")
        beyond(last, n_layer - 1)
        return range(first, min(last, n_layer - 1) + 1)
    if match := re.fullmatch(r"(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)?)?", item):
        start, stop, step = (int(group) if group else None for group in match.groups())
        if step is not None and step < 1:
            raise ScheduleError(f"layer slice {item!r} has step {step}; it must be at least 1")
        if start is not None:
            beyond(start, n_layer - 1)
        if stop is not None:
            beyond(stop, n_layer)
        return range(n_layer)[start:stop:step]
    raise ScheduleError(
        f"cannot read layer list item {item!r}; write numbers (1,3,5), ranges (0-3) or Python slices (1::2)"
    )
