"""What the context of a `Llama` holds, and the batches and logits of what is evaluated in it.

Uses what `upstream.RELIED_ON` lists. Knows nothing of how the context was made, nor in which phase a token is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.engine.upstream_facts import KnownLlama
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.model_layers import ModelLayers


class HoldingLlama(KnownLlama):
    """What `upstream.LoadedLlama` evaluates in."""

    schedule: Schedule | None
    model_layers: ModelLayers
    draft_window: int

    def _keep_cells(self, n_tokens: int) -> bool:
        """Take everything behind the first `n_tokens` out of the cache; False, with nothing changed, if a ring lacks
        what they need, or the state of a recurrent layer holds more."""
        own_window = self.model_layers.own_window
        if n_tokens and own_window and self.schedule is None and self.draft_window == 0:
            # Then the cache is llama.cpp's, which does not say what its windows lack.
            held = _c.llama_memory_seq_pos_min(_c.llama_get_memory(self.ctx), 0)
            if not 0 <= held <= max(0, n_tokens - own_window + 1):
                return False
        return bool(self._ctx.kv_cache_seq_rm(-1, n_tokens, -1))

    @property
    def serves_whole(self) -> bool:
        """Whether a state of the context serves at its end only: it lacks what windows have left behind, or is that of
        recurrent layers."""
        drops_own = bool(self.model_layers.own_window) and not self.context_params.swa_full
        return self.is_recurrent or drops_own or (self.schedule is not None and self.schedule.has_ring)

    def _make_batch(self, tokens: Sequence[int], n_past: int, n_logits: int) -> Any:
        """The `llama_batch` of these tokens. n_logits: wanted, where not all are kept anyway: of none, of the last
        token, or of all."""
        every = self._logits_all or n_logits > 1
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=every)
        if not (n_logits or every or self.context_params.embeddings):
            self._batch.batch.logits[len(tokens) - 1] = False
        return self._batch.batch

    @property
    def has_all_logits(self) -> bool:
        """Whether the logits of every position are kept, not only of the last."""
        return bool(self._logits_all)

    @property
    def _lacks_logits(self) -> bool:
        """Whether a prompt that is in the cache must be evaluated again for them."""
        return bool(self._requires_eval)

    def _require_eval(self, required: bool) -> None:
        self._requires_eval = required
