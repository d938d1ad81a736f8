"""A `Llama` that drafts: tokens that are proposed, read by full attention several at once, and chosen one by one.

Knows cells and logits; nothing of whether a draft pays (`draft_control`), nor of prompts and callers (`llama`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from llama_cpp import llama_cpp as _c

from swaa_local.engine import log as engine_log
from swaa_local.engine import native
from swaa_local.engine.context_length import gpu_layers
from swaa_local.engine.draft_control import Costs, DraftControl, Source, Speculate, check_speculate, look_up
from swaa_local.engine.interrupt import DeferInterrupt
from swaa_local.engine.run_stats import RunClock
from swaa_local.engine.upstream import LoadedLlama
from swaa_local.schedule.config import MAX_DRAFT
from swaa_local.schedule.cost import CELL_PADDING

_EXACT_PASS = 8
"""Tokens that the CPU's attention reads with one kernel, in which a token's bits are those of a pass of its own
(FA_DECODE_MAX_TOKENS of flash-attn-decode.cpp)."""


@dataclass
class Ahead:
    """Drafted tokens that full attention has read behind the `at` tokens of the context, with logits for each.

    tokens: those that are not chosen yet.
    """

    at: int
    source: Source
    tokens: list[int]
    n_accepted: int = 0

    @property
    def n_drafted(self) -> int:
        return self.n_accepted + len(self.tokens)


class DraftingLlama(LoadedLlama):
    """What `llama.Llama` decodes a generated token with. The context holds what was chosen, and never a draft: tokens
    that were read ahead have cells and logits alone."""

    _clock: RunClock | None = None
    _ahead: Ahead | None = None
    _n_logits = 0  # last positions whose logits the context has
    _rows_ahead = 0  # logits that it has behind these

    @functools.cached_property
    def _costs(self) -> Costs:
        return Costs()

    def _new_control(self, speculate: Speculate | None) -> DraftControl | None:
        """What plans the drafts of a generation; None: there are none. speculate: of the call, else of its caller."""
        asked = self._asked() if speculate is None else check_speculate(speculate)
        asked = self.speculate if asked is None else asked
        self._check_drafts(asked)
        if asked is False or self.context_params.embeddings or self.is_recurrent:
            return None
        return DraftControl(self._costs if asked == "auto" else None)

    def _decode(self, tokens: list[int], log: engine_log.EngineLog, n_logits: int, n_ahead: int = 0) -> None:
        """One `llama_decode` call and its bookkeeping. n_logits: 0, 1 or all of them.

        n_ahead: so many of the last tokens are not in the context yet, though they have cells and logits.
        """
        raise NotImplementedError

    def _take_ahead(self, tokens: list[int], control: DraftControl | None) -> bool:
        """Whether this token was drafted and read already; then it is in the context now."""
        with DeferInterrupt():
            ahead, self._ahead = self._ahead, None
            if ahead is None or control is None or ahead.at != self.n_tokens:
                return False
            right = tokens[0] == ahead.tokens[0]
            if right:
                del ahead.tokens[0]
                ahead.n_accepted += 1
                ahead.at += 1
                self.n_tokens += 1
                self._n_logits += 1
                self._rows_ahead -= 1
                if self._clock:
                    self._clock.accepted_tokens += 1
            if right and ahead.tokens:
                self._ahead = ahead
            else:
                control.add_outcome(ahead.source, ahead.n_accepted, ahead.n_drafted)
        return right

    def _go_back(self, n_tokens: int) -> int:
        """Hold the first `n_tokens` tokens, or as many of them as the context can go back to; how many these are."""
        raise NotImplementedError

    def _drop_ahead(self) -> None:
        """Take what was drafted, or read and not noted, out of the cells: these are what the context says it holds."""
        self._go_back(self.n_tokens)

    def _decode_ahead(self, token: int, control: DraftControl, log: engine_log.EngineLog) -> None:
        """Decode this token, and behind it what may be said next: logits of all of these cost one pass."""
        n_past = self.n_tokens
        self.input_ids[n_past] = token
        # One ubatch; and of what a ring overwrites, n_ubatch tokens can be taken back.
        limit = min(self._most_drafted, self.n_ctx() - n_past - 1, self.context_params.n_ubatch - 1)
        if self._is_exact:  # threads divide the cells by their padded number, which is to be that of this token alone
            limit = min(limit, -(n_past + 1) % CELL_PADDING)
        repeat, follows = look_up(self.input_ids[: n_past + 1])
        found = follows[:limit].tolist()
        found = found[: next((i for i, each in enumerate(found) if self.is_end(each)), None)]
        hides = 0 < self.draft_window <= n_past
        plan = control.plan(n_past, {repeat: len(found), Source.WINDOW: limit if hides else 0})
        tokens = found[: plan.n]
        if plan.n and plan.source is Source.WINDOW:
            started = time.perf_counter()
            tokens = self._draft(token, plan.n)
            control.add_drafted(len(tokens), time.perf_counter() - started)
        started = time.perf_counter()
        with DeferInterrupt():
            with self._threads_of_decode() if tokens else nullcontext():
                self._decode([token, *tokens], log, 1 + len(tokens), n_ahead=len(tokens))
                _c.llama_synchronize(self.ctx)
            control.add_pass(1 + len(tokens), time.perf_counter() - started)
            if tokens:
                self._ahead = Ahead(self.n_tokens, plan.source, tokens)
                if self._clock:
                    self._clock.drafted_tokens += len(tokens)
            elif plan.n:  # nothing came of the draft: it counts, or each token would try it again
                control.add_outcome(plan.source, 0, 1)

    @functools.cached_property
    def _is_exact(self) -> bool:
        """Whether a pass of several tokens is to give each the bits that it has alone: on CPUs."""
        return gpu_layers(self.model_params.n_gpu_layers, workers=bool(self.rpc_servers)) == 0

    @property
    def _most_drafted(self) -> int:
        return _EXACT_PASS - 1 if self._is_exact else MAX_DRAFT

    @contextmanager
    def _threads_of_decode(self) -> Iterator[None]:
        """A pass of several tokens with as many threads as one of one: a sum's parts depend on it, and so its bits."""
        try:
            _c.llama_set_n_threads(self.ctx, self.n_threads, self.n_threads)
            yield
        finally:
            _c.llama_set_n_threads(self.ctx, self.n_threads, self.n_threads_batch)

    def _draft(self, token: int, n: int) -> list[int]:
        """Up to n tokens that the model would say after `token`, which follows what the context holds, if it saw the
        drafts' window alone.

        They end before one that would end the answer. The cells are as before; there are no logits any more.
        """
        n_past, tokens = self.n_tokens, [token]
        with DeferInterrupt() as shield:
            self._require_eval(True)
            self._n_logits = 0
            native.llama_swaa_set_draft_start(self.ctx, 0, n_past)
            try:
                with self._draft_sampler() as sample:
                    while len(tokens) <= n and not shield.raises:
                        batch = self._make_batch(tokens[-1:], n_past + len(tokens) - 1, 1)
                        if _c.llama_decode(self.ctx, batch) != 0:
                            break
                        drafted = sample()
                        if self.is_end(drafted):
                            break
                        tokens.append(drafted)
            finally:
                native.llama_swaa_set_draft_start(self.ctx, 0, -1)
                self._keep_cells(n_past)
        return tokens[1:]
