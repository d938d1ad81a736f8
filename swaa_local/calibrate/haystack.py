"""The prose that questions are about: the user's documents, or sentences made of patterns. Knows text; no tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from swaa_local.files.document_files import read_documents
from swaa_local.needle.documents import Filler

Part = Literal["search", "check"]
"""Questions of the search, and those of the final check, which the search must not have seen."""

_UNIT = re.compile(r"""(?s).+?(?:[.!?]["')\]\u2019\u201d]*\s+|\n\s*|$)""")
_LONGEST_UNIT = 2000  # characters: text without any sentence, such as a table, is cut there


@dataclass(frozen=True)
class Haystack:
    """units: sentences or lines with the white space behind them, so that joined they are the documents again; none for
    prose that is made anew for every text."""

    units: tuple[str, ...] = ()

    def take(self, rng: random.Random, part: Part) -> Units:
        """Sentences for one text, without an end: the documents from a random place of the part on, and around."""
        if not self.units:
            return Units(rng, ())
        half = len(self.units) // 2
        start = int(rng.random() * max(1, half)) + (half if part == "check" else 0)
        return Units(rng, (*self.units[start:], *self.units[:start]))


class Units:
    """Sentences in turn."""

    def __init__(self, rng: random.Random, units: Sequence[str]) -> None:
        self._rng, self._units, self._next, self._filler = rng, units, 0, Filler()

    def next(self) -> str:
        if not self._units:
            return self._filler.sentence(self._rng) + " "
        unit = self._units[self._next % len(self._units)]
        self._next += 1
        return unit


def split_units(text: str) -> tuple[str, ...]:
    """Sentences and lines; joined they are the text."""
    units = []
    for match in _UNIT.finditer(text):
        unit = match[0]
        units += [unit[i : i + _LONGEST_UNIT] for i in range(0, len(unit), _LONGEST_UNIT)]
    return tuple(units)


def read_haystack(paths: Sequence[str], say: Callable[[str], None] = lambda _text: None) -> Haystack:
    """The documents that paths stand for, as in `chat`: files, folders, patterns. say: is told what was left out of a
    folder. Raises `DocumentError`."""
    texts = [document.text for path in paths for document in read_documents(path, say)]
    return Haystack(split_units("\n\n".join(texts)))
