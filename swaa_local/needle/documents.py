"""Documents with facts hidden in them, and questions about the facts: what the bundled model was trained for.

Two kinds. In *statements* a fact names its entity ("The pin code of Ada Klein is 40417."). In *sections* a header names
the entity and the facts of the section do not ("Their pin code is 40417."), so whoever reads a fact must still know the
header, which is often further away than a sliding window. Every document holds facts that differ from the one asked for
in the entity or in the attribute alone.

Pure: knows nothing of models and tokenizers; the caller says how long a text is. All randomness comes from the
`random.Random` that the caller passes in, and through its `random()` alone, which is the same in every Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeVar

from swaa_local.needle import words

Kind = Literal["statements", "sections"]
KINDS: tuple[Kind, ...] = ("statements", "sections")
ATTRIBUTES = words.NUMBER_ATTRIBUTES + words.WORD_ATTRIBUTES
MADE_UP_NAMES = 0.3
"""Share of names that are no names, so that a model cannot know them by heart."""

PROMPT = "Read the following text and answer the question at the end.\n\nText: {text}\n\n{question}"

T = TypeVar("T")


@dataclass(frozen=True)
class Fact:
    """What a document says once: the value of an attribute of an entity."""

    entity: str
    attribute: str
    value: str

    @property
    def question(self) -> str:
        return f"What is the {self.attribute} of {self.entity}?"


@dataclass(frozen=True)
class PlacedFact:
    """A fact in a document. Offsets are in characters of the document's text."""

    fact: Fact
    value_offset: int
    name_offset: int
    """Where the entity is named: in the fact's own sentence, or in the header of its section."""


@dataclass(frozen=True)
class Document:
    """A text and the facts in it, in the order of the text."""

    text: str
    facts: tuple[PlacedFact, ...]

    def depth(self, placed: PlacedFact) -> float:
        """Where the fact is: 0 is the start of the text, 1 the end."""
        return placed.value_offset / len(self.text)

    def nearest(self, depth: float) -> PlacedFact:
        """The fact that is closest to a depth."""
        return min(self.facts, key=lambda placed: abs(self.depth(placed) - depth))

    def prompt(self, placed: PlacedFact) -> str:
        """The user's message: the text and the question behind it."""
        return PROMPT.format(text=self.text, question=placed.fact.question)


@dataclass(frozen=True)
class Filler:
    """Sentences between the facts: made from patterns, or, with probability `share`, taken from `sentences`."""

    sentences: Sequence[str] = ()
    share: float = 0.0

    def sentence(self, rng: random.Random, *, people: bool = True) -> str:
        """One sentence. people: it may tell of somebody by name."""
        if self.share and rng.random() < self.share:
            return pick(rng, self.sentences)
        patterns = _PERSON_PATTERNS if people and rng.random() < 0.2 else _PATTERNS
        return _fill(rng, pick(rng, patterns))


def make_document(
    rng: random.Random,
    kind: Kind,
    length: int,
    count: Callable[[str], int],
    *,
    n_facts: int,
    filler: Filler | None = None,
    breaks: Sequence[str] = (" ",),
) -> Document:
    """Write a document.

    length: of the text at most, and hardly less, in the unit of `count`, which is given single sentences with the white
    space before them. breaks: what stands between sentences, drawn for each. n_facts: at least 2; so many and a few
    more or less in sections, which have two facts at least. Raises ValueError if the facts alone are longer.
    """
    if n_facts < 2:
        raise ValueError(f"a document needs 2 facts or more, not {n_facts}")
    filler = filler or Filler()
    people = kind == "statements"
    blocks = make_statements(rng, n_facts) if people else make_sections(rng, n_facts)
    used = sum(count(" " + line.text) for block in blocks for line in block)
    if used > length:
        raise ValueError(f"{n_facts} facts alone are {used} long, more than {length}; ask for fewer facts")
    longest_break = max(breaks, key=len)
    extra = 0 if len(breaks) == 1 and breaks[0] == " " else count(f"x{longest_break}") - count("x")
    used += extra * sum(map(len, blocks))
    between: list[str] = []
    misses = 0
    while misses < 8:  # the last gap may still take a short sentence
        sentence = filler.sentence(rng, people=people)
        size = count(" " + sentence) + extra
        if used + size > length:
            misses += 1
            continue
        used += size
        between.append(sentence)
    return _lay_out(rng, _spread(rng, blocks, between), breaks)


@dataclass(frozen=True)
class Line:
    """A sentence that matters. value_at, name_at: offsets in it; name_at is None where only the section names it."""

    text: str
    fact: Fact | None = None
    value_at: int = 0
    name_at: int | None = None


def make_statements(rng: random.Random, n_facts: int) -> list[list[Line]]:
    """Each fact for itself."""
    n_entities = max(2, int(n_facts * (0.35 + 0.55 * rng.random())))
    entities = make_names(rng, n_entities)
    n_attributes = max(2, int(len(ATTRIBUTES) * rng.random()), -(-2 * n_facts // n_entities))
    attributes = sample(rng, ATTRIBUTES, min(len(ATTRIBUTES), n_attributes))
    # Whatever is asked, something shares its entity and something its attribute.
    pairs = [(entities[0], attributes[0]), (entities[0], attributes[1]), (entities[1], attributes[0])][:n_facts]
    seen = set(pairs)
    while len(pairs) < n_facts:
        pair = (pick(rng, entities), pick(rng, attributes))
        if pair not in seen:
            seen.add(pair)
            pairs.append(pair)
    facts = _with_values(rng, pairs)
    return [[_line(pick(rng, words.FACT_PATTERNS), fact)] for fact in facts]


def make_sections(rng: random.Random, n_facts: int) -> list[list[Line]]:
    """Blocks of a header and its facts; every attribute is there in two sections at least."""
    n_sections = min(2 + int(6 * rng.random()), max(2, n_facts // 2))
    entities = make_names(rng, n_sections)
    n_attributes = max(1, min(len(ATTRIBUTES), round(n_facts / n_sections * (1 + 0.5 * rng.random()))))
    attributes = sample(rng, ATTRIBUTES, n_attributes)
    pairs: list[tuple[str, str]] = []
    for attribute in attributes:
        share = n_facts / (n_sections * n_attributes)
        holders = max(2, min(n_sections, round(n_sections * share)))
        pairs += [(entity, attribute) for entity in sample(rng, entities, holders)]
    by_entity: dict[str, list[Fact]] = {entity: [] for entity in entities}
    for fact in _with_values(rng, pairs):
        by_entity[fact.entity].append(fact)
    blocks = []
    for entity in entities:
        facts = sample(rng, by_entity[entity], len(by_entity[entity]))
        header = pick(rng, words.SECTION_PATTERNS)
        blocks.append(
            [
                Line(header.format(entity=entity), name_at=header.index("{entity}")),
                *(_line(pick(rng, words.SECTION_FACT_PATTERNS), fact) for fact in facts),
            ]
        )
    return blocks


def _line(pattern: str, fact: Fact) -> Line:
    text = pattern.format(entity=fact.entity, attribute=fact.attribute, value=fact.value)
    value_at = len(text) - len(fact.value) - 1
    name_at = text.index(fact.entity) if "{entity}" in pattern else None
    return Line(text, fact, value_at, name_at)


def _with_values(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> list[Fact]:
    taken: set[str] = set()
    facts = []
    for entity, attribute in pairs:
        value = _value(rng, attribute)
        while value in taken:
            value = _value(rng, attribute)
        taken.add(value)
        facts.append(Fact(entity, attribute, value))
    return facts


def _value(rng: random.Random, attribute: str) -> str:
    if attribute in words.WORD_ATTRIBUTES:
        return f"{pick(rng, words.VALUE_ADJECTIVES)} {pick(rng, words.VALUE_NOUNS)}"
    return f"{int(rng.random() * 100000):05d}"


def make_names(rng: random.Random, n: int) -> list[str]:
    """`n` different full names; some share a first or a last name."""
    names: list[str] = []
    while len(names) < n:
        first, last = _name(rng, words.FIRST_NAMES), _name(rng, words.LAST_NAMES)
        if names and rng.random() < 0.25:
            other = pick(rng, names).split(" ")
            if rng.random() < 0.5:
                first = other[0]
            else:
                last = other[1]
        if (name := f"{first} {last}") not in names:
            names.append(name)
    return names


def _name(rng: random.Random, known: Sequence[str]) -> str:
    if rng.random() >= MADE_UP_NAMES:
        return pick(rng, known)
    n_syllables = 2 if rng.random() < 0.6 else 3
    return "".join(pick(rng, words.SYLLABLES) for _ in range(n_syllables)).capitalize()


def _spread(rng: random.Random, blocks: list[list[Line]], between: list[str]) -> list[str | Line]:
    """Filler and lines in their final order. A block's first line opens it, and its others lie within it."""
    n = len(between)
    if all(len(block) == 1 for block in blocks):  # statements
        places = sorted((int(rng.random() * (n + 1)), i) for i in range(len(blocks)))
        placed = [(place, blocks[i][0]) for place, i in places]
    else:
        weights = [0.3 + rng.random() for _ in blocks]
        edges = [0.0, *accumulate(weights)]
        bounds = [round(edge / edges[-1] * n) for edge in edges]
        placed = []
        for block, start, end in zip(blocks, bounds[:-1], bounds[1:], strict=True):
            placed.append((start, block[0]))
            slots = sorted(start + int(rng.random() * (end - start + 1)) for _ in block[1:])
            placed += zip(slots, block[1:], strict=True)
    order: list[str | Line] = []
    at = 0
    for place, line in placed:
        order += between[at:place]
        order.append(line)
        at = place
    return order + between[at:]


def _lay_out(rng: random.Random, order: list[str | Line], breaks: Sequence[str]) -> Document:
    parts: list[str] = []
    facts: list[PlacedFact] = []
    offset = name_offset = 0
    for index, item in enumerate(order):
        if index:
            space = breaks[0] if len(breaks) == 1 else pick(rng, breaks)
            parts.append(space)
            offset += len(space)
        if isinstance(item, Line):
            if item.name_at is not None:
                name_offset = offset + item.name_at
            if item.fact is not None:
                facts.append(PlacedFact(item.fact, offset + item.value_at, name_offset))
        text = item if isinstance(item, str) else item.text
        parts.append(text)
        offset += len(text)
    return Document("".join(parts), tuple(facts))


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of them, by a single `random()`."""
    return items[int(rng.random() * len(items))]


def sample(rng: random.Random, items: Sequence[T], n: int) -> list[T]:
    """`n` of them in random order."""
    pool = list(items)
    for i in range(n):
        j = i + int(rng.random() * (len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:n]


# A pattern is compiled to its literal parts and, between them, functions that fill a slot.
_Slot = Callable[[random.Random], str]


def _choice(items: Sequence[str], *, capital: bool = False) -> _Slot:
    made = tuple(item[0].upper() + item[1:] if capital else item for item in items)
    return lambda rng: made[int(rng.random() * len(made))]


_SLOTS: dict[str, _Slot] = {
    "person": _choice(words.PEOPLE),
    "group": _choice(words.GROUPS),
    "place": _choice(words.PLACES),
    "area": _choice(words.AREAS),
    "things": _choice(words.THINGS),
    "adj": _choice(words.ADJECTIVES),
    "did": _choice(words.PAST_VERBS),
    "when": _choice(words.TIMES),
    "When": _choice(words.TIMES, capital=True),
    "weather": _choice(words.WEATHERS),
    "dish": _choice(words.DISHES),
    "name": lambda rng: f"{_name(rng, words.FIRST_NAMES)} {_name(rng, words.LAST_NAMES)}",
    "n": lambda rng: str(2 + int(rng.random() ** 2 * 900)),
    "m": lambda rng: str(2 + int(rng.random() * 998)),
    "year": lambda rng: str(1500 + int(rng.random() * 525)),
}


def _compile(pattern: str) -> tuple[str | _Slot, ...]:
    parts = re.split(r"\{(\w+?)2?\}", pattern)
    return tuple(_SLOTS[part] if i % 2 else part for i, part in enumerate(parts) if part)


_PATTERNS = tuple(_compile(pattern) for pattern in words.PATTERNS)
_PERSON_PATTERNS = tuple(_compile(pattern) for pattern in words.PERSON_PATTERNS)


def _fill(rng: random.Random, pattern: tuple[str | _Slot, ...]) -> str:
    return "".join([part if isinstance(part, str) else part(rng) for part in pattern])
