"""What a generation cost: tokens and seconds. Knows nothing of models."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunStats:
    """Figures of one generation.

    prompt_tokens includes cached_tokens, whose keys and values were in the cache already. prefill_s ends with the first
    generated token, which the prompt's last logits give; decode_s covers the others. Time that the caller spent between
    two tokens is not counted. passes: evaluations that gave the tokens after the first; fewer than these where drafts
    were accepted. has_read: the whole prompt is in the cache; without it, its reading was stopped.
    """

    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    generated_tokens: int
    decode_s: float
    passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    has_read: bool = True

    @property
    def prefill_tokens_per_s(self) -> float:
        """Evaluated prompt tokens a second; NaN if nothing was evaluated, or not all of the prompt."""
        evaluated = self.prompt_tokens - self.cached_tokens
        return evaluated / self.prefill_s if self.has_read and evaluated and self.prefill_s > 0 else math.nan

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoded tokens a second; NaN before the second generated token."""
        decoded = self.generated_tokens - 1
        return decoded / self.decode_s if decoded > 0 and self.decode_s > 0 else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """Decoded tokens of a pass; 1 without drafts, NaN before the second generated token."""
        return (self.generated_tokens - 1) / self.passes if self.passes else math.nan

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were said; NaN without any."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else math.nan


class RunClock:
    """Counts one generation while it runs."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.passes = self.drafted_tokens = self.accepted_tokens = 0
        self.has_read = False
        self._prefill_s = 0.0
        self._decode_s = 0.0

    @property
    def decoding(self) -> bool:
        """True once the prompt has given its first token."""
        return self.generated_tokens > 0

    def add_time(self, seconds: float) -> None:
        if self.decoding:
            self._decode_s += seconds
        else:
            self._prefill_s += seconds

    def stats(self) -> RunStats:
        return RunStats(
            self.prompt_tokens,
            self.cached_tokens,
            self._prefill_s,
            self.generated_tokens,
            self._decode_s,
            self.passes,
            self.drafted_tokens,
            self.accepted_tokens,
            self.has_read,
        )
