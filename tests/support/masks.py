"""Attention masks straight from the definition of a schedule (DESIGN section 2), for all references in the tests.

Query at position p1, key at position p0, both from 0; `visible` means that the query attends to the key:

    full:          p0 <= p1
    window(W, k):  p0 <= p1  and  (p1 - p0 < W  or  p0 < k)

FULL layers are always full, ALWAYS layers always window, PREFILL layers window for queries that are prefilled and full
for queries that are decoded. Layers with a window of the model's own see window(own, 0), whatever the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.support.tiny import ALWAYS, FULL, PREFILL


class Sched(NamedTuple):
    """A schedule as tests write it; also accepted by `write_tiny_gguf` and `EngineModel.set_schedule`."""

    window: int
    sinks: int
    layer_modes: tuple[int, ...]
    own: tuple[int, ...] = ()
    """The model's own window of each layer, 0 for none: no part of the schedule, but of what is seen."""


def full_schedule(n_layer: int) -> Sched:
    return Sched(1 << 30, 0, (FULL,) * n_layer)


def visible(schedule: Sched, layer: int, p1: np.ndarray, p0: np.ndarray, decode: np.ndarray) -> np.ndarray:
    """(query, key) booleans of one layer. p1, decode: position and phase of each query; p0: position of each key."""
    p1, p0, decode = p1[:, None], p0[None, :], decode[:, None]
    full = p0 <= p1
    window = full & ((p1 - p0 < schedule.window) | (p0 < schedule.sinks))
    if schedule.own and schedule.own[layer]:
        return full & (p1 - p0 < schedule.own[layer])
    mode = schedule.layer_modes[layer]
    return {FULL: full, PREFILL: np.where(decode, full, window), ALWAYS: window}[mode]


def layer_masks(schedule: Sched, n: int, prompt_end: int) -> list[np.ndarray]:
    """One (n, n) mask per layer for a sequence of n tokens, of which those from `prompt_end` on are decoded."""
    p = np.arange(n)
    return [visible(schedule, layer, p, p, p >= prompt_end) for layer in range(len(schedule.layer_modes))]
