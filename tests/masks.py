"""Attention masks straight from the definition of a schedule (DESIGN section 2), for all references in the tests.

Query at position p1, key at position p0, both from 0; `visible` means that the query attends to the key:

    full:          p0 <= p1
    window(W, k):  p0 <= p1  and  (p1 - p0 < W  or  p0 < k)

FULL layers are always full, ALWAYS layers always window, PREFILL layers window for queries that are prefilled and full
for queries that are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tiny import ALWAYS, FULL, PREFILL


class Sched(NamedTuple):
    """A schedule as tests write it; also accepted by `write_tiny_gguf` and `EngineModel.set_schedule`."""

    window: int
    sinks: int
    layer_modes: tuple[int, ...]


NAIVE_TOO_WIDE = 1 << 30


def full_schedule(n_layer: int) -> Sched:
    return Sched(NAIVE_TOO_WIDE, 0, (FULL,) * n_layer)


def full_mask(n: int) -> np.ndarray:
    """(query, key) booleans."""
    return np.tril(np.ones((n, n), bool))


def window_mask(n: int, window: int, sinks: int) -> np.ndarray:
    p1, p0 = np.arange(n)[:, None], np.arange(n)[None, :]
    return (p0 <= p1) & ((p1 - p0 < window) | (p0 < sinks))


def is_decode(n: int, prompt_end: int | Sequence[bool] | None) -> np.ndarray:
    """Phase of each position: decode from `prompt_end` on; None: all prefill; or the phases themselves."""
    if prompt_end is None:
        return np.zeros(n, bool)
    if isinstance(prompt_end, int):
        return np.arange(n) >= prompt_end
    return np.asarray(prompt_end, bool)


def layer_masks(schedule: Sched, n: int, prompt_end: int | Sequence[bool] | None) -> list[np.ndarray]:
    """One (n, n) boolean mask per layer."""
    full, window = full_mask(n), window_mask(n, schedule.window, schedule.sinks)
    by_mode = {
        FULL: full,
        PREFILL: np.where(is_decode(n, prompt_end)[:, None], full, window),
        ALWAYS: window,
    }
    return [by_mode[mode] for mode in schedule.layer_modes]
