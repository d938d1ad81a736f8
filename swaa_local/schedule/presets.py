"""Presets: the published schedules by model, generic ones to start from, and what is known about each.

Knows no model file; the rules that a preset is held to are in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from swaa_local.errors import ScheduleError
from swaa_local.schedule.config import SWAAConfig
from swaa_local.schedule.layers import parse_layers
from swaa_local.schedule.model_layers import ModelLayers


@dataclass(frozen=True)
class Preset:
    """A known schedule, and what is known about it."""

    name: str
    description: str
    notes: tuple[str, ...]
    window: int = 2048
    sinks: int = 100
    full_layers: str = ""
    """In the syntax of `parse_layers`."""
    fa_decode: bool = True
    tail: int = 0
    """In tokens; ours, and not in the paper."""
    n_layer: int | None = None
    """Depth of the model it was published for; None: a generic preset for any depth."""

    def config(self, layers: ModelLayers | int | None = None, *, clip_layers: bool = False) -> SWAAConfig:
        """The schedule for a model of these layers (may be left out where the preset is for one model).

        Raises `ScheduleError` if the preset was published for a model of another depth; `clip_layers` applies it to a
        shorter one knowingly.
        """
        wanted = layers if layers is not None else self.n_layer
        if wanted is None:
            raise ScheduleError(f"preset {self.name} fits models of any depth; pass the number of layers")
        model = ModelLayers.of(wanted)
        depth = model.n_layer
        if self.n_layer is not None and depth != self.n_layer and not (clip_layers and depth < self.n_layer):
            remedy = (
                "or pass --clip-layers to drop its layers past the last one"
                if depth < self.n_layer
                else "or name the layers yourself with --full-layers"
            )
            raise ScheduleError(
                f"preset {self.name} was published for a model of {self.n_layer} layers, and this one has {depth}; "
                f"start from a generic preset ({', '.join(GENERIC_PRESETS)}), {remedy}"
            )
        return SWAAConfig(
            sliding_window_size=self.window,
            keep_first=self.sinks,
            force_fa_decode=self.fa_decode,
            non_sliding_layers=parse_layers(self.full_layers, model, clip_layers=clip_layers),
            prompt_tail=self.tail,
        )


_PAPER = "Published configuration of SWAA (arXiv 2512.10411), measured there on long chat histories (LongMemEval, 24k)."
TAIL = 128
_PAPER_SUFFIX = "-paper"
_TAIL = (
    f"The tail of {TAIL} tokens is ours and not the paper's: the question reads the whole text. Add {_PAPER_SUFFIX} to "
    "the name for the same without it."
)
_MEASURED = "Measured on Qwen2.5-Coder-1.5B (docs/results.md):"
_FA_DECODE = "FA decode speeds up reading the prompt, not writing the answer, and saves no memory."
_LAYERS_DIFFER = (
    "Which layers must stay full differs from model to model: the other half can be far worse, so measure before you "
    "rely on it."
)
_WIDER = "The wider window keeps more detail and saves less: prompts of up to 4096 tokens gain nothing."
_GIST = (
    "Without full layers the model keeps the gist and loses details: recall in the paper's RULER runs stays under 20 %."
)
_LIGHT = (
    "Layers chosen by LightTransfer (arXiv 2410.13846) from attention weights; the authors of SWAA report no stable "
    "improvement from choosing layers this way."
)


def _published(stem: str, model: str, n_layer: int, parity: str, full_layers: str) -> list[Preset]:
    def preset(name: str, description: str, notes: tuple[str, ...], window: int = 2048, layers: str = "") -> Preset:
        return Preset(name, description, (*notes, _TAIL), window=window, full_layers=layers, tail=TAIL, n_layer=n_layer)

    return [
        preset(
            stem,
            f"{model}: window 2048, {parity} layers full, FA decode",
            (_PAPER, _LAYERS_DIFFER, _FA_DECODE),
            layers=full_layers,
        ),
        preset(
            f"{stem}-w4096",
            f"{model}: window 4096, {parity} layers full, FA decode",
            (_PAPER, _LAYERS_DIFFER, _WIDER, _FA_DECODE),
            window=4096,
            layers=full_layers,
        ),
    ]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in [
        Preset(
            "quality",
            "any model: window 2048, even layers full, FA decode; for answers like full attention's",
            (
                f"{_MEASURED} keys and quotes are found as often as with full attention at 8k, 16k and 30k tokens; a "
                "chain of assignments is followed less often (16k: 40 % instead of 54 %).",
                _LAYERS_DIFFER,
                "Compare with quality-odd.",
                _FA_DECODE,
                _TAIL,
            ),
            full_layers="0::2",
            tail=TAIL,
        ),
        Preset(
            "quality-odd",
            "any model: window 2048, odd layers full, FA decode; the other half of the layers",
            (
                f"{_MEASURED} it finds 88 % of one key among four at 16k tokens, where even layers find 100 % and full "
                "attention 94 %.",
                _LAYERS_DIFFER,
                _FA_DECODE,
                _TAIL,
            ),
            full_layers="1::2",
            tail=TAIL,
        ),
        Preset(
            "balanced",
            "any model: window 4096, no full layers, FA decode; for fast reading that keeps details",
            (
                f"{_MEASURED} as good as full attention for keys and quotes up to 16k tokens (at 30k: 72 % of the keys "
                "instead of 82 %); a chain of assignments is followed at 8k (80 % instead of 84 %) and lost at 16k.",
                _WIDER,
                _FA_DECODE,
                _TAIL,
            ),
            window=4096,
            tail=TAIL,
        ),
        Preset(
            "speed",
            "any model: window 2048, no full layers, FA decode; for the fastest reading",
            (
                f"{_MEASURED} it finds 98 %, 88 % and 62 % of one key among four at 8k, 16k and 30k tokens, where full "
                "attention finds 100 %, 94 % and 82 %; quotes as full attention does. It loses chains of assignments.",
                _FA_DECODE,
                _TAIL,
            ),
            tail=TAIL,
        ),
        Preset(
            "memory",
            "any model: even layers full, the others window 4096 always; for a cache of little more than half the size",
            (
                f"{_MEASURED} it finds 12 of 31 times one key among four at 16k tokens; full attention finds 94 %.",
                "A cache of q8_0 takes as little and loses less: try -ctk q8_0 -ctv q8_0 first.",
                _LAYERS_DIFFER,
            ),
            window=4096,
            full_layers="0::2",
            fa_decode=False,
        ),
        Preset(
            "streaming",
            "any model: window 2048 always, no full layers; for constant memory",
            (
                _GIST,
                "The model forgets what has left the window: for endless chat, not for questions about a long text.",
            ),
            fa_decode=False,
        ),
        *_published("qwen3-4b", "Qwen3-4B (Instruct and Thinking 2507)", 36, "odd", "1::2"),
        *_published("qwen3-30b-a3b", "Qwen3-30B-A3B (Instruct and Thinking 2507)", 48, "even", "0::2"),
        *_published("llama-3.1-8b", "Llama-3.1-8B-Instruct", 32, "even", "0::2"),
        Preset(
            "llama-3.1-8b-lighttransfer",
            "Llama-3.1-8B-Instruct: window 2048, LightTransfer's layers full, FA decode",
            (_LIGHT, _FA_DECODE, _TAIL),
            full_layers="0,1,4,5,8-11,13,14,21,23-27",
            tail=TAIL,
            n_layer=32,
        ),
    ]
}

GENERIC_PRESETS: tuple[str, ...] = tuple(name for name, preset in PRESETS.items() if preset.n_layer is None)
DEFAULT_PRESET = "quality"
"""What is proposed where nobody has chosen."""


def is_preset(name: str) -> bool:
    """True if `get_preset` knows this name."""
    return name.lower().removesuffix(_PAPER_SUFFIX) in PRESETS


def get_preset(name: str) -> Preset:
    """The preset of this name; with `-paper` behind it, without its tail. `ScheduleError` lists the names otherwise."""
    stem = name.lower().removesuffix(_PAPER_SUFFIX)
    if stem not in PRESETS:
        raise ScheduleError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    preset = PRESETS[stem]
    if stem == name.lower():
        return preset
    notes = tuple(note for note in preset.notes if note != _TAIL)
    return replace(preset, name=stem + _PAPER_SUFFIX, tail=0, notes=notes)
