"""One answer while it is generated: tokens to pieces of thought and text, and how it ended.

The only loop over `Llama.generate` in the package. Knows tokens and thoughts; nothing of who reads the pieces.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Literal

from swaa_local.errors import ContextFull
from swaa_local.generation.loops import LoopGuard
from swaa_local.generation.template import Prompt, token_bytes
from swaa_local.generation.thinking import Piece, ThinkingSplitter
from swaa_local.llama import Llama

Finish = Literal["stop", "length", "context", "loop"]
"""The model ended its answer; it was cut at a limit; where the context is full; where it repeats itself."""


class Stream:
    """Iterate once, for the pieces. Afterwards, and while it runs:

    finish: None until it has ended by itself. text, thinking: what was said so far. thought_unfinished: it ended in a
    thought.
    """

    def __init__(
        self,
        llm: Llama,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        max_answer_tokens: int | None = None,
        max_thinking_tokens: int | None = None,
        on_token: Callable[[], None] | None = None,
        loop_guard: bool = False,
        **sampling: Any,
    ) -> None:
        """max_tokens: of thought and answer together, 0: the prompt is read; the other two: of each. loop_guard:
        end an answer that repeats itself word for word. sampling: keywords of `Llama.generate`.

        Iterating raises `PromptTooLong`.
        """
        self._llm, self._prompt, self._sampling, self._on_token = llm, prompt, sampling, on_token
        self._max_tokens = max_tokens
        self._guard = LoopGuard() if loop_guard else None
        self._limits = {False: max_answer_tokens, True: max_thinking_tokens}
        self._said = {False: "", True: ""}
        self.finish: Finish | None = None
        self.thought_unfinished = False

    @property
    def loop_tokens(self) -> int | None:
        """Tokens that are said again and again, where that ended the answer."""
        return self._guard.period if self._guard else None

    @property
    def text(self) -> str:
        return self._said[False]

    @property
    def thinking(self) -> str:
        return self._said[True]

    def __iter__(self) -> Generator[Piece, None, None]:
        splitter = ThinkingSplitter(self._prompt.closing)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        finish: Finish = "length"
        if self._max_tokens == 0:
            self._llm.read(self._prompt.tokens, **self._sampling)
            self.finish = finish
            return
        try:
            with closing(self._llm.generate(self._prompt.tokens, **self._sampling)) as tokens:
                counts = {False: 0, True: 0}
                for token in tokens:
                    if self._on_token:
                        self._on_token()
                    if self._llm.is_end(token):
                        finish = "stop"
                        break
                    counts[splitter.thinking] += 1
                    yield from self._keep(splitter.feed(decoder.decode(token_bytes(self._llm, token))))
                    if self._guard is not None and self._guard.saw(token):
                        finish = "loop"
                        break
                    limit = self._limits[splitter.thinking]
                    if limit is not None and counts[splitter.thinking] >= limit:
                        break
                    if self._max_tokens is not None and sum(counts.values()) >= self._max_tokens:
                        break
        except ContextFull:
            finish = "context"
        self.thought_unfinished = splitter.thinking
        yield from self._keep(splitter.feed(decoder.decode(b"", final=True)))
        yield from self._keep(splitter.finish())
        self.finish = finish

    def _keep(self, pieces: Any) -> Generator[Piece, None, None]:
        for piece in pieces:
            self._said[piece.thinking] += piece.text
            yield piece
