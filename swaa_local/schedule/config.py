"""Rules of a schedule: layer modes, validation, layer lists, and what a schedule costs. Known schedules: `presets`.

Pure: imports nothing of the rest of the package and knows nothing of files, of the engine or of the command line.
Source of the semantics: SWAA, arXiv 2512.10411.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

KEY_PREFIX = "swaa."
KEY_VERSION = "swaa.version"
KEY_WINDOW = "swaa.window"
KEY_SINKS = "swaa.sinks"
KEY_LAYER_MODES = "swaa.layer_modes"
SCHEDULE_VERSION = 1

# The engine's own limit (llama-swaa.cpp): sums of positions, windows and sinks must fit a 32-bit position.
MAX_TOKENS = 1 << 30

DEFAULT_N_BATCH = 2048
"""Tokens of a `llama_decode` call where the user does not say, as of llama.cpp's own tools."""

# llama.cpp pads contexts and rings to this number of cells.
CELL_PADDING = 256

# KV cache types by llama.cpp's names: (elements in a block, bytes of a block).
KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
}


class SWAAError(Exception):
    """Base of the library's errors; the message is one sentence for the user. exit_code: of a command that it ends."""

    exit_code = 1


class ScheduleError(SWAAError, ValueError):
    """A schedule that makes no sense, or not for this model."""


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

        return Schedule(self.sliding_window_size, self.keep_first, tuple(mode(i) for i in range(n_layer)))

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", _tokens("window", self.window, least=1))
        object.__setattr__(self, "sinks", _tokens("sinks", self.sinks, least=0))
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

    @property
    def is_full(self) -> bool:
        """True if no layer slides; window and sinks then mean nothing."""
        return all(mode is LayerMode.FULL for mode in self.layer_modes)

    @property
    def has_ring(self) -> bool:
        """True if some layer's KV cache is a ring."""
        return LayerMode.ALWAYS in self.layer_modes

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
        )

    def ring_cells(self, n_ctx: int, *, n_ubatch: int = 512, n_seq_max: int = 1, unified: bool = False) -> int:
        """Cells of an `ALWAYS` layer's cache, per stream: pad((k + W)(n_seq_max if unified) + n_ubatch), at most full.

        `n_ctx` as the user gives it, in tokens for all sequences together.
        """
        held = (self.sinks + self.window) * (n_seq_max if unified else 1) + n_ubatch
        return min(_pad(held), full_cells(n_ctx, n_seq_max=n_seq_max, unified=unified))

    def kv_cells(
        self, n_ctx: int, *, n_ubatch: int = 512, n_seq_max: int = 1, unified: bool = False
    ) -> tuple[int, ...]:
        """Cells of each layer's KV cache, per stream."""
        full = full_cells(n_ctx, n_seq_max=n_seq_max, unified=unified)
        ring = self.ring_cells(n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq_max, unified=unified)
        return tuple(ring if mode is LayerMode.ALWAYS else full for mode in self.layer_modes)

    def prefill_pairs(self, n_tokens: int) -> tuple[int, ...]:
        """Query-key pairs that each layer must attend to while prefilling `n_tokens` from an empty cache."""
        full, windowed = full_pairs(n_tokens), window_pairs(n_tokens, self.window, self.sinks)
        return tuple(full if mode is LayerMode.FULL else windowed for mode in self.layer_modes)

    def decode_keys(self, n_tokens: int) -> tuple[int, ...]:
        """Keys that each layer reads for one generated token at position `n_tokens` (the token itself included)."""
        everything = n_tokens + 1
        windowed = window_keys(n_tokens, self.window, self.sinks)
        return tuple(windowed if mode is LayerMode.ALWAYS else everything for mode in self.layer_modes)


def default_n_ubatch(schedule: Schedule, *, gpu: bool) -> int:
    """Tokens of an ubatch where the user does not say: llama.cpp's 512, and 1024 for windowed layers on a GPU.

    Measured (docs/benchmarks.md): on an H100 full attention is fastest with 512, windowed prefill gains 7 to 10 % with
    1024 and 10 to 15 % with 2048, for more memory; a CPU gains nothing.
    """
    return 1024 if gpu and not schedule.is_full else 512


def full_cells(n_ctx: int, *, n_seq_max: int = 1, unified: bool = False) -> int:
    """Cells of a full layer's KV cache, per stream (llama-context.cpp pads the context and each sequence's share)."""
    if n_ctx < 1:
        raise ScheduleError(f"a context has at least 1 token, not {n_ctx}")
    cells = _pad(n_ctx)
    return cells if unified else _pad(cells // n_seq_max)


def kv_bytes(cells: int, n_embd_k: int, n_embd_v: int, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of one layer's K and V for `cells` cells of n_head_kv * head_dim elements each."""
    return cells * (_row_bytes(n_embd_k, type_k) + _row_bytes(n_embd_v, type_v))


def _row_bytes(n_elements: int, kv_type: str) -> int:
    try:
        block, size = KV_TYPES[kv_type.lower()]
    except KeyError:
        raise SWAAError(f"unknown KV cache type {kv_type!r}; known are {', '.join(KV_TYPES)}") from None
    if n_elements % block:
        raise SWAAError(f"KV cache type {kv_type} needs rows of a multiple of {block} elements, not {n_elements}")
    return n_elements // block * size


def full_pairs(n_tokens: int) -> int:
    """Visible query-key pairs of causal full attention over `n_tokens`."""
    return n_tokens * (n_tokens + 1) // 2


def window_keys(position: int, window: int, sinks: int) -> int:
    """Keys that the query at `position` sees through the window: p0 <= p1 and (p1 - p0 < W or p0 < k)."""
    return min(position + 1, window + min(sinks, max(0, position + 1 - window)))


def window_pairs(n_tokens: int, window: int, sinks: int) -> int:
    """Sum of `window_keys` over positions 0 to n_tokens - 1."""
    inside = min(n_tokens, window)
    outside = n_tokens - inside
    # Past the window a query sees W keys and the sinks that the window has left behind: 1, 2, ... up to k.
    growing = min(outside, sinks)
    return full_pairs(inside) + outside * window + full_pairs(growing) + (outside - growing) * sinks


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


def _pad(cells: int) -> int:
    return -(-cells // CELL_PADDING) * CELL_PADDING
