"""Training rows: conversations about documents, as tokens with a loss weight each.

Row i is a function of (seed, i) and the curriculum alone, so any number of workers makes the same data.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from needle.docstrings import read_docstrings
from needle.tokenizer import END_THINK, ENDOFTEXT, IM_END, IM_START, THINK, Encoder
from swaa_local.needle.documents import PROMPT, Document, Fact, Filler, Kind, PlacedFact, make_document, pick, sample

THINK_SHARE = 0.6
# Loss weights. Values in the document are random, and the prompt is given: nothing to learn there.
DOCUMENT_WEIGHT, ANSWER_WEIGHT = 0.15, 1.0
VALUE_WEIGHT: dict[Kind, float] = {"statements": 3.0, "sections": 4.0}
GIVEN = 0.0

_FILLER_SHARES = (0.0, 0.3, 0.5, 1.0)
_BREAKS: tuple[Sequence[str], ...] = (
    (" ",),
    (" ",),
    (" ", " ", " ", " ", "\n\n"),
    (" ", " ", " ", "\n"),
    ("\n",),
)
# As `swaa-local chat --file` composes a message, and as users paste a text.
_CHAT_PROMPT = '<document name="{name}">\n{text}\n</document>\n\n{question}'
_PROMPTS = (PROMPT, PROMPT, _CHAT_PROMPT, _CHAT_PROMPT, "{text}\n\n{question}")
_FILE_NAMES = (
    "notes", "report", "letter", "minutes", "document", "text", "chapter-2", "long", "diary", "facts", "book",
)  # fmt: skip
_FILE_KINDS = (".txt", ".md", "")
_QUESTIONS = (
    *("What is the {attribute} of {entity}?",) * 6,
    "What is {entity}'s {attribute}?",
    "Tell me the {attribute} of {entity}.",
    "Which {attribute} does {entity} have?",
    "Question: What is the {attribute} of {entity}?",
)


@dataclass(frozen=True)
class RowKind:
    """What a row is to be. length: in tokens, padding included. section_share: probability of task "sections"."""

    length: int
    section_share: float


@dataclass(frozen=True)
class Row:
    """tokens and, for each, the weight of its loss as a target; equal lengths."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Question:
    """One question about one document, for evaluation. tokens: the prompt and the expected reply.

    value: where the value stands in the document. name: where its entity does.
    """

    tokens: list[int]
    prompt_end: int
    value: int
    name: int


def thought(fact: Fact) -> tuple[str, str]:
    """What the model thinks before the value."""
    subject = f"the {fact.attribute} of {fact.entity}"
    return f"I need {subject}. The text says that {subject} is", f" {fact.value}"


class RowMaker:
    """Makes rows and questions. `sentences`: filler that no pattern makes; None reads the docstrings."""

    def __init__(self, encoder: Encoder, seed: int, sentences: Sequence[str] | None = None) -> None:
        self._encoder = encoder
        self._seed = seed
        self._sentences = read_docstrings() if sentences is None else sentences

    def row(self, index: int, kind: RowKind) -> Row:
        """A conversation of as many questions about a document as there is room for."""
        rng = random.Random(f"{self._seed}/row/{index}")
        task: Kind = "sections" if rng.random() < kind.section_share else "statements"
        # Short rows are mostly questions, which teach fastest; in long ones the document is what matters.
        n_questions = max(2, min(14, kind.length // (130 + kind.length // 20)))
        room = kind.length - 55 * n_questions - 40
        most = max(n_questions, min(40, kind.length // 45))
        n_facts = n_questions + int(rng.random() * (most - n_questions + 1))
        document = self._document(rng, task, n_facts, room)
        made = _Tokens(self._encoder)
        self._converse(rng, made, document, VALUE_WEIGHT[task], kind.length)
        padding = kind.length - len(made.tokens)
        end = self._encoder.special[ENDOFTEXT]
        return Row(made.tokens + [end] * padding, made.weights + [GIVEN] * padding)

    def batch(self, first: int, n_rows: int, kind: RowKind) -> tuple[np.ndarray, np.ndarray]:
        """Rows first .. first + n_rows - 1 as arrays [n_rows, length]: int16 tokens, float32 weights."""
        rows = [self.row(first + i, kind) for i in range(n_rows)]
        tokens = np.array([row.tokens for row in rows], dtype=np.int16)
        return tokens, np.array([row.weights for row in rows], dtype=np.float32)

    def question(self, index: int, task: Kind, length: int, *, think: bool) -> Question:
        """A single question as a user asks it; document, question and reply have `length` tokens, or a few less."""
        rng = random.Random(f"{self._seed}/question/{task}/{length}/{index}")
        n_facts = min(40, 4 + int(rng.random() * length / 60))
        document = self._document(rng, task, n_facts, length - 120, breaks=(" ",))
        placed = pick(rng, document.facts)
        made = _Tokens(self._encoder)
        message = f"user\n{document.prompt(placed)}"
        offset = message.index(document.text)
        made.special(IM_START, GIVEN)
        name = 1 + self._encoder.count(message[: offset + placed.name_offset - 1])
        value = 1 + self._encoder.count(message[: offset + placed.value_offset - 1])
        made.text(message, GIVEN)
        made.special(IM_END, GIVEN)
        made.text("\n", GIVEN)
        prompt_end = _reply(made, placed.fact, think=think, value_weight=VALUE_WEIGHT[task])
        return Question(made.tokens, prompt_end, value, name)

    def _document(
        self, rng: random.Random, task: Kind, n_facts: int, length: int, breaks: Sequence[str] | None = None
    ) -> Document:
        """A document of so many facts, or of fewer if those alone are longer; ValueError if even two are."""
        while True:
            filler = Filler(self._sentences, pick(rng, _FILLER_SHARES) if self._sentences else 0.0)
            spaces = breaks or pick(rng, _BREAKS)
            count = self._encoder.count
            try:
                return make_document(rng, task, length, count, n_facts=n_facts, filler=filler, breaks=spaces)
            except ValueError:
                if n_facts <= 2:
                    raise
                n_facts -= 1

    def _converse(
        self, rng: random.Random, made: _Tokens, document: Document, value_weight: float, length: int
    ) -> None:
        prompt = pick(rng, _PROMPTS).replace("{name}", pick(rng, _FILE_NAMES) + pick(rng, _FILE_KINDS))
        before, after = prompt.split("{text}")
        bare = rng.random() < 0.1  # history without thoughts, as chat programs send it
        for index, placed in enumerate(sample(rng, document.facts, len(document.facts))):
            fact = placed.fact
            question = pick(rng, _QUESTIONS).format(attribute=fact.attribute, entity=fact.entity)
            turn = _Tokens(self._encoder)
            turn.special(IM_START, GIVEN)
            if index == 0:
                _document_tokens(turn, f"user\n{before}", document, after.replace("{question}", question))
            else:
                turn.text(f"user\n{question}", GIVEN)
            turn.special(IM_END, GIVEN)
            turn.text("\n", GIVEN)
            if bare and index == 0:
                turn.special(IM_START, GIVEN)
                turn.text(f"assistant\n{fact.value}", GIVEN)
                turn.special(IM_END, GIVEN)
            else:
                _reply(turn, fact, think=rng.random() < THINK_SHARE, value_weight=value_weight)
            turn.text("\n", GIVEN)
            if len(made.tokens) + len(turn.tokens) > length:
                if index == 0:
                    raise AssertionError(f"a document of {len(turn.tokens)} tokens in a row of {length}")
                return
            made.tokens += turn.tokens
            made.weights += turn.weights


class _Tokens:
    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.tokens: list[int] = []
        self.weights: list[float] = []

    def text(self, text: str, weight: float) -> None:
        tokens = self._encoder.encode(text)
        self.tokens += tokens
        self.weights += [weight] * len(tokens)

    def special(self, name: str, weight: float) -> None:
        self.tokens.append(self._encoder.special[name])
        self.weights.append(weight)


def _document_tokens(made: _Tokens, before: str, document: Document, after: str) -> None:
    """A user's message, cut before spaces and behind line breaks and values, where a cut changes no token."""
    text = before + document.text + after
    start, end = len(before.rstrip(" ")), text.rindex(" ", 0, len(before) + len(document.text))
    made.text(text[:start], GIVEN)
    at = start
    for placed in document.facts:
        value = len(before) + placed.value_offset - 1  # the space belongs to the value's first token
        made.text(text[at:value], DOCUMENT_WEIGHT)
        at = value + 1 + len(placed.fact.value)
        made.text(text[value:at], GIVEN)
    if end > at:
        made.text(text[at:end], DOCUMENT_WEIGHT)
        at = end
    made.text(text[at:], GIVEN)


def _reply(made: _Tokens, fact: Fact, *, think: bool, value_weight: float) -> int:
    """Append the assistant's turn without the line break behind it; returns where the prompt ends.

    Without thinking the chat template itself writes the empty thought.
    """
    made.special(IM_START, GIVEN)
    made.text("assistant\n", GIVEN)
    if think:
        prompt_end = len(made.tokens)
        words, value = thought(fact)
        made.special(THINK, ANSWER_WEIGHT)
        made.text(f"\n{words}", ANSWER_WEIGHT)
        made.text(value, value_weight)
        made.text(".\n", ANSWER_WEIGHT)
        made.special(END_THINK, ANSWER_WEIGHT)
        made.text("\n\n", ANSWER_WEIGHT)
    else:
        made.special(THINK, GIVEN)
        made.text("\n\n", GIVEN)
        made.special(END_THINK, GIVEN)
        made.text("\n\n", GIVEN)
        prompt_end = len(made.tokens)
    made.text(fact.value, value_weight)
    made.special(IM_END, ANSWER_WEIGHT)
    return prompt_end


def tokenizer_texts(seed: int, sentences: Sequence[str], n_documents: int = 1500) -> list[str]:
    """What the tokenizer is trained on: documents like those of the rows, and the words of questions and answers."""
    texts = []
    for index in range(n_documents):
        rng = random.Random(f"{seed}/tokenizer/{index}")
        task: Kind = "sections" if rng.random() < 0.3 else "statements"
        filler = Filler(sentences, pick(rng, _FILLER_SHARES) if sentences else 0.0)
        document = make_document(rng, task, 3000, len, n_facts=8, filler=filler, breaks=pick(rng, _BREAKS))
        placed: PlacedFact = pick(rng, document.facts)
        words, value = thought(placed.fact)
        prompt = pick(rng, _PROMPTS).replace("{name}", pick(rng, _FILE_NAMES) + pick(rng, _FILE_KINDS))
        question = pick(rng, _QUESTIONS).format(attribute=placed.fact.attribute, entity=placed.fact.entity)
        texts.append("user\n" + prompt.replace("{text}", document.text).replace("{question}", question))
        texts.append(f"assistant\n\n{words}{value}.\n\n\n{placed.fact.value}")
    return texts
