"""Tells a thinking model's thoughts from its answer, in text that arrives piece by piece.

Knows the marks that models put around their thoughts; nothing of tokens or terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
)
MARKS = frozenset(mark for pair in TAGS for mark in pair)


@dataclass(frozen=True)
class Piece:
    """Some text of a reply, in order of arrival."""

    text: str
    thinking: bool = False


def open_tag(prompt: str) -> str | None:
    """The closing mark of a thought that the prompt itself has begun, as some templates do; None if it has not."""
    tail = prompt.rstrip()
    return next((end for start, end in TAGS if tail.endswith(start)), None)


class ThinkingSplitter:
    """Feed it text as it comes; it gives back pieces without the marks.

    A thought is one at the start of a reply only. Blank space around the thought and before the answer is dropped. Text
    that may belong to either is held back until it is clear.

    closing: the mark that ends a thought begun by the prompt.
    """

    def __init__(self, closing: str | None = None) -> None:
        self._closing = closing
        self._held = ""
        self._undecided = closing is None  # nothing but blank space so far
        self._blank = True  # drop blank space until the next text

    @property
    def thinking(self) -> bool:
        return self._closing is not None

    def feed(self, text: str) -> Iterator[Piece]:
        self._held += text
        if self._undecided:
            start = self._held.lstrip()
            for opening, closing in TAGS:
                if start.startswith(opening):
                    self._held, self._closing = start[len(opening) :], closing
                    self._undecided = False
                    break
                if opening.startswith(start):  # also when it is empty
                    return
            self._undecided = False
        if self._closing is not None:
            thought, mark, rest = self._held.partition(self._closing)
            if not mark:
                # Blank space is held back too: it may be the last before the mark.
                clear = thought[: len(thought) - _overlap(thought, self._closing)].rstrip()
                self._held = thought[len(clear) :]
                yield from self._emit(clear, thinking=True)
                return
            yield from self._emit(thought.rstrip(), thinking=True)
            self._closing, self._held, self._blank = None, rest, True
        text, self._held = self._held, ""
        yield from self._emit(text, thinking=False)

    def finish(self) -> Iterator[Piece]:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        yield from self._emit(text, thinking=self.thinking)

    def _emit(self, text: str, *, thinking: bool) -> Iterator[Piece]:
        if self._blank:
            text = text.lstrip()
        if text:
            self._blank = False
            yield Piece(text, thinking)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
