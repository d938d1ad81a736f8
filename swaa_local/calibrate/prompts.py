"""Questions about long texts whose answers lie beyond the window; many share one text, which is then read once for all.

Kinds: `keys` (the number of one of several made-up keys), `statements` (facts that differ from others in the person or
in what is told of them alone), `sections` (only a header names the person, so that the fact alone does not help),
`quotes` (a sentence far back is continued), `own` (the user's). Knows text and how many tokens it takes.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swaa_local.calibrate.haystack import Haystack, Part, Units
from swaa_local.calibrate.results import CalibrateError
from swaa_local.needle.documents import PROMPT, Fact, Line, make_sections, make_statements, sample
from swaa_local.tasks.words import letters, make_distinct

GENERATED = ("keys", "statements", "sections", "quotes")
EASY = ("keys",)
"""For models that such a mixture confuses."""
ROOM_TO_ANSWER = 64
"""Tokens that a generated answer may take."""
_MARGIN = 64  # tokens between a window and what must lie beyond it
_SHARES = {"keys": 2, "statements": 2, "sections": 1, "quotes": 1}
_DIGITS, _EASY_DIGITS = 7, 5  # of a key's number
_DRAFTS = 8
_SLACK = 40  # tokens that a prompt may be too short
_LEAST_TOKENS_PER_FACT = 40
_QUOTED_FROM = 5  # words that a quote is asked by
_QUOTE = (4, 8)  # words that must follow


@dataclass(frozen=True)
class Ask:
    """One question. prefix: what the answer begins with, put into the model's mouth. reference: how it must go on; None
    for the model's own. needle_at: offset of the answer in the text, in characters; None if nobody knows."""

    kind: str
    question: str
    prefix: str = ""
    reference: str | None = None
    needle_at: int | None = None


@dataclass(frozen=True)
class Text:
    """A text and the questions about it. template: how they make a message."""

    id: str
    text: str
    asks: tuple[Ask, ...]

    def message(self, ask: Ask) -> str:
        """What the user says."""
        return PROMPT.format(text=self.text, question=ask.question)

    @property
    def digest(self) -> str:
        """Of everything that a score depends on."""
        spelled = "\0".join([self.text, *(f"{a.kind}\0{a.question}\0{a.prefix}\0{a.reference}" for a in self.asks)])
        return hashlib.sha256(spelled.encode(errors="backslashreplace")).hexdigest()[:16]


Count = Callable[[str], int]
"""Tokens of a piece of text, or of the prompt that a message makes."""


@dataclass(frozen=True)
class Maker:
    """Makes texts. count: tokens of a piece of text. count_prompt: of a whole prompt, given the user's message. kinds:
    of the questions."""

    haystack: Haystack
    count: Count
    count_prompt: Count
    kinds: tuple[str, ...] = GENERATED
    n_questions: int = 16
    seed: int = 0

    def n_that_fit(self, length: int, window: int) -> int:
        """Questions of a text, as many as are wanted or as its length has room for beyond the window."""
        return min(self.n_questions, (self._room(length) - _after(window)) // _LEAST_TOKENS_PER_FACT)

    def _room(self, length: int) -> int:
        """Tokens for the text in a prompt."""
        question = _QUOTING.format(begin="Bartholomew Featherstonehaugh telephoned, notwithstanding his grandmother's")
        return length - ROOM_TO_ANSWER - self.count_prompt(PROMPT.format(text="", question=question))

    def text(self, part: Part, length: int, window: int, index: int) -> Text:
        """A text whose prompts and answers take `length` tokens at most, and hardly less; all that is asked lies more
        than `window` tokens before the end. Raises `CalibrateError` if that is too short."""
        id = f"{part}/{length}/{index}"
        rng = random.Random(f"{self.seed}/{id}")
        room, after = self._room(length), _after(window)
        n = self.n_that_fit(length, window)
        if n < 2 * len(self.kinds):
            raise CalibrateError(
                f"in {length} tokens there is no room for questions whose answers lie more than {window} tokens before "
                "the end; pass a larger --length or a smaller --window"
            )
        counts = _split(n, [(kind, _SHARES[kind]) for kind in self.kinds])
        groups: list[_Group] = []
        if counts["keys"]:
            groups.append(
                _Group("keys", _make_keys(rng, counts["keys"], _DIGITS if len(self.kinds) > 1 else _EASY_DIGITS))
            )
        if counts["statements"]:
            groups.append(_Group("statements", make_statements(rng, max(4, counts["statements"] * 3 // 2))))
        if counts["sections"]:
            groups.append(_Group("sections", make_sections(rng, max(6, counts["sections"] * 3 // 2))))
        groups = sample(rng, groups, len(groups))
        prose = _Prose(self.haystack.take(rng, part), self.count)
        wanted = room - sum(self.count(line.text + " ") for group in groups for line in group.lines)
        # Pieces have other tokens alone than together: what a draft has too few or too many is made good.
        for attempt in itertools.count():
            between = prose.of(wanted)
            units, placed = _lay_out(random.Random(id), groups, between, after, self.count)
            text = "".join(units).rstrip()
            over = self.count(text) - room
            if over <= 0 and (over >= -_SLACK or attempt > _DRAFTS // 2):
                break
            if attempt >= _DRAFTS and not between:
                break  # nothing is left that could be left out
            wanted -= over + (_SLACK // 2 if attempt else 0)
        if over > 0:
            raise CalibrateError(f"a prompt of {length} tokens has no room for the questions; pass a larger --length")
        asks = _ask_facts(rng, placed, counts)
        if counts.get("quotes"):
            asks += _ask_quotes(rng, units, placed, counts["quotes"], after, self.count)
        return Text(id, text, tuple(sample(rng, asks, len(asks))))


def _after(window: int) -> int:
    """Tokens that must stand behind what is asked, as pieces count, which have more tokens than they have together."""
    return round(1.05 * window) + _MARGIN


@dataclass(frozen=True)
class _Group:
    """Facts of one kind. blocks: lines that stay together in their order: a section's, or a single one."""

    kind: str
    blocks: list[list[Line]]

    @property
    def lines(self) -> list[Line]:
        return [line for block in self.blocks for line in block]


class _Prose:
    """Sentences that are drawn as far as they are needed."""

    def __init__(self, units: Units, count: Count) -> None:
        self._units, self._count = units, count
        self._drawn: list[tuple[str, int]] = []

    def of(self, n_tokens: int) -> list[str]:
        """The first sentences, of so many tokens together or a few less."""
        taken: list[str] = []
        used = 0
        while True:
            if len(taken) == len(self._drawn):
                unit = self._units.next()
                self._drawn.append((unit, self._count(unit)))
            unit, size = self._drawn[len(taken)]
            used += size
            if used > n_tokens:
                return taken
            taken.append(unit)


def _make_keys(rng: random.Random, n: int, n_digits: int) -> list[list[Line]]:
    """Sentences that each tell the number of a key."""
    taken: set[str] = set()
    keys, numbers = make_distinct(rng, "words", n, taken), letters(rng, "0123456789", n_digits, n)
    lines = []
    for key, number in zip(keys, numbers, strict=True):
        before = f"The secret number of {key} is "
        lines.append([Line(f"{before}{number}.", Fact(key, "secret number", number), len(before), 0)])
    return lines


def _split(n: int, shares: Sequence[tuple[str, int]]) -> Counter[str]:
    """`n` questions among kinds."""
    total = sum(share for _, share in shares)
    counts = Counter({kind: n * share // total for kind, share in shares})
    counts[shares[0][0]] += n - sum(counts.values())
    return counts


@dataclass(frozen=True)
class _Placed:
    """A fact in the text. unit: the number of its sentence. kind: of the question that it answers."""

    fact: Fact
    kind: str
    unit: int
    at: int


def _lay_out(
    rng: random.Random, groups: list[_Group], between: list[str], after: int, count: Count
) -> tuple[list[str], list[_Placed]]:
    """Facts among the sentences, all of them with `after` tokens or more behind them, each kind in a part of its own.

    A section's facts come behind its header and before the next one's, with sentences between them.
    """
    n_free = len(between) - _n_last(between, after, count)
    insertions: list[tuple[int, int, Line, str]] = []
    for number, group in enumerate(groups):
        first, last = n_free * number // len(groups), n_free * (number + 1) // len(groups)
        kind = group.kind
        for i, block in enumerate(group.blocks):
            if kind != "sections":
                insertions.append((first + int(rng.random() * (last - first + 1)), len(insertions), block[0], kind))
                continue
            begin = first + (last - first) * i // len(group.blocks)
            end = first + (last - first) * (i + 1) // len(group.blocks)
            places = [begin, *sorted(begin + int(rng.random() * (end - begin + 1)) for _ in block[1:])]
            for place, line in zip(places, block, strict=True):
                insertions.append((place, len(insertions), line, kind))
    # Where two meet, a section's header stays behind the last section's facts.
    insertions.sort(key=lambda item: item[:2])
    units: list[str] = []
    placed: list[_Placed] = []
    at = taken = 0
    for place, _, line, kind in insertions:
        for unit in between[taken:place]:
            units.append(unit)
            at += len(unit)
        taken = max(taken, place)
        if units and not units[-1][-1:].isspace():
            units[-1] += " "
            at += 1
        if line.fact is not None:
            placed.append(_Placed(line.fact, kind, len(units), at + line.value_at))
        units.append(line.text + " ")
        at += len(line.text) + 1
    return units + between[taken:], placed


def _n_last(units: Sequence[str], n_tokens: int, count: Count) -> int:
    """How many of the last ones have so many tokens together, or a few more."""
    n = used = 0
    while n < len(units) and used < n_tokens:
        n += 1
        used += count(units[-n])
    return n


def _ask_facts(rng: random.Random, placed: Sequence[_Placed], counts: Counter[str]) -> list[Ask]:
    asks = []
    for kind in ("keys", "statements", "sections"):
        known = [item for item in placed if item.kind == kind]
        for item in sample(rng, known, min(len(known), counts[kind])):
            fact = item.fact
            prefix = f"The {fact.attribute} of {fact.entity} is"
            asks.append(Ask(kind, fact.question, prefix, fact.value, item.at))
    return asks


def _ask_quotes(
    rng: random.Random, units: Sequence[str], placed: Sequence[_Placed], n: int, after: int, count: Count
) -> list[Ask]:
    """Sentences of the prose that no other begins like, to be continued."""
    facts = {item.unit for item in placed}
    begins = Counter(" ".join(unit.split()[:_QUOTED_FROM]) for unit in units)
    found, at = [], 0
    n_free = len(units) - _n_last(units, after, count)
    for i, unit in enumerate(units):
        match = _SENTENCE.fullmatch(unit.rstrip())
        if match and i < n_free and i not in facts and begins[" ".join(match[1].split())] == 1:
            rest = " ".join(match[2].split()[: _QUOTE[1]]).rstrip(".!?,;:")
            asked = Ask("quotes", _QUOTING.format(begin=match[1]), match[1], rest, at + match.start(2))
            found.append(asked)
        at += len(unit)
    return sample(rng, found, min(n, len(found)))


_SENTENCE = re.compile(rf"(\w\S*(?: \S+){{{_QUOTED_FROM - 1}}}) (\S+(?: \S+){{{_QUOTE[0] - 1},}})")
_QUOTING = 'How does the sentence of the text go on that begins with "{begin}"? Repeat it word for word.'
