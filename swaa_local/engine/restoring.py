"""A `Llama` whose context comes back: from a saved state, from the cells of a prefix, or from a `PrefixCache`.

Knows cells and tokens; which of them a prompt may begin with, `prefixes` knows, and how it goes on, `llama`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as _c

from swaa_local.engine import log as engine_log
from swaa_local.engine import placement
from swaa_local.engine.checkpoints import Checkpoints
from swaa_local.engine.drafts import DraftingLlama
from swaa_local.engine.interrupt import DeferInterrupt
from swaa_local.engine.prefixes import CachedPrefixes, set_cells
from swaa_local.errors import StateError
from swaa_local.prefix_cache.store import PrefixCache, common_prefix


class RestoringLlama(DraftingLlama):
    """What `llama.Llama` holds, forgets and gets back."""

    _prompt_end = 0
    _changes = 0  # of what the context holds, by whomever
    prefixes: CachedPrefixes | None = None

    @functools.cached_property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints()

    def set_cache(self, cache: Any) -> None:
        """Take a `PrefixCache`, from which prompts then begin as far as it holds them, or one of upstream's, or None.

        To be called before the model's file can change. Not used where the logits of all positions are kept, nor for
        embeddings: the cache holds none. Raises `SWAAError` and OSError if the model's file cannot be read any more.
        """
        is_ours = isinstance(cache, PrefixCache)
        super().set_cache(None if is_ours else cache)
        has_use = is_ours and not self.has_all_logits and not self.context_params.embeddings
        self.prefixes = CachedPrefixes(self, cache, self._restore_prefix) if has_use else None

    def _forget(self, *, cells: bool = True) -> None:
        """Hold nothing any more. cells: empty the cache too; else its prefix may be reused."""
        with DeferInterrupt():
            if cells:
                self._keep_cells(0)
            self._checkpoints.cut(0)
            self.n_tokens, self._n_logits = 0, 0
            self._ahead = None
            self._require_eval(True)
            self._changes += 1

    def _go_back(self, n_tokens: int) -> int:
        kept = n_tokens
        with DeferInterrupt():
            self._ahead = None
            if not self._keep_cells(n_tokens):
                kept = self._checkpoints.latest(n_tokens)
                if not (kept and self._checkpoints.restore(self.ctx, kept) and self._keep_cells(kept)):
                    self._forget()
                    return 0
            self._checkpoints.cut(kept)
            if kept < self.n_tokens:
                self.n_tokens, self._n_logits = kept, 0
                self._require_eval(True)
                self._changes += 1
        return kept

    def _take_up(self, prompt: Sequence[int]) -> None:
        """Go back to where this prompt goes on, as far as the context can. Upstream would ask for all that they have in
        common or nothing, and Ctrl-C may stop it between the cells and their number."""
        held = self.input_ids[: self.n_tokens]
        common = common_prefix(held, np.asarray(prompt, np.int32))
        if common == self.n_tokens and (common < len(prompt) or not self._lacks_logits):
            return
        kept = min(common, len(prompt) - 1)
        self._go_back(self.prefixes.worth_keeping_from(kept, len(prompt)) if self.prefixes else kept)

    def save_state(self) -> Any:
        """Upstream's `save_state`; the state also knows where the prompt ended. Raises `StateError`."""
        with self._guard.look(), engine_log.captured(self.verbose) as log:
            self._drop_ahead()
            state = super().save_state()
        if not state.llama_state_size:
            raise StateError(placement.lost_worker(self.ctx) or log.reason or "the engine does not give its state")
        state.swaa_prompt_end = self._prompt_end
        return state

    def load_state(self, state: Any) -> None:
        """Restore a saved state. Raises `StateError`, with the context emptied, if it does not fit."""
        with self._guard.step():
            if state.n_tokens > self.n_ctx():
                raise StateError(f"the state holds {state.n_tokens} tokens but the context is {self.n_ctx()}")
            data = (ctypes.c_uint8 * state.llama_state_size).from_buffer_copy(state.llama_state)
            size = state.llama_state_size
            tokens, prompt_end = state.input_ids[: state.n_tokens], getattr(state, "swaa_prompt_end", state.n_tokens)
            self._restore(tokens, prompt_end, lambda: _c.llama_state_set_data(self.ctx, data, size) == size)
            self._restore_seed(state.seed)
            if self.has_all_logits:
                kept = min(state.n_tokens, len(state.scores))
                self.scores[:kept] = state.scores[:kept]

    def _restore(self, tokens: Any, prompt_end: int, set_state: Callable[[], bool]) -> None:
        """Hold these tokens, whose cells `set_state` brings. Raises `StateError`, with the context emptied."""
        with DeferInterrupt(), engine_log.captured(self.verbose) as log:
            self._forget(cells=False)
            if self.prefixes:
                self.prefixes.begin_read(0)
            if not set_state():
                self._forget()
                raise StateError(f"cannot restore the state: {log.reason or 'it is of another model or context'}")
            self.input_ids[: len(tokens)] = tokens
            self.n_tokens, self._prompt_end = len(tokens), prompt_end

    def restore_prefix(self, tokens: Any, cells: Any, n_tokens: int) -> None:
        """Hold the first `n_tokens` of these tokens, whose cells `engine.prefixes` has copied. Raises `StateError`."""
        with self._guard.step():
            self._restore_prefix(tokens, cells, n_tokens)

    def _restore_prefix(self, tokens: Any, cells: Any, n_tokens: int) -> None:
        with DeferInterrupt():
            self._restore(tokens, n_tokens, lambda: set_cells(self, cells))
            if not self._keep_cells(n_tokens):
                self._forget()
                raise StateError("the state does not hold what its beginning needs")
            self.n_tokens = n_tokens
