"""Quoting: a sentence far back in the text is asked for by its first words, and must be repeated word for word.

A key that is looked up is one token or two; a quote is many, each of which must be found again. Where the question
stands before the text, the end of the prompt does not say what is asked: a tail, or a window, has not read it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from swaa_local.tasks import words
from swaa_local.tasks.base import CountTokens, Question, sized
from swaa_local.tasks.essay import Essay

MAX_TOKENS = 96
N_WORDS = 10


@dataclass(frozen=True)
class Quoting:
    """One sentence of ten random words in a text, which is asked for by whom it is said to be of."""

    name: str
    essay: Essay
    question_first: bool = False

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        seed = rng.random()
        return sized(self.name, lambda n: self._build(random.Random(seed), n), length, count, least=1)

    def _build(self, rng: random.Random, n: int) -> Question:
        author, *said = words.make_distinct(rng, "words", N_WORDS + 1, set())
        quote = " ".join(said)
        sentence = f"The ledger of {author} says: {quote}."
        sentences = self.essay.sentences(rng, n)
        place = rng.randrange(len(sentences))
        context = " ".join([*sentences[:place], sentence, *sentences[place:]])
        question = f"Repeat, word for word, what the ledger of {author} says in the text."
        if self.question_first:
            intro, end, answer_prefix = f"{question} This is the text:\n", "", "It says:"
        else:
            intro = "Read the following text. There will be a question about one of its sentences at the end.\n"
            end, answer_prefix = f"\n{question}", f"The ledger of {author} says:"
        prompt = f"{intro}{context}{end}"
        offset = context.index(sentence)
        return Question(
            prompt=prompt,
            references=(quote,),
            metric="all",
            max_tokens=MAX_TOKENS,
            answer_prefix=answer_prefix,
            needle_at=len(intro) + offset,
            depth=offset / len(context),
        )
