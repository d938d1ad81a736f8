"""transformers with explicit per-layer masks: the independent reference of the parity test.

The whole sequence, prompt and answer, goes through in one pass in float64 with eager attention. That is exact: keys
and values of a prompt token come from its own prefill, whatever is decoded later, and the mask of a PREFILL layer
depends on the position of the query. A hook hands every attention module the mask of its layer; layers with a sliding
window of their own keep the mask that transformers makes, and recurrent ones have none. Knows `masks`, not
`swaa_local`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.support.masks import Sched, layer_masks


class TransformersModel:
    """A checkpoint in float64 on one thread. sliding: the layers that are given masks; None: all."""

    def __init__(self, checkpoint: Path, sliding: Sequence[int] | None = None) -> None:
        torch.set_num_threads(1)
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager").eval()
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the default takes no float64
        self._masks: list[torch.Tensor] = []
        self._asked: set[int] = set()
        self._sliding = set(range(len(self.model.model.layers)) if sliding is None else sliding)
        self._attending: set[int] = set()
        for layer, module in enumerate(self.model.model.layers):
            attention = getattr(module, "self_attn", None) or getattr(module, "mixer", None)
            # else the layer is recurrent, or has no attention at all
            name = type(attention).__name__
            if attention is not None and name.endswith("Attention") and not name.endswith("LightningAttention"):
                attention.register_forward_pre_hook(self._give_mask(layer), with_kwargs=True)
                self._attending.add(layer)

    def _give_mask(self, layer: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if "attention_mask" not in kwargs:
                raise RuntimeError("transformers no longer passes attention_mask to self_attn by name")
            self._asked.add(layer)
            if layer not in self._sliding:
                given = kwargs["attention_mask"]
                if given is None or not given[0, 0, -1, 0] < 0:  # what the last query adds to the first key's score
                    raise RuntimeError(f"transformers gives layer {layer} no window of its own")
                return args, kwargs
            return args, {**kwargs, "attention_mask": self._masks[layer]}

        return hook

    def logits(self, tokens: Sequence[int], schedule: Sched, prompt_end: int) -> np.ndarray:
        """(n, n_vocab), tokens from `prompt_end` on being decoded."""
        self._masks = [
            torch.from_numpy(np.where(mask, 0.0, np.finfo(np.float64).min))[None, None]
            for mask in layer_masks(schedule, len(tokens), prompt_end)
        ]
        if len(self._masks) != len(self.model.model.layers):
            raise RuntimeError(f"a schedule of {len(self._masks)} layers for {len(self.model.model.layers)}")
        self._asked.clear()
        with torch.inference_mode():
            out = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()
        if self._asked != self._attending:
            raise RuntimeError(f"only layers {sorted(self._asked)} of {sorted(self._attending)} asked for a mask")
        return out
