"""A schedule's masks in PyTorch, layer by layer, through transformers' attention interface.

A row holds one text or several, packed one behind the other; every token knows its text, its position there and its
phase, and sees what the engine would show it (docs/architecture.md). Dense masks go to PyTorch's SDPA, block masks to
FlexAttention, calls of flash attention to `varlen`; the last two skip what is masked. Plain causal attention is SDPA's
own everywhere.

Relies on transformers: attention modules have a `layer_idx` and call what `config._attn_implementation` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.tune import varlen
from swaa_local.tune.request import AttentionKind

ATTENTION = "swaa_schedule"
"""The name under which transformers finds it: `from_pretrained(..., attn_implementation=ATTENTION)`."""
BLOCK = 128
"""Tokens of a side of FlexAttention's blocks; rows for block masks are a multiple of it."""
_CHUNK = 16 * BLOCK  # queries whose masks are looked at together
_PADDING = -1
_ATTRIBUTE = "_swaa_masks"


@dataclass(frozen=True)
class Row:
    """What the masks depend on, each of shape (n,): the number of a token's text, -1 for padding at the end; its
    position in the text, from 0; and whether it is decoded. texts: how many tokens each has, and how many of them come
    before its first decoded one."""

    text: torch.Tensor
    position: torch.Tensor
    decoded: torch.Tensor
    texts: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: Any) -> Row:
        text, position, decoded = (tensor.to(device) for tensor in (self.text, self.position, self.decoded))
        return replace(self, text=text, position=position, decoded=decoded)

    @property
    def is_one_text(self) -> bool:
        """Whether plain causal attention is right: padding at the end is seen by padding alone."""
        return len(self.texts) == 1


def make_row(texts: Sequence[tuple[int, int]], n: int) -> Row:
    """A row of `n` tokens. texts: as `Row` has them."""
    text, position, decoded = (
        torch.full((n,), _PADDING),
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, dtype=torch.bool),
    )
    start = 0
    for number, (length, prompt_end) in enumerate(texts):
        text[start : start + length] = number
        position[start : start + length] = torch.arange(length)
        decoded[start + prompt_end : start + length] = True
        start += length
    position[start:] = torch.arange(n - start)
    return Row(text, position, decoded, tuple(texts))


def prompt_end(n_prompt: int, schedule: Schedule) -> int:
    """Prompt tokens before the tail, as the engine's programs set it."""
    return max(0, n_prompt - schedule.active_tail)


class Masks:
    """The masks of the row that goes through a model now. `attach` it once; `set` it before each forward pass, and
    leave it until the backward pass has ended: gradient checkpointing looks at it again."""

    def __init__(self, kind: AttentionKind) -> None:
        self.kind = kind
        self._modes: tuple[LayerMode, ...] = ()
        self._by_mode: dict[LayerMode, Any] = {}

    def attach(self, model: torch.nn.Module) -> None:
        """Make every attention layer of a model ask here. The model was loaded with `ATTENTION`."""
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, _ATTRIBUTE, self)

    def set(self, row: Row, schedule: Schedule) -> None:
        """The masks of this row under this schedule, on the row's device."""
        self._modes = schedule.layer_modes
        self._by_mode = {mode: self._mask(row, mode, schedule) for mode in set(schedule.layer_modes)}

    def of_layer(self, layer: int) -> Any:
        """What the layer's attention takes: a tensor (1, 1, n, n) of booleans, a `BlockMask`, `varlen.Call`s, or None
        for causal."""
        return self._by_mode[self._modes[layer]]

    def _mask(self, row: Row, mode: LayerMode, schedule: Schedule) -> Any:
        if mode is LayerMode.FULL and row.is_one_text:
            return None
        if self.kind == "flash":
            return varlen.calls_of(row.texts, mode, schedule, row.text.device)
        free = {
            LayerMode.FULL: torch.ones_like(row.decoded),
            LayerMode.PREFILL: row.decoded,
            LayerMode.ALWAYS: torch.zeros_like(row.decoded),
        }[mode]
        visible = _Visible(row, free, schedule)
        return visible.as_blocks() if self.kind == "flex" else visible.as_tensor()


def _visible(
    text: torch.Tensor,
    position: torch.Tensor,
    free: torch.Tensor,
    window: int,
    sinks: int,
    q: torch.Tensor,
    k: torch.Tensor,
) -> torch.Tensor:
    """Whether the query at place q of a row sees the key at place k: the definition, for whatever shapes broadcast."""
    seen = (position[q] - position[k] < window) | (position[k] < sinks) | free[q]
    return (text[q] == text[k]) & (k <= q) & seen


class _Visible:
    """What a query sees of its text: up to itself, in the window or among the sinks, or all if it is free."""

    def __init__(self, row: Row, free: torch.Tensor, schedule: Schedule) -> None:
        self._n = len(row)
        self._text, self._position, self._free = row.text.int(), row.position.int(), free
        self._window, self._sinks = schedule.window, schedule.sinks

    def __call__(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Of places in the row, which broadcast."""
        return _visible(self._text, self._position, self._free, self._window, self._sinks, q, k)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        places = torch.arange(self._n, device=self._free.device)
        return self(places[start:stop, None], places[None])

    def as_tensor(self) -> torch.Tensor:
        return torch.cat([self._rows(i, min(i + _CHUNK, self._n)) for i in range(0, self._n, _CHUNK)])[None, None]

    def as_blocks(self) -> BlockMask:
        """Which blocks have something to see, and which are seen whole."""
        if self._n % BLOCK:
            raise ValueError(f"a row for block masks has a multiple of {BLOCK} tokens, not {self._n}")
        some, whole = [], []
        for start in range(0, self._n, _CHUNK):
            tiles = self._rows(start, min(start + _CHUNK, self._n)).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            some.append(tiles.any(3).any(1))
            whole.append(tiles.all(3).all(1))
        whole_blocks = torch.cat(whole)
        partial_blocks = torch.cat(some) & ~whole_blocks

        # Compiled code is told apart by what it closes over: tensors and two numbers, and not this object.
        text, position, free, window, sinks = self._text, self._position, self._free, self._window, self._sinks

        def mask_mod(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return _visible(text, position, free, window, sinks, q, k)

        partial, full = _ordered(partial_blocks), _ordered(whole_blocks)
        return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(How many, which ones first) for each row of a table of booleans, as FlexAttention takes it."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None].contiguous()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' own attention under the mask of this layer; what the model made as a mask is not looked at.

    Without dropout, which some configs bring from pretraining: of the kinds only SDPA has it.
    """
    mask = getattr(module, _ATTRIBUTE).of_layer(module.layer_idx)
    if isinstance(mask, tuple):
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return varlen.attention(query, key, value, mask, kwargs.get("scaling"))[None], None
    run = flex_attention_forward if isinstance(mask, BlockMask) else sdpa_attention_forward
    result: tuple[torch.Tensor, torch.Tensor | None] = run(module, query, key, value, mask, **kwargs | {"dropout": 0.0})
    return result


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The model makes none of its own."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
