"""A `Llama` that generates: upstream's generator, step by step, and ended so that the context holds what it says.

Knows when upstream's generator runs, and what each step leaves behind; how a token is evaluated, `llama` knows.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from typing import Any

import numpy as np

from swaa_local.engine.draft_control import DraftControl
from swaa_local.engine.interrupt import DeferInterrupt
from swaa_local.engine.limits import check_number
from swaa_local.engine.restoring import RestoringLlama
from swaa_local.engine.run_stats import RunClock, RunStats
from swaa_local.errors import BusyError, ClosedError, ContextChanged


class GeneratingLlama(RestoringLlama):
    """What `llama.Llama` generates with."""

    _prompt_tail: int | None = None  # of the generation that runs, where it is not the schedule's
    _control: DraftControl | None = None  # of the generation that runs
    _generating = False
    _document_ends: tuple[int, ...] = ()  # of the generation that runs

    @property
    def last_run(self) -> RunStats | None:
        """Figures of the last `generate`, and so of every completion; None before the first."""
        return self._clock.stats() if self._clock else None

    def _tail_of_prompt(self) -> int:
        """Tokens that the next prompt ends with and that read all of it."""
        raise NotImplementedError

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Upstream's `generate`, same arguments: the prompt is evaluated as prefill, all that follows as decode.

        Keywords of ours: prompt_tail, a tail of this prompt's own instead of the schedule's, 0 for none; document_ends,
        rising positions in `tokens` where a text ends that other prompts may begin with, for the `PrefixCache`;
        speculate, as in the constructor, for this generation.
        Tokens given to `send()` are appended after the token just yielded, and count as generated. Raises
        `ContextChanged` at the next token if another call has changed the context in between.

        However it ends, the context holds the tokens that it says, and no drafted ones.
        """
        clock = RunClock(len(tokens))
        try:
            yield from self._generate(clock, tokens, *args, **kwargs)
        finally:
            try:
                self._settle(clock)
            except KeyboardInterrupt:  # before it was shielded
                self._settle(clock)
                raise

    def read(self, tokens: Sequence[int], **kwargs: Any) -> None:
        """Evaluate a prompt as `generate` would, with its keywords, and generate nothing."""
        with closing(self.generate(tokens, **kwargs)) as generated:
            next(generated)  # chosen from the prompt's last logits, and evaluated by nobody
            assert self._clock is not None
            self._clock.generated_tokens = 0

    def _settle(self, clock: RunClock) -> None:
        """At the end of a generation, whatever ended it. A call that runs now, as one may around a generator that is
        thrown away, has an end of its own."""
        with suppress(BusyError, ClosedError), self._guard.step(), DeferInterrupt():
            if self._clock is clock:
                self._end_step()
            self._drop_ahead()

    def _end_step(self) -> None:
        """What runs next is of no generation."""
        self._generating, self._control, self._document_ends = False, None, ()
        self._sampler_to_keep = None

    def _generate(
        self, clock: RunClock, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        prompt_tail = kwargs.pop("prompt_tail", None)
        if prompt_tail is not None:
            check_number("prompt_tail", prompt_tail)
        control = self._new_control(kwargs.pop("speculate", None))
        document_ends = tuple(kwargs.pop("document_ends", ()))
        arguments = inspect.signature(super().generate).bind(list(tokens), *args, **kwargs)
        given = arguments.arguments
        given["stopping_criteria"] = self._callbacks.stopping_criteria(given.get("stopping_criteria"))
        upstream = super().generate(*arguments.args, **arguments.kwargs)
        text = [*([] if given.get("reset", True) else self.input_ids[: self.n_tokens].tolist()), *given["tokens"]]
        sent: Sequence[int] | None = None
        sampler: Any = None
        left: tuple[int, int] | None = None  # n_tokens and changes when the caller got the last token
        while True:
            with self._guard.work():
                if left is not None:
                    self._check_unchanged(left, text[:-1])
                    self._active_sampler = sampler
                if sent:
                    # Upstream takes sent tokens for a draft and samples over them: start it anew behind them, with its
                    # sampler.
                    self._sampler_to_keep = self._active_sampler
                    self.n_tokens = len(text) - 1
                    given.update(tokens=[text[-1], *sent], reset=False)
                    upstream = super().generate(*arguments.args, **arguments.kwargs)
                    text += sent
                self._clock, self._generating, self._prompt_tail = clock, True, prompt_tail
                self._control = control
                self._document_ends = document_ends
                started = time.perf_counter()
                try:
                    if left is None and given.get("reset", True):
                        with self._guard.step():
                            self._take_up(text)
                            if self.prefixes:
                                self.prefixes.begin(text, document_ends, tail=self._tail_of_prompt())
                    token = next(upstream)
                except StopIteration:
                    return
                except BaseException:
                    self._settle(clock)  # here too: Ctrl-C may come where it is done at last
                    raise
                finally:
                    clock.add_time(time.perf_counter() - started)
                    self._end_step()
                left, sampler = (self.n_tokens, self._changes), self._active_sampler
            clock.has_read = True
            clock.generated_tokens += 1
            text.append(token)
            sent = yield token

    def _check_unchanged(self, left: tuple[int, int], tokens: list[int]) -> None:
        """Raise `ContextChanged` unless the context is as it was `left`, with these tokens, or is so again."""
        n_tokens, changes = left
        restored = self._changes == changes or np.array_equal(self.input_ids[: len(tokens)], tokens)
        if self.n_tokens != n_tokens or not restored:
            raise ContextChanged
