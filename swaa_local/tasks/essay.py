"""The prose around needles: a text of the user's, or one made of patterns."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from swaa_local.files.input_file import read_input
from swaa_local.needle.documents import Filler
from swaa_local.tasks.base import TaskError

_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]\u2019\u201d]*\s+(?=["'(\[\u2018\u201c]*[A-Z0-9])""")


@dataclass(frozen=True)
class Essay:
    """words: of the text, in order; none for a text that is made anew for every question."""

    words: tuple[str, ...] = ()

    def sentences(self, rng: random.Random, n: int) -> list[str]:
        """The first `n` words as sentences, the text repeated as often as needed; or `n` sentences made of patterns."""
        if not self.words:
            filler = Filler()
            return [filler.sentence(rng) for _ in range(n)]
        repeated = self.words * -(-n // len(self.words))
        return split_sentences(" ".join(repeated[:n]))


def read_essay(path: Path) -> Essay:
    """The text of a file. Raises `TaskError` for what is no text in UTF-8."""
    try:
        data = read_input(path, str(path))
        words = tuple(data.decode("utf-8-sig").split())
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 (byte {error.start + 1}); convert it, for instance with iconv") from None
    if not words:
        raise TaskError(f"{path} is empty; --haystack needs a text, for instance a book")
    return Essay(words)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text whose white space is single blanks; joined by blanks they give it back."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[a:b].rstrip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
