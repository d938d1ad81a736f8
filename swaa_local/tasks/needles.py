"""Needles in a haystack: RULER's eight retrieval tasks, in our own words.

Structure, counts and placement follow NVIDIA/RULER (Hsieh et al., arXiv 2404.06654; scripts/synthetic.yaml and
scripts/data/synthetic/niah.py). Departures: keys are distinct, so that every question has one answer; each question
gets the longest haystack that fits instead of one in steps; the chat template counts towards the length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from swaa_local.needle.documents import sample
from swaa_local.tasks import words
from swaa_local.tasks.base import CountTokens, Question, sized
from swaa_local.tasks.essay import Essay

Haystack = Literal["noise", "needles", "essay"]

NOISE = "The bread is warm. The road is long. The lamp is low. Off we walk. Out and home again."
MAX_TOKENS = 128
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percent of the essay's sentences behind which a needle may stand."""


@dataclass(frozen=True)
class Needles:
    """A needle task. n_keys: things that have values; n_values: of each; n_queries: keys asked for."""

    name: str
    haystack: Haystack
    key: words.Kind = "words"
    value: words.Kind = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    essay: Essay | None = None

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        seed = rng.random()
        n_needles = max(self.n_keys, self.n_queries) * self.n_values

        def build(n: int) -> Question:
            return self._build(random.Random(seed), n)

        return sized(self.name, build, length, count, least=n_needles)

    def _build(self, rng: random.Random, n: int) -> Question:
        taken: set[str] = set()
        keys = words.make_distinct(rng, self.key, max(self.n_keys, self.n_queries), taken)
        values = [words.make_distinct(rng, self.value, self.n_values, taken) for _ in keys]
        needles = [self._sentence(key, value) for key, its in zip(keys, values, strict=True) for value in its]
        needles = words.shuffled(rng, needles)
        asked = sample(rng, range(len(keys)), self.n_queries)
        if self.haystack == "essay":
            context = self._in_essay(rng, needles, n)
        else:
            context = "\n".join(self._among_lines(rng, needles, n, taken))
        references = tuple(value for i in asked for value in values[i])
        return self._ask(context, [keys[i] for i in asked], references)

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the secret {self.value} of {key} is: {value}."

    def _among_lines(self, rng: random.Random, needles: list[str], n: int, taken: set[str]) -> list[str]:
        """Noise, or needles that nobody asks for; the needles come before lines drawn without repetition."""
        if self.haystack == "noise":
            lines = [NOISE] * n
        else:
            keys = words.make_distinct(rng, self.key, n, taken)
            lines = [
                self._sentence(key, value)
                for key, value in zip(keys, words.make_distinct(rng, self.value, n, taken), strict=True)
            ]
        places = sorted(sample(rng, range(n), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return lines

    def _in_essay(self, rng: random.Random, needles: list[str], n: int) -> str:
        assert self.essay is not None
        sentences = self.essay.sentences(rng, n)
        depths = sorted(sample(rng, DEPTHS, len(needles)))
        parts: list[str] = []
        at = 0
        for depth, needle in zip(depths, needles, strict=True):
            place = len(sentences) * depth // 100
            parts += [*sentences[at:place], needle]
            at = place
        return " ".join(parts + sentences[at:])

    def _ask(self, context: str, keys: list[str], references: tuple[str, ...]) -> Question:
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        single = len(references) == 1
        kind = words.SINGULAR[self.value] if single else self.value
        some, them, are = ("A", "it", "is the") if single else ("Some", "them", "are all the")
        intro = f"{some} secret {kind} {'is' if single else 'are'} hidden in the following text. Remember {them}: "
        intro += f"there will be a question about the {kind} at the end.\n"
        question = f"\nWhat {are} secret {kind} of {named} that the text mentions?"
        prompt = f"{intro}{context}{question}"
        needle_at = depth = None
        if single:
            offset = context.index(f": {references[0]}.") + 2
            needle_at, depth = len(intro) + offset, offset / len(context)
        return Question(
            prompt=prompt,
            references=references,
            metric="all",
            max_tokens=MAX_TOKENS,
            answer_prefix=f"The secret {kind} of {named} that the text mentions {'is' if single else 'are'}",
            needle_at=needle_at,
            depth=depth,
        )
