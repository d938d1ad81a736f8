"""A schedule's masks in PyTorch, layer by layer, through transformers' attention interface.

A row holds one text or several, packed one behind the other; every token knows its text, its position there and its
phase, and sees what the engine would show it (docs/architecture.md). Dense masks go to PyTorch's SDPA, calls of flash
attention, which skip what is masked, to `varlen`. Plain causal attention is SDPA's own everywhere.

Relies on transformers: attention modules have a `layer_idx` and call what `config._attn_implementation` names.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.tune import varlen
from swaa_local.tune.request import AttentionKind
from swaa_local.tune.varlen import Texts, n_windowed

ATTENTION = "swaa_schedule"
"""The name under which transformers finds it: `from_pretrained(..., attn_implementation=ATTENTION)`."""
_CHUNK = 2048  # queries whose masks are made together
_ATTRIBUTE = "_swaa_masks"


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

    def set(self, texts: Texts, schedule: Schedule, device: Any = "cpu") -> None:
        """The masks of a row of these texts under this schedule."""
        self._modes = schedule.layer_modes
        self._by_mode = {mode: self._mask(texts, mode, schedule, device) for mode in set(schedule.layer_modes)}

    def of_layer(self, layer: int) -> Any:
        """What the layer's attention takes: a tensor (1, 1, n, n) of booleans, `varlen.Call`s, or None for causal."""
        return self._by_mode[self._modes[layer]]

    def _mask(self, texts: Texts, mode: LayerMode, schedule: Schedule, device: Any) -> Any:
        if mode is LayerMode.FULL and len(texts) == 1:
            return None
        return (varlen.calls_of if self.kind == "flash" else dense_mask)(texts, mode, schedule, device)


def dense_mask(texts: Texts, mode: LayerMode, schedule: Schedule, device: Any) -> torch.Tensor:
    """(1, 1, n, n): whether the query sees the key, by the definition."""
    lengths = torch.tensor([length for length, _ in texts])
    text = torch.arange(len(texts)).repeat_interleave(lengths).to(device)
    place = torch.arange(len(text), device=device)
    position = torch.cat([torch.arange(length) for length, _ in texts]).to(device)
    sees_all = position >= torch.tensor([n_windowed(mode, *one) for one in texts]).to(device)[text]
    mask = torch.empty(len(text), len(text), dtype=torch.bool, device=device)
    for q in place.split(_CHUNK):
        seen = (position[q, None] - position < schedule.window) | (position < schedule.sinks) | sees_all[q, None]
        mask[q] = seen & (text[q, None] == text) & (q[:, None] >= place)
    return mask[None, None]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' own attention under the mask of this layer; what the model made as a mask is not looked at.

    Without dropout, which some configs bring from pretraining: flash attention in parts has none.
    """
    mask = getattr(module, _ATTRIBUTE).of_layer(module.layer_idx)
    if isinstance(mask, tuple):
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return varlen.attention(query, key, value, mask, kwargs.get("scaling"))[None], None
    result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, **kwargs | {"dropout": 0.0}
    )
    return result


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """The model makes none of its own."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
