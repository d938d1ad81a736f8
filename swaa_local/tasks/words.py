"""Random words, numbers and ids. The words are those of the package wonderwords, from which RULER draws its own."""

from __future__ import annotations

import functools
import random
import string
import uuid
from typing import Literal

from swaa_local.needle.documents import pick, sample

Kind = Literal["words", "numbers", "uuids"]

SINGULAR: dict[Kind, str] = {"words": "word", "numbers": "number", "uuids": "uuid"}
_DIGITS = 7


def make(rng: random.Random, kind: Kind) -> str:
    """A key or a value: adjective-noun, a number of 7 digits, or a UUID of version 4."""
    if kind == "words":
        return f"{pick(rng, _list('adjectives'))}-{pick(rng, _list('nouns'))}"
    if kind == "numbers":
        return str(10 ** (_DIGITS - 1) + int(rng.random() * 9 * 10 ** (_DIGITS - 1)))
    return str(uuid.UUID(bytes=bytes(int(rng.random() * 256) for _ in range(16)), version=4))


def make_distinct(rng: random.Random, kind: Kind, n: int, taken: set[str]) -> list[str]:
    """`n` that are not in `taken`, and adds them to it."""
    made: list[str] = []
    while len(made) < n:
        new = make(rng, kind)
        if new not in taken:
            taken.add(new)
            made.append(new)
    return made


def letters(rng: random.Random, alphabet: str, length: int, n: int, taken: set[str] | None = None) -> list[str]:
    """`n` different strings of random letters, none of which is in `taken`."""
    known = set(taken or ())
    made: list[str] = []
    while len(made) < n:
        new = "".join(pick(rng, alphabet) for _ in range(length))
        if new not in known:
            known.add(new)
            made.append(new)
    return made


def shuffled(rng: random.Random, items: list[str]) -> list[str]:
    return sample(rng, items, len(items))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All nouns, adjectives and verbs, each once."""
    return tuple(sorted({*_list("nouns"), *_list("adjectives"), *_list("verbs")}))


@functools.cache
def _list(category: str) -> tuple[str, ...]:
    from wonderwords import RandomWord

    found = RandomWord().filter(include_categories=[category])
    return tuple(sorted(word for word in found if set(word) <= set(string.ascii_lowercase)))
