"""Rules of a schedule: layer modes, validation, layer lists, and what a schedule costs. Known schedules: `presets`.

Pure: imports nothing of the rest of the package and knows nothing of files, of the engine or of the command line.
Source of the semantics: SWAA, arXiv 2512.10411.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from swaa_local.errors import ScheduleError
from swaa_local.schedule.cost import full_cells, full_pairs, pad_cells, window_keys, window_pairs
from swaa_local.schedule.model_layers import LayerKind, ModelLayers

# The engine's own limit (llama-swaa.cpp): sums of positions, windows and sinks must fit a 32-bit position.
MAX_TOKENS = 1 << 30

DEFAULT_N_BATCH = 2048
"""Tokens of a `llama_decode` call where the user does not say, as of llama.cpp's own tools."""


class LayerMode(IntEnum):
    """What a layer sees; the values are those of the GGUF and of the engine."""

    FULL = 0
    """Everything, always; or what the model's own window or state holds, where a layer cannot slide."""
    PREFILL = 1
    """A window over the prompt, everything for generated tokens ("FA decode")."""
    ALWAYS = 2
    """A window, always; its KV cache is a ring."""


@dataclass(frozen=True)
class SWAAConfig:
    """A schedule in the terms of the paper, for a model of any depth; field names are those of the paper's code.

    Lists are accepted and stored as sorted tuples without duplicates, so equal schedules compare equal.

    Raises `ScheduleError` for a window below 1, negative numbers or wrong types.
    """

    sliding_window_size: int | None = None
    """Window W in tokens, the query token included; None: full attention."""
    keep_first: int = 0
    """Sinks k: the first tokens, visible to everyone."""
    force_fa_decode: bool | Sequence[int] = False
    """Full attention for generated tokens: in all sliding layers, or in those listed."""
    non_sliding_layers: Sequence[int] = ()
    """Layers that keep full attention."""
    prompt_tail: int = 0
    """T: the last tokens of a prompt, which read with full attention where FA decode applies. Not in the paper."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if self.sliding_window_size is not None:
            window = _tokens("sliding_window_size", self.sliding_window_size, least=1)
            set_field(self, "sliding_window_size", window)
        set_field(self, "keep_first", _tokens("keep_first", self.keep_first, least=0))
        if not isinstance(self.force_fa_decode, bool):
            # An empty list says the same as False.
            set_field(self, "force_fa_decode", _layers("force_fa_decode", self.force_fa_decode) or False)
        set_field(self, "non_sliding_layers", _layers("non_sliding_layers", self.non_sliding_layers))
        set_field(self, "prompt_tail", _tokens("prompt_tail", self.prompt_tail, least=0))

    def schedule(self, layers: ModelLayers | int, *, clip_layers: bool = False) -> Schedule:
        """The mode of each of the model's layers; a number stands for so many that can all slide.

        Layers listed past the model's last one are an error (the paper's code ignores them) unless `clip_layers` drops
        them knowingly. Layers that cannot slide are full, and FA decode listed for one is an error. Without a window,
        all layers are full (`Schedule.is_full`).
        """
        model = ModelLayers.of(layers)
        n_layer = model.n_layer
        if n_layer < 1:
            raise ScheduleError(f"a model has at least 1 layer, not {n_layer}")
        full = self._within("non_sliding_layers", self.non_sliding_layers, n_layer, clip_layers)
        decode: bool | frozenset[int]
        if isinstance(self.force_fa_decode, bool):
            decode = self.force_fa_decode
        else:
            decode = self._within("force_fa_decode", self.force_fa_decode, n_layer, clip_layers)
        if not isinstance(decode, bool):
            for layer in sorted(decode - full - set(model.sliding)):
                raise ScheduleError(f"force_fa_decode lists layer {layer}: {model.why_not(layer)}")
        if self.sliding_window_size is None:
            return Schedule.full(model)
        if not model.sliding:
            raise ScheduleError(f"no layer of this model can slide: {model.kinds_in_words}")

        def mode(layer: int) -> LayerMode:
            if layer in full or model.kinds[layer] is not LayerKind.SLIDES:
                return LayerMode.FULL
            prefill_only = decode if isinstance(decode, bool) else layer in decode
            return LayerMode.PREFILL if prefill_only else LayerMode.ALWAYS

        modes = tuple(mode(i) for i in range(n_layer))
        return Schedule(self.sliding_window_size, self.keep_first, modes, self.prompt_tail, model)

    @staticmethod
    def _within(name: str, layers: Sequence[int], n_layer: int, clip: bool) -> frozenset[int]:
        beyond = [layer for layer in layers if layer >= n_layer]
        if beyond and not clip:
            raise ScheduleError(
                f"{name} lists layer {beyond[0]}, but the model has {n_layer} layers (0 to {n_layer - 1}); "
                "remove it, or pass --clip-layers (clip_layers=True) to drop layers past the last one"
            )
        return frozenset(layer for layer in layers if layer < n_layer)


@dataclass(frozen=True)
class Schedule:
    """A schedule resolved for one model: what a GGUF stores and the engine takes.

    Raises `ScheduleError` for values outside the format (a window or sinks out of range, no layers, an unknown mode),
    and for a mode that a layer of the model cannot have.
    """

    window: int
    """W in tokens, the query token included; at least 1 even where no layer slides."""
    sinks: int
    """k, in tokens."""
    layer_modes: tuple[LayerMode, ...]
    """One per layer."""
    tail: int = 0
    """T in tokens: the last ones of each prompt, which `PREFILL` layers read with full attention."""
    model: ModelLayers = field(default=ModelLayers(()), compare=False, repr=False)
    """What the layers are; left out, they can all slide. Schedules that differ in nothing else are equal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", _tokens("window", self.window, least=1))
        object.__setattr__(self, "sinks", _tokens("sinks", self.sinks, least=0))
        object.__setattr__(self, "tail", _tokens("tail", self.tail, least=0))
        if not self.layer_modes:
            raise ScheduleError("layer_modes is empty; a schedule names a mode for each layer")
        modes = []
        for layer, mode in enumerate(self.layer_modes):
            try:
                modes.append(LayerMode(mode))
            except ValueError:
                raise ScheduleError(
                    f"layer_modes[{layer}] is {mode}; modes are 0 (full), 1 (window in prefill) and 2 (window always)"
                ) from None
        object.__setattr__(self, "layer_modes", tuple(modes))
        if not self.model.kinds:
            object.__setattr__(self, "model", ModelLayers.of(len(modes)))
        if self.model.n_layer != len(modes):
            raise ScheduleError(f"layer_modes has {len(modes)} entries, but the model has {self.model.n_layer} layers")
        if reason := self.model.refusal(modes):
            raise ScheduleError(reason)

    @classmethod
    def full(cls, layers: ModelLayers | int) -> Schedule:
        """Every layer as the model has it, full attention for those that can slide: what no schedule means."""
        model = ModelLayers.of(layers)
        return cls(window=1, sinks=0, layer_modes=(LayerMode.FULL,) * model.n_layer, model=model)

    @property
    def n_layer(self) -> int:
        return len(self.layer_modes)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: modes as numbers."""
        modes = [int(mode) for mode in self.layer_modes]
        return {"window": self.window, "sinks": self.sinks, "tail": self.tail, "layer_modes": modes}

    @property
    def is_full(self) -> bool:
        """True if no layer slides; window and sinks then have no effect."""
        return all(mode is LayerMode.FULL for mode in self.layer_modes)

    @property
    def is_naive(self) -> bool:
        """True for a window, always, in all layers that can slide, and nothing else."""
        return self.sinks == 0 and self.layers(LayerMode.ALWAYS) == self.model.sliding

    @property
    def has_ring(self) -> bool:
        """True if some layer's KV cache is a ring."""
        return LayerMode.ALWAYS in self.layer_modes

    @property
    def active_tail(self) -> int:
        """The tail, where some layer has a use for it; else 0."""
        return self.tail if LayerMode.PREFILL in self.layer_modes else 0

    def has_cells_of(self, other: Schedule) -> bool:
        """True if a cache that was filled under `other` can be used under this one: they differ by the tail alone."""
        return replace(self, tail=other.tail) == other

    def layers(self, mode: LayerMode) -> tuple[int, ...]:
        """Indices of the layers with this mode, of those that can slide."""
        return tuple(i for i in self.model.sliding if self.layer_modes[i] is mode)

    def config(self) -> SWAAConfig:
        """The same schedule in the paper's terms; `config().schedule(model)` gives it back."""
        if self.is_full:
            return SWAAConfig()
        prefill, always = self.layers(LayerMode.PREFILL), self.layers(LayerMode.ALWAYS)
        return SWAAConfig(
            sliding_window_size=self.window,
            keep_first=self.sinks,
            force_fa_decode=prefill if prefill and always else bool(prefill),
            non_sliding_layers=self.layers(LayerMode.FULL),
            prompt_tail=self.tail,
        )

    def ring_cells(self, n_ctx: int, *, n_ubatch: int = 512, n_seq_max: int = 1, unified: bool = False) -> int:
        """Cells of an `ALWAYS` layer's cache, per stream: pad((k + W)(n_seq_max if unified) + n_ubatch), at most full.

        `n_ctx` as the user gives it, in tokens for all sequences together.
        """
        held = (self.sinks + self.window) * (n_seq_max if unified else 1) + n_ubatch
        return min(pad_cells(held), full_cells(n_ctx, n_seq_max=n_seq_max, unified=unified))

    def kv_cells(
        self, n_ctx: int, *, n_ubatch: int = 512, n_seq_max: int = 1, unified: bool = False, swa_full: bool = False
    ) -> tuple[int, ...]:
        """Cells of each layer's KV cache, per stream; 0 for a layer without one of its own.

        swa_full: windows of the model's own have all cells too.
        """
        full = full_cells(n_ctx, n_seq_max=n_seq_max, unified=unified)
        ring = self.ring_cells(n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq_max, unified=unified)
        held = self.model.own_window * (n_seq_max if unified else 1) + n_ubatch
        own = full if swa_full else min(full, pad_cells(held))

        def cells(layer: int) -> int:
            if not self.model.reads_own_kv(layer):
                return 0
            by_kind = {LayerKind.SLIDES: ring if self.layer_modes[layer] is LayerMode.ALWAYS else full}
            return (by_kind | {LayerKind.OWN_WINDOW: own}).get(self.model.kinds[layer], 0)

        return tuple(cells(layer) for layer in range(self.n_layer))

    def prefill_pairs(self, n_tokens: int) -> tuple[int, ...]:
        """Query-key pairs that each layer must attend to while reading a prompt of `n_tokens` from an empty cache."""
        own = window_pairs(n_tokens, self.model.own_window, 0)
        full, windowed = full_pairs(n_tokens), window_pairs(n_tokens, self.window, self.sinks)
        n_windowed = max(0, n_tokens - self.tail)
        with_tail = window_pairs(n_windowed, self.window, self.sinks) + full - full_pairs(n_windowed)
        pairs = {LayerMode.FULL: full, LayerMode.PREFILL: with_tail, LayerMode.ALWAYS: windowed}
        return self._each_layer(pairs, own)

    def tail_pairs(self, n_tokens: int) -> int:
        """How many of these pairs, over all layers, there are for the tail alone."""
        return sum(self.prefill_pairs(n_tokens)) - sum(replace(self, tail=0).prefill_pairs(n_tokens))

    def decode_keys(self, n_tokens: int) -> tuple[int, ...]:
        """Keys that each layer reads for one generated token at position `n_tokens` (the token itself included)."""
        everything = n_tokens + 1
        keys = dict.fromkeys(LayerMode, everything)
        keys[LayerMode.ALWAYS] = window_keys(n_tokens, self.window, self.sinks)
        return self._each_layer(keys, window_keys(n_tokens, self.model.own_window, 0))

    def _each_layer(self, by_mode: Mapping[LayerMode, int], own_window: int) -> tuple[int, ...]:
        """A figure of each layer: by its mode if it can slide, else that of the model's own window, or 0."""
        of_kind = {LayerKind.OWN_WINDOW: own_window}
        return tuple(
            by_mode[mode] if kind is LayerKind.SLIDES else of_kind.get(kind, 0)
            for mode, kind in zip(self.layer_modes, self.model.kinds, strict=True)
        )


DRAFT_WINDOW = 512
"""Tokens that a drafted one sees where the user does not say, sinks included: a multiple of what attention pads to."""

MAX_DRAFT = 16
"""Tokens that are drafted for one pass, at most."""


def default_n_ubatch(schedule: Schedule, *, gpu: bool) -> int:
    """Tokens of an ubatch where the user does not say: llama.cpp's 512, and 1024 for windowed layers on a GPU.

    Measured (docs/results.md): on an H100 full attention is fastest with 512, windowed prefill gains 7 to 10 % with
    1024 and 10 to 15 % with 2048, for more memory; a CPU gains nothing.
    """
    return 1024 if gpu and not schedule.is_full else 512


def _tokens(name: str, value: object, *, least: int) -> int:
    number = _integer(name, value)
    if not least <= number <= MAX_TOKENS:
        raise ScheduleError(f"{name} is {number}; it must be between {least} and {MAX_TOKENS}")
    return number


def _layers(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ScheduleError(f"{name} must be a list of layer numbers, not {value!r}")
    layers = {_integer(f"an entry of {name}", item) for item in value}
    if layers and min(layers) < 0:
        raise ScheduleError(f"{name} lists layer {min(layers)}; layers are counted from 0")
    return tuple(sorted(layers))


def _integer(name: str, value: object) -> int:
    # bool is an int to Python, but `keep_first=True` is a mistake; numpy integers are fine.
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise ScheduleError(f"{name} must be a whole number, not {value!r}")
