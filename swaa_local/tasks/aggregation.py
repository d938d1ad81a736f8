"""Common and frequent words: RULER's tasks `cwe` and `fwe`, in our own words.

Structure, counts and distributions follow NVIDIA/RULER (arXiv 2404.06654; scripts/data/synthetic/
common_words_extraction.py and freq_words_extraction.py).
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from swaa_local.needle.documents import sample
from swaa_local.tasks import words
from swaa_local.tasks.base import CountTokens, Question, sized

_SHORT = 4096  # tokens; below it RULER repeats words less often


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words appear more often than all others, after a solved example."""

    name: str = "cwe"
    n_common: int = 10
    max_tokens: int = 120

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        seed = rng.random()
        example_size, example_repeats, repeats = (40, (10, 3), (30, 3)) if length >= _SHORT else (20, (3, 1), (6, 1))

        def build(n: int) -> Question:
            rng = random.Random(seed)
            shown, solution = self._list(rng, example_size, *example_repeats)
            example = f"{_common_question(shown)} {_common_prefix(self.n_common)} {_numbered(solution)}\n"
            listed, common = self._list(rng, n, *repeats)
            prompt = example + _common_question(listed)
            return Question(prompt, tuple(common), "all", self.max_tokens, _common_prefix(self.n_common))

        # One uncommon word at least.
        most = len(words.vocabulary())
        return sized(self.name, build, length, count, least=self.n_common + 1, most=most)

    def _list(self, rng: random.Random, n: int, often: int, seldom: int) -> tuple[list[str], list[str]]:
        chosen = sample(rng, words.vocabulary(), n)
        common, uncommon = chosen[: self.n_common], chosen[self.n_common :]
        return words.shuffled(rng, common * often + uncommon * seldom), common


def _common_question(listed: Sequence[str]) -> str:
    return (
        "The following is a numbered list of words, some of which are in it more often than others. Remember those "
        f"that are in it most often.\n{_numbered(listed)}\nQuestion: Which are the 10 most common words of the list "
        "above?"
    )


def _common_prefix(n: int) -> str:
    return f"Answer: The {n} words that are most often in the list are:"


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


@dataclass(frozen=True)
class FrequentWords:
    """A text of made-up words whose frequency falls with the square of their rank; the most frequent one is noise."""

    name: str = "fwe"
    n_letters: int = 6
    max_tokens: int = 50

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        seed = rng.random()
        n_coded = max(4, length // 50)

        def build(n: int) -> Question:
            rng = random.Random(seed)
            coded = ["...", *words.letters(rng, string.ascii_lowercase, self.n_letters, n_coded - 1)]
            # Zeta distribution with alpha 2, whose sum over all ranks is pi^2 / 6.
            counts = [int(n / (rank * rank) / (math.pi**2 / 6)) for rank in range(1, n_coded + 1)]
            text = words.shuffled(rng, [word for word, times in zip(coded, counts, strict=True) for _ in range(times)])
            prompt = (
                "Read the following coded text, count how often each coded word appears, and find the three that "
                f"appear most often. {' '.join(text)}\nQuestion: Which are the three coded words that appear most "
                "often in the text above? Ignore the dots '....', and do not explain."
            )
            prefix = "Answer: By the coded text above, the three words that appear most often are:"
            return Question(prompt, tuple(coded[1:4]), "all", self.max_tokens, prefix)

        # From 64 on, each of the three is there more often than any word behind them.
        return sized(self.name, build, length, count, least=64)
