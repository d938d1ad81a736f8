"""Lists of layers as people write them: read, formatted, in their shortest form. Knows nothing of modes.

Numbers name layers of the model; slices count those that can slide, which are all of them in most models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from swaa_local.errors import ScheduleError
from swaa_local.schedule.model_layers import LayerKind, ModelLayers


def parse_layers(text: str, layers: ModelLayers | int, *, clip_layers: bool = False) -> tuple[int, ...]:
    """Layer numbers from a comma-separated list of numbers (`1`), ranges (`0-3`, both ends) and slices (`1::2`).

    Slices are Python's: negative bounds count from the end, a missing bound is the end. An empty string is no layer.
    Of layers that cannot slide, ranges leave out what they hold, and slices do not count them: `1::2` is every second
    of those that can. A number or a bound past the last one is a `ScheduleError` unless `clip_layers` drops it; so is
    the number of a layer that cannot slide.
    """
    model = ModelLayers.of(layers)
    found: set[int] = set()
    for item in (part.strip() for part in text.split(",")):
        if not item:
            if text.strip():
                raise ScheduleError(f"empty item in layer list {text!r}; write for instance 1,3,5 or 0-3 or 1::2")
            continue
        found.update(_parse_item(item, model, clip_layers))
    return tuple(sorted(found))


def format_layers(layers: Iterable[int]) -> str:
    """The shortest of a slice-free list: `0-3,7`; what `parse_layers` reads back. Empty: an empty string."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def compact_layers(layers: Sequence[int], of: ModelLayers | int) -> str:
    """Layer numbers in the shorter of the forms that the command line takes: a slice, or numbers and ranges."""
    sliding = ModelLayers.of(of).sliding
    if len(layers) > 2 and set(layers) <= set(sliding):
        first, step = sliding.index(layers[0]), sliding.index(layers[1]) - sliding.index(layers[0])
        if step > 1 and list(sliding[first::step]) == list(layers):
            return f"{first}::{step}"
    return format_layers(layers)


def _parse_item(item: str, model: ModelLayers, clip: bool) -> Iterable[int]:
    n_layer, sliding = model.n_layer, model.sliding

    def beyond(number: int, limit: int, which: str = f"{n_layer} layers (0 to {n_layer - 1})") -> bool:
        if number <= limit:
            return False
        if not clip:
            raise ScheduleError(
                f"layer list item {item!r} goes past the model's {which}; "
                "shorten it, or pass --clip-layers to drop layers past the last one"
            )
        return True

    if re.fullmatch(r"\d+", item):
        number = int(item)
        if beyond(number, n_layer - 1):
            return ()
        if model.kinds[number] is not LayerKind.SLIDES:
            raise ScheduleError(f"layer list item {item!r}: {model.why_not(number)}")
        return (number,)
    if match := re.fullmatch(r"(\d+)\s*-\s*(\d+)", item):
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ScheduleError(f"layer range {item!r} runs backwards; write {last}-{first}")
        beyond(last, n_layer - 1)
        return [layer for layer in sliding if first <= layer <= last]
    if match := re.fullmatch(r"(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)?)?", item):
        start, stop, step = (int(group) if group else None for group in match.groups())
        if step is not None and step < 1:
            raise ScheduleError(f"layer slice {item!r} has step {step}; it must be at least 1")
        counted = () if model.all_slide else (f"{len(sliding)} layers that can slide, which slices count",)
        if start is not None:
            beyond(start, len(sliding) - 1, *counted)
        if stop is not None:
            beyond(stop, len(sliding), *counted)
        return sliding[start:stop:step]
    raise ScheduleError(
        f"cannot read layer list item {item!r}; write numbers (1,3,5), ranges (0-3) or Python slices (1::2)"
    )
