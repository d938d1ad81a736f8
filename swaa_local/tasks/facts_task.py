"""Facts in a long document: what the bundled model was trained for; `needle.documents` makes the documents."""

from __future__ import annotations

import random
from dataclasses import dataclass

from swaa_local.needle import documents as facts
from swaa_local.tasks.base import CountTokens, Question, TaskError

MAX_TOKENS = 96
"""Of a reply with a thought such as the bundled model's."""
_TOKENS_PER_FACT = 128
_N_FACTS = (4, 40)


@dataclass(frozen=True)
class Facts:
    """One question about one fact; over the questions, depths are spread evenly, however many there are."""

    name: str
    kind: facts.Kind

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        seed, depth = rng.random(), spread(index + 1)
        wanted = length - MAX_TOKENS
        room = wanted - count(facts.PROMPT.format(text="", question="What is the room key number of Ada Klein?"), "")
        while room > 0:
            question = self._build(random.Random(seed), depth, room, count)
            over = count(question.prompt, "") - wanted
            if over <= 0:
                return question
            room -= over
        raise TaskError(f"{self.name} needs more than {length} tokens; ask for a longer --length")

    def _build(self, rng: random.Random, depth: float, room: int, count: CountTokens) -> Question:
        few, many = _N_FACTS
        empty = count("", "")
        try:
            document = facts.make_document(
                rng,
                self.kind,
                room,
                lambda sentence: count(sentence, "") - empty,
                n_facts=max(few, min(many, room // _TOKENS_PER_FACT)),
            )
        except ValueError as error:
            raise TaskError(f"{self.name}: {error}") from None
        placed = document.nearest(depth)
        prompt = document.prompt(placed)
        return Question(
            prompt=prompt,
            references=(placed.fact.value,),
            metric="value",
            max_tokens=MAX_TOKENS,
            needle_at=prompt.index(document.text) + placed.value_offset,
            depth=document.depth(placed),
            distractors=tuple(other.fact.value for other in document.facts if other is not placed),
        )


def spread(number: int) -> float:
    """The number in binary, mirrored at the point (van der Corput): 1/2, 1/4, 3/4, 1/8, ... fill [0, 1) evenly."""
    value, step = 0.0, 0.5
    while number:
        value += step * (number & 1)
        number >>= 1
        step /= 2
    return value
