"""A schedule for people: in one line, in the words of `--variants`, in letters (F P A), and layer by layer.

Layers that cannot slide have letters of their own for people; to the engine and in overrides they are F.
"""

from __future__ import annotations

from collections.abc import Sequence

from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.layers import compact_layers, format_layers
from swaa_local.schedule.model_layers import LayerKind, ModelLayers
from swaa_local.schedule.variants import FA_DECODE, FULL, TAIL

LETTERS = {LayerMode.FULL: "F", LayerMode.PREFILL: "P", LayerMode.ALWAYS: "A"}
"""Of the modes, here as in the engine's log and its `swaa.layer_modes` override (llama-swaa.cpp)."""
MEANINGS = {
    LayerMode.FULL: "full attention",
    LayerMode.PREFILL: "window while prefilling, full attention while decoding",
    LayerMode.ALWAYS: "window always, KV cache is a ring",
}
KIND_LETTERS = {LayerKind.OWN_WINDOW: "w", LayerKind.RECURRENT: "r", LayerKind.NO_ATTENTION: "-"}
"""Of layers that cannot slide."""
_STRIP_WIDTH = 64


def letters_of(modes: Sequence[LayerMode]) -> str:
    """One letter a layer."""
    return "".join(LETTERS[mode] for mode in modes)


def layer_strip(schedule: Schedule, width: int = _STRIP_WIDTH) -> list[str]:
    """One letter a layer, in lines of `width` with the first one's index."""
    letters = "".join(
        KIND_LETTERS.get(kind, LETTERS[mode])
        for mode, kind in zip(schedule.layer_modes, schedule.model.kinds, strict=True)
    )
    margin = len(str(max(0, len(letters) - 1)))
    return [f"{start:>{margin}} {letters[start : start + width]}" for start in range(0, len(letters), width)]


def layer_by_layer(schedule: Schedule) -> list[str]:
    """The schedule as text: settings, the strip, and the layers of each mode."""
    model = schedule.model
    if schedule.is_full and model.all_slide:
        return [f"full attention in all {schedule.n_layer} layers"]
    if schedule.is_full:
        return [f"full attention in all layers that can slide, {in_slides(model)}"]
    tail = f"tail {schedule.tail}, " if schedule.tail else ""
    lines = [f"window {schedule.window}, sinks {schedule.sinks}, {tail}{schedule.n_layer} layers"]
    lines += ["  " + line for line in layer_strip(schedule)]
    for mode in LayerMode:
        if layers := schedule.layers(mode):
            lines.append(f"  {LETTERS[mode]} {len(layers):>3} x {MEANINGS[mode]}: {compact_layers(layers, model)}")
    for kind, letter in KIND_LETTERS.items():
        if layers := model.of_kind(kind):
            lines.append(f"  {letter} {len(layers):>3} x {model.in_words(kind)}: {format_layers(layers)}")
    return lines


def in_slides(model: ModelLayers) -> str:
    """Which layers can slide, and what the others have: `4 of 26: 5,11,17,23; others: own window (512 tokens)`."""
    sliding = model.sliding
    listed = f": {format_layers(sliding)}" if sliding else ""
    others = [model.in_words(kind) for kind in KIND_LETTERS if model.of_kind(kind)]
    return f"{len(sliding)} of {model.n_layer}{listed}" + (f"; others: {', '.join(others)}" if others else "")


def about_others(model: ModelLayers) -> str | None:
    """A sentence below figures of schedules; None where all layers can slide."""
    return None if model.all_slide else f"Layers that can slide: {in_slides(model)}, which stay as they are."


def in_words(schedule: Schedule) -> str:
    """A schedule as a variant: what `parse_variants` reads back, but for schedules with FA decode in some layers only,
    for which there are no words."""
    if schedule.is_full:
        return FULL
    prefill, always = schedule.layers(LayerMode.PREFILL), schedule.layers(LayerMode.ALWAYS)
    words = [f"w{schedule.window}", f"k{schedule.sinks}"]
    if prefill:
        words.append(f"{FA_DECODE} in {format_layers(prefill)}" if always else FA_DECODE)
    if full := schedule.layers(LayerMode.FULL):
        words.append(compact_layers(full, schedule.model))
    if schedule.tail:
        words.append(f"{TAIL}{schedule.tail}")
    return " ".join(words)


def in_one_line(schedule: Schedule | None) -> str:
    """Few words about a schedule: `even layers full, others window 512 while reading, 32 sinks`."""
    if schedule is None:
        return "none: full attention"
    groups = [
        (schedule.layers(LayerMode.FULL), "full"),
        (schedule.layers(LayerMode.ALWAYS), f"window {schedule.window} always"),
        (schedule.layers(LayerMode.PREFILL), f"window {schedule.window} while reading"),
    ]
    groups = [(layers, what) for layers, what in groups if layers]
    parts = [f"{_layers_in_words(layers, schedule.model)} {what}" for layers, what in groups]
    if len(groups) > 1:
        parts[-1] = f"others {groups[-1][1]}"
    if schedule.sinks:
        parts.append(f"{schedule.sinks} sinks")
    if schedule.active_tail:
        parts.append(f"tail {schedule.active_tail}")
    return ", ".join(parts)


def _layers_in_words(layers: Sequence[int], model: ModelLayers) -> str:
    if len(layers) == model.n_layer:
        return "all layers"
    if tuple(layers) == model.sliding:
        return "all layers that can slide"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    for first, word in ((0, "even"), (1, "odd")):
        if list(layers) == list(range(first, model.n_layer, 2)):
            return f"{word} layers"
    return f"layers {compact_layers(layers, model)}"
