"""Where a model with recurrent layers can go back to.

The state of such a layer is of one position: it cannot be cut, and so neither can the context. What it was at the ends
of some parts of a prompt is kept beside the context, and with it the rings, if there are any. Knows the engine's
partial states of a sequence; which positions are worth keeping, `llama` knows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as _c

MOST_BYTES = 256 << 20
"""Of all that is kept, or the last two if these take more; none that takes more by itself."""
_LEAST = 2
_FLAGS = _c.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_u8_p = ctypes.POINTER(ctypes.c_uint8)


def most_of_checkpoints(least: int, most: int, n_tokens: int) -> int:
    """Bytes of all that is kept at most in a context of so many tokens, where each takes from `least` to `most`."""
    if least > MOST_BYTES:
        return 0
    return min(max(MOST_BYTES, _LEAST * min(most, MOST_BYTES)), n_tokens * most)


class Checkpoints:
    """Partial states of a context's one sequence, by the number of tokens that it held."""

    def __init__(self) -> None:
        self._kept: dict[int, np.ndarray] = {}  # rising

    def keep(self, ctx: Any, n_tokens: int) -> None:
        """Keep the state that the context has now, of `n_tokens` tokens, more than of any that is kept."""
        size = _c.llama_state_seq_get_size_ext(ctx, 0, _FLAGS)
        if not 0 < size <= MOST_BYTES:
            return
        while len(self._kept) >= _LEAST and sum(each.nbytes for each in self._kept.values()) + size > MOST_BYTES:
            del self._kept[min(self._kept)]
        try:
            state = np.empty(size, np.uint8)
        except MemoryError:
            return  # it is read again, then
        if _c.llama_state_seq_get_data_ext(ctx, state.ctypes.data_as(_u8_p), size, 0, _FLAGS) != size:
            return
        self._kept[n_tokens] = state

    def cut(self, n_tokens: int) -> None:
        """Drop those of more tokens: what followed these is gone."""
        self._kept = {n: state for n, state in self._kept.items() if n <= n_tokens}

    def latest(self, n_tokens: int) -> int:
        """The most tokens, of `n_tokens` at most, that a kept state is of; 0 if there is none."""
        return max((n for n in self._kept if n <= n_tokens), default=0)

    def restore(self, ctx: Any, n_tokens: int) -> bool:
        """Give the context the state of so many tokens; False if the engine refuses. What it holds of other layers is
        the caller's to cut."""
        state = self._kept[n_tokens]
        data = state.ctypes.data_as(_u8_p)
        return bool(_c.llama_state_seq_set_data_ext(ctx, data, state.nbytes, 0, _FLAGS) == state.nbytes)
