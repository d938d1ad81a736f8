"""What the layers of a model are to a schedule: those that can slide, and those that attend as the model does.

A layer that is not ours to schedule stands as `FULL` (0) in a schedule, which does nothing to it. Pure; what metadata
say of a model's layers, `model_file.layer_kinds` knows, and the engine has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class LayerKind(Enum):
    """What a layer attends to by itself; the values are words for people."""

    SLIDES = "slides"
    """Everything before it: a schedule may give it any mode."""
    OWN_WINDOW = "own window"
    """A window that the model was trained with."""
    RECURRENT = "recurrent"
    """A state, and no keys."""
    NO_ATTENTION = "no attention"
    """Nothing: it has a feed-forward network alone."""


@dataclass(frozen=True)
class ModelLayers:
    """The kind of each layer of a model.

    own_window: tokens that an `OWN_WINDOW` layer sees, itself among them; 0 where there is none. kv_of: the layer whose
    KV cache each layer reads; empty where each has its own.
    """

    kinds: tuple[LayerKind, ...]
    own_window: int = 0
    kv_of: tuple[int, ...] = ()

    @classmethod
    def of(cls, layers: ModelLayers | int) -> ModelLayers:
        """The same, or that many layers that slide."""
        return layers if isinstance(layers, ModelLayers) else cls((LayerKind.SLIDES,) * layers)

    @property
    def n_layer(self) -> int:
        return len(self.kinds)

    @property
    def sliding(self) -> tuple[int, ...]:
        """The layers that can slide."""
        return self.of_kind(LayerKind.SLIDES)

    @property
    def all_slide(self) -> bool:
        return len(self.sliding) == self.n_layer

    def of_kind(self, kind: LayerKind) -> tuple[int, ...]:
        return tuple(i for i, each in enumerate(self.kinds) if each is kind)

    def reads_own_kv(self, layer: int) -> bool:
        """False where the layer reads another one's cache."""
        return not self.kv_of or self.kv_of[layer] == layer

    def in_words(self, kind: LayerKind) -> str:
        """`own window (1024 tokens)`, `recurrent`."""
        return f"{kind.value} ({self.own_window} tokens)" if kind is LayerKind.OWN_WINDOW else kind.value

    @property
    def kinds_in_words(self) -> str:
        """The kinds that there are, each once."""
        return ", ".join(self.in_words(kind) for kind in dict.fromkeys(self.kinds))

    def refusal(self, modes: Sequence[int]) -> str | None:
        """Why the layers cannot have these modes, by the values of the GGUF: 0 full, 1 prefill, 2 always; or None."""
        for layer, (kind, mode) in enumerate(zip(self.kinds, modes, strict=True)):
            if kind is not LayerKind.SLIDES and mode != 0:
                return f"mode {int(mode)} for layer {layer}, which takes 0 (full) alone: {self.why_not(layer)}"
        for layer, source in enumerate(self.kv_of):
            if self.kinds[layer] is LayerKind.SLIDES and (modes[layer] == 2) != (modes[source] == 2):
                return (
                    f"layer {layer} reads the KV cache of layer {source}, so both are windowed always (2) or neither "
                    f"is; their modes are {int(modes[layer])} and {int(modes[source])}"
                )
        return None

    def why_not(self, layer: int) -> str:
        """Why this layer, which cannot slide, does not; and which can."""
        can = ", ".join(map(str, self.sliding))
        which = f"the model's layers that can are {can}" if can else "no layer of this model can"
        is_what = {
            LayerKind.OWN_WINDOW: f"has a window of its own ({self.own_window} tokens)",
            LayerKind.RECURRENT: "is recurrent",
            LayerKind.NO_ATTENTION: "has no attention",
        }
        return f"layer {layer} {is_what[self.kinds[layer]]} and cannot slide; {which}"
