"""Bounds of the numbers that the engine takes: beyond them C's integers wrap around, or llama.cpp aborts."""

from __future__ import annotations

import operator
import os

from swaa_local.errors import OutOfRange
from swaa_local.schedule.config import MAX_TOKENS

_INT32 = (1 << 31) - 1

MAX_LAYERS = _INT32
"""That can be asked for on a GPU."""

MAX_THREADS = max(512, os.cpu_count() or 1)
"""GGML_MAX_N_THREADS of ggml.h; where there are more CPUs, as many."""

# By the constructor's names; least and most. Negative threads and GPU layers leave the choice to llama.cpp.
_BOUNDS = {
    "n_ctx": (0, MAX_TOKENS),
    "n_batch": (1, MAX_TOKENS),
    "n_ubatch": (0, MAX_TOKENS),
    "n_threads": (-1, MAX_THREADS),
    "n_threads_batch": (-1, MAX_THREADS),
    "n_gpu_layers": (-_INT32, _INT32),
    "main_gpu": (-_INT32, _INT32),
    "last_n_tokens_size": (-1, MAX_TOKENS),
    "yarn_orig_ctx": (0, MAX_TOKENS),
    "prompt_tail": (0, MAX_TOKENS),
    "draft_window": (0, MAX_TOKENS),
    "seed": (-1, 1 << 32),  # upstream draws seeds up to 2**32, which is 0 to llama.cpp
    # enums of llama.h
    "split_mode": (0, 3),
    "pooling_type": (-1, 4),
    "attention_type": (-1, 1),
    "rope_scaling_type": (-1, 3),
}


def check_number(name: str, value: object) -> int:
    """The value as an int. Raises `OutOfRange` for what is no whole number, or not one that the engine takes."""
    least, most = _BOUNDS[name]
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OutOfRange(f"{name} must be a whole number, not {value!r}") from None
    if not least <= number <= most:
        raise OutOfRange(f"{name} is {number}; it must be between {least} and {most}")
    return number


def check_numbers(given: dict[str, object]) -> None:
    """`check_number` for those of these arguments that have bounds and are not None."""
    for name, value in given.items():
        if name in _BOUNDS and value is not None:
            check_number(name, value)
