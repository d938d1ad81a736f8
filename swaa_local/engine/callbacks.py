"""The user's code that runs inside llama.cpp's calls, and what of the user's becomes a sampler: their errors are kept.

ctypes prints what a callback raises and goes on with whatever it left; llama.cpp takes a sampler that could not be made
and crashes at the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_cpp import LogitsProcessorList
from llama_cpp import llama_cpp as _c

from swaa_local.engine.guard import Guard
from swaa_local.errors import GrammarError


class Callbacks:
    """Logits processors and stopping criteria of one `Llama`."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._error: BaseException | None = None
        self._processing = True

    def logits_processors(self, processors: Callable[..., Any] | None) -> LogitsProcessorList | None:
        """The same, but what one of them raises waits for `raise_error`, and the others are not called any more."""
        if processors is None:
            return None

        def process(input_ids: Any, scores: Any) -> Any:
            if self._error is None and self._processing:
                try:
                    return processors(input_ids, scores)
                except BaseException as error:
                    self._error = error
            return scores

        return LogitsProcessorList([process])

    @contextmanager
    def no_processors(self) -> Iterator[None]:
        """While this is open, the user's logits processors are not called, and leave the logits as they are."""
        self._processing = False
        try:
            yield
        finally:
            self._processing = True

    def raise_error(self) -> None:
        """Raise what a logits processor raised since this was last called."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def stopping_criteria(self, criteria: Callable[..., bool] | None) -> Callable[..., bool] | None:
        """The same, but they cannot change the context that the generator goes on with."""
        if criteria is None:
            return None

        def stop(input_ids: Any, logits: Any) -> bool:
            with self._guard.step():
                return criteria(input_ids, logits)

        return stop


def check_sampler(sampler: Any) -> None:
    """Raise `GrammarError` if a part of this `LlamaSampler` could not be made, which only happens to grammars."""
    chain = sampler.sampler
    if not all(_c.llama_sampler_chain_get(chain, i) for i in range(_c.llama_sampler_chain_n(chain))):
        raise GrammarError("llama.cpp cannot read the grammar; it says why on stderr")
