"""Rules of a schedule: layer modes, validation, layer lists, and what a schedule costs. Known schedules: `presets`.

Pure: imports nothing of the rest of the package and knows nothing of files, of the engine or of the command line.
Source of the semantics: SWAA, arXiv 2512.10411.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from swaa_local.errors import ScheduleError
from swaa_local.schedule.cost import full_cells, full_pairs, pad_cells, window_keys, window_pairs

# The engine's own limit (llama-swaa.cpp): sums of positions, windows and sinks must fit a 32-bit position.
MAX_TOKENS = 1 << 30

DEFAULT_N_BATCH = 2048
"""Tokens of a `llama_decode` call where the user does not say, as of llama.cpp's own tools."""


class LayerMode(IntEnum):
    """What a layer sees; the values are those of the GGUF and of the engine."""

    FULL = 0
    """Everything, always."""
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

    def schedule(self, n_layer: int, *, clip_layers: bool = False) -> Schedule:
        """The mode of each of the model's `n_layer` layers.

        Layers listed past the model's last one are an error (the paper's code ignores them) unless `clip_layers` drops
        them knowingly. Without a window, all layers are full (`Schedule.is_full`).
        """
        if n_layer < 1:
            raise ScheduleError(f"a model has at least 1 layer, not {n_layer}")
        full = self._within("non_sliding_layers", self.non_sliding_layers, n_layer, clip_layers)
        decode: bool | frozenset[int]
        if isinstance(self.force_fa_decode, bool):
            decode = self.force_fa_decode
        else:
            decode = self._within("force_fa_decode", self.force_fa_decode, n_layer, clip_layers)
        if self.sliding_window_size is None:
            return Schedule.full(n_layer)

        def mode(layer: int) -> LayerMode:
            if layer in full:
                return LayerMode.FULL
            prefill_only = decode if isinstance(decode, bool) else layer in decode
            return LayerMode.PREFILL if prefill_only else LayerMode.ALWAYS

        modes = tuple(mode(i) for i in range(n_layer))
        return Schedule(self.sliding_window_size, self.keep_first, modes, self.prompt_tail)

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

    Raises `ScheduleError` for values outside the format (a window or sinks out of range, no layers, an unknown mode).
    """

    window: int
    """W in tokens, the query token included; at least 1 even where no layer slides."""
    sinks: int
    """k, in tokens."""
    layer_modes: tuple[LayerMode, ...]
    """One per layer."""
    tail: int = 0
    """T in tokens: the last ones of each prompt, which `PREFILL` layers read with full attention."""

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

    @classmethod
    def full(cls, n_layer: int) -> Schedule:
        """Full attention in every layer, which is what no schedule means."""
        return cls(window=1, sinks=0, layer_modes=(LayerMode.FULL,) * n_layer)

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
        """Indices of the layers with this mode."""
        return tuple(i for i, m in enumerate(self.layer_modes) if m is mode)

    def config(self) -> SWAAConfig:
        """The same schedule in the paper's terms; `config().schedule(n_layer)` gives it back."""
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
        self, n_ctx: int, *, n_ubatch: int = 512, n_seq_max: int = 1, unified: bool = False
    ) -> tuple[int, ...]:
        """Cells of each layer's KV cache, per stream."""
        full = full_cells(n_ctx, n_seq_max=n_seq_max, unified=unified)
        ring = self.ring_cells(n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq_max, unified=unified)
        return tuple(ring if mode is LayerMode.ALWAYS else full for mode in self.layer_modes)

    def prefill_pairs(self, n_tokens: int) -> tuple[int, ...]:
        """Query-key pairs that each layer must attend to while reading a prompt of `n_tokens` from an empty cache."""
        full, windowed = full_pairs(n_tokens), window_pairs(n_tokens, self.window, self.sinks)
        n_windowed = max(0, n_tokens - self.tail)
        with_tail = window_pairs(n_windowed, self.window, self.sinks) + full - full_pairs(n_windowed)
        pairs = {LayerMode.FULL: full, LayerMode.PREFILL: with_tail, LayerMode.ALWAYS: windowed}
        return tuple(pairs[mode] for mode in self.layer_modes)

    def tail_pairs(self, n_tokens: int) -> int:
        """How many of these pairs, over all layers, there are for the tail alone."""
        return sum(self.prefill_pairs(n_tokens)) - sum(replace(self, tail=0).prefill_pairs(n_tokens))

    def decode_keys(self, n_tokens: int) -> tuple[int, ...]:
        """Keys that each layer reads for one generated token at position `n_tokens` (the token itself included)."""
        everything = n_tokens + 1
        windowed = window_keys(n_tokens, self.window, self.sinks)
        return tuple(windowed if mode is LayerMode.ALWAYS else everything for mode in self.layer_modes)


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
