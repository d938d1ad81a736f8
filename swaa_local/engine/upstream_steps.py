"""The steps of a generation of upstream's class: its sampler, and each answer as one guarded call.

Uses what `upstream.RELIED_ON` lists. Knows nothing of how the model was loaded.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as _c

from swaa_local.engine.callbacks import Callbacks, check_sampler
from swaa_local.engine.draft_control import Speculate, check_speculate
from swaa_local.engine.guard import Guard
from swaa_local.errors import PromptTooLong, SWAAError


class SteppingLlama(llama_cpp.Llama):
    """What `upstream.LoadedLlama` generates with."""

    _guard: Guard
    _callbacks: Callbacks
    _requests: threading.local
    _sampler_to_keep: Any = None

    @property
    def _active_sampler(self) -> Any:
        return self._sampler

    @_active_sampler.setter
    def _active_sampler(self, sampler: Any) -> None:
        self._sampler = sampler

    @contextmanager
    def _draft_sampler(self) -> Iterator[Callable[[], int]]:
        """A sampler that chooses as the active one would, with the same random numbers, and leaves that one as it is.

        It reads the last logits. The user's logits processors are not called: they would see tokens that are never
        said.
        """
        sampler = _c.llama_sampler_clone(self._sampler.sampler)
        try:
            with self._callbacks.no_processors():
                yield lambda: int(_c.llama_sampler_sample(sampler, self.ctx, -1))
        finally:
            _c.llama_sampler_free(sampler)

    def _restore_seed(self, seed: int) -> None:
        self._seed = seed

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._sampler_to_keep:
            return self._sampler_to_keep
        processors = self._callbacks.logits_processors(kwargs.pop("logits_processor", None))
        sampler = super()._init_sampler(*args, logits_processor=processors, **kwargs)
        check_sampler(sampler)
        return sampler

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return self._steps(super()._create_completion(*args, **kwargs))

    @contextmanager
    def _asking(self, speculate: Speculate | None) -> Iterator[None]:
        """While this is open, generations of this thread speculate so; None: as they would anyway."""
        before = self._asked()
        self._requests.speculate = before if speculate is None else check_speculate(speculate)
        try:
            yield
        finally:
            self._requests.speculate = before

    def _asked(self) -> Speculate | None:
        """What the call that runs in this thread has said of drafts."""
        return getattr(self._requests, "speculate", None)

    def _steps(self, answers: Iterator[Any]) -> Iterator[Any]:
        """The same answers, each step of which is one call of the guard's."""
        return self._guarded_steps(answers, self._asked())

    def _guarded_steps(self, answers: Iterator[Any], speculate: Speculate | None) -> Iterator[Any]:
        while True:
            with self._guard.work(), self._asking(speculate):
                try:
                    answer = next(answers)
                except StopIteration:
                    return
                except ValueError as error:
                    # Upstream counts the prompt itself, before generate() sees it.
                    counts = re.match(r"Requested tokens \((\d+)\) exceed context window", str(error))
                    if counts and not isinstance(error, SWAAError):
                        raise PromptTooLong(int(counts[1]), self._n_ctx) from None
                    raise
            yield answer

    def _has_template_handler(self) -> bool:
        """Whether chats are formatted by a template of the GGUF's, or a handler that the user gave."""
        return self.chat_handler is not None or self.chat_format in self._chat_handlers
