"""The user's own texts as examples: long prompts with questions, and full attention's own answers as the target.

Texts are cut into pieces that fill a row. Half of the questions ask for a sentence by the one before it, half are asked
by the model itself about a short passage; the answers are what the untuned model says with full attention. Nothing
leaves the machine. Knows texts and models; nothing of training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from swaa_local.files.document import Document, DocumentError, compose_message, read_document
from swaa_local.report.progress import Reporter
from swaa_local.schedule.config import Schedule
from swaa_local.tasks.essay import split_sentences
from swaa_local.text.printable import printable
from swaa_local.tune.examples import Example, Renderer
from swaa_local.tune.model import BaseModel, precision
from swaa_local.tune.request import TuneError

_ANSWER_TOKENS, _QUESTION_TOKENS = 96, 48
_PASSAGE_CHARS = 1200
_LEAST_WORDS = 6  # of a sentence that is asked by
_LEAST_SHARE = 0.5  # of a row that a piece fills where its text is long enough
_BOUNDARY = re.compile(r"""\n+|(?<=[.!?])["')\]\u2019\u201d]*\s+""")
_WORDS = re.compile(r"(?:\S+\s*|\s+){1,40}")
_QUOTE = (
    "In the text there is this sentence:\n{sentence}\nWhich sentence comes right after it? Answer with that sentence "
    "alone, word for word."
)
_ASK = "{passage}\n\nWrite one short question about a detail of this text. Write the question and nothing else."


@dataclass(frozen=True)
class Piece:
    """A part of a text that is given whole, and where it is from."""

    document: Document
    where: str


def read_texts(path: Path, reporter: Reporter) -> list[Document]:
    """A text file, or all text files of a folder; what is no text is told.

    Raises `TuneError` or `DocumentError`.
    """
    if not path.is_dir():
        return [read_document(str(path))]
    texts, others = [], []
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")):
        try:
            texts.append(read_document(str(file)))
        except DocumentError:
            others.append(file.name)
    if others:
        told = ", ".join(map(printable, others[:3])) + (", ..." if len(others) > 3 else "")
        reporter.note(f"left out of {path}: {len(others)} files that are no text ({told})")
    if not texts:
        raise TuneError(f"{path} holds no text file")
    return texts


def make_pieces(
    texts: Sequence[Document], n: int, n_tokens: int, count: Callable[[str], int], seed: int, reporter: Reporter
) -> list[Piece]:
    """`n` pieces of at most `n_tokens`: whole texts that fit, and parts of those that do not, from anywhere in them,
    which begin and end with a sentence or a line. Each text gets as many as its length calls for."""
    rng = random.Random(seed)
    cut = [_parts(document.text) for document in texts]
    sizes = [len(document.text) for document in texts]
    is_long = [count(document.text) > n_tokens for document in texts]
    if any(is_long):
        reporter.note(
            f"{sum(is_long)} of {len(texts)} texts are longer than a row: they are split into pieces of {n_tokens} "
            "tokens"
        )
    # Those that begin late enough to fill a good part of a row all begin as likely.
    late = [_last_start(parts, int(_LEAST_SHARE * n_tokens), count) for parts in cut]
    pieces = []
    for index in range(n):
        number = index if n <= len(texts) else rng.choices(range(len(texts)), sizes)[0]
        parts, name = cut[number], texts[number].name
        start = rng.randrange(late[number] + 1) if is_long[number] else 0
        taken = "".join(parts[start : start + _fill(parts[start:], n_tokens, count)]).strip()
        if not taken:
            raise TuneError(f"{name} has a line of more than {n_tokens} tokens; pass a larger --length")
        pieces.append(Piece(Document(name, taken), f"{name}, piece {index + 1}"))
    return pieces


def _parts(text: str) -> list[str]:
    """Sentences and lines with the white space behind them; those that are long are cut between words, so that a piece
    can be filled. Joined they are the text."""
    ends = [match.end() for match in _BOUNDARY.finditer(text)]
    parts = (text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True))
    return [piece for part in parts for piece in _WORDS.findall(part) if piece]


def _fill(parts: Sequence[str], n_tokens: int, count: Callable[[str], int]) -> int:
    """How many of the first ones are at most so many tokens together."""
    low, high = 0, len(parts)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count("".join(parts[:middle])) <= n_tokens else (low, middle - 1)
    return low


def _last_start(parts: Sequence[str], n_tokens: int, count: Callable[[str], int]) -> int:
    """The last part from which on there are at least so many tokens; 0 where there are not so many at all."""
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count("".join(parts[middle:])) >= n_tokens else (low, middle - 1)
    return low


class Teacher:
    """The untuned model with full attention, which asks and answers greedily."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._full = Schedule.full(base.source.n_layer)

    def say(self, prompt: Sequence[int], n: int) -> tuple[int, ...]:
        """At most `n` tokens behind a prompt, with the one that ends them if they end."""
        base = self._base
        base.masks.set([(len(prompt), len(prompt))], self._full)
        tokens = torch.tensor([list(prompt)], device=base.device)
        with torch.inference_mode(), precision(base.device):
            found = base.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=n,
                do_sample=False,
                eos_token_id=list(base.ends),
                pad_token_id=base.ends[0],
                use_cache=True,
            )
        return tuple(found[0, len(prompt) :].tolist())


def room_for_text(renderer: Renderer, length: int) -> int:
    """Tokens of text that a row of `length` has room for, with a question and its answer. Raises `TuneError`."""
    empty = compose_message(_QUOTE.format(sentence=""), [Document("name", "")])
    around = len(renderer.prompt([{"role": "user", "content": empty}]))
    room = length - around - 2 * _ANSWER_TOKENS
    if room < _ANSWER_TOKENS:
        raise TuneError(
            f"a row of {length} tokens has no room for a text, a question and an answer; pass a larger --length"
        )
    return room


def distill(
    pieces: Sequence[Piece],
    teacher: Teacher,
    renderer: Renderer,
    seed: int,
    on_piece: Callable[[int], None] = lambda done: None,
) -> tuple[list[Example], int]:
    """One question about each piece with full attention's answer; and how many pieces had none that could be asked."""
    examples, failed = [], 0
    for index, piece in enumerate(pieces):
        example = _ask(piece, teacher, renderer, random.Random(f"{seed}/{index}"), quote=index % 2 == 0)
        if example is None:
            failed += 1
        else:
            examples.append(example)
        on_piece(index + 1)
    return examples, failed


def _ask(piece: Piece, teacher: Teacher, renderer: Renderer, rng: random.Random, *, quote: bool) -> Example | None:
    if renderer.special_token_in(piece.document.text + piece.document.name):
        return None  # a text that spells marks of the template would be read as these
    question = _quote_question(piece, rng) if quote else _own_question(piece, teacher, renderer, rng)
    if question is None:
        return None
    prompt = renderer.prompt([{"role": "user", "content": compose_message(question, [piece.document])}])
    answer = teacher.say(prompt, _ANSWER_TOKENS)
    if not renderer.decode(answer).strip():
        return None
    return Example((*prompt, *answer), len(prompt), piece.where, teacher=True)


def _quote_question(piece: Piece, rng: random.Random) -> str | None:
    sentences = split_sentences(" ".join(piece.document.text.split()))
    fit = [
        sentence
        for sentence in sentences[:-1]
        if _LEAST_WORDS <= len(sentence.split()) <= 40 and sentences.count(sentence) == 1
    ]
    return _QUOTE.format(sentence=rng.choice(fit)) if fit else None


def _own_question(piece: Piece, teacher: Teacher, renderer: Renderer, rng: random.Random) -> str | None:
    text = piece.document.text
    start = rng.randrange(max(1, len(text) - _PASSAGE_CHARS))
    passage = text[start : start + _PASSAGE_CHARS]
    passage = "".join(_parts(passage)[1:-1]).strip() or passage
    prompt = renderer.prompt([{"role": "user", "content": _ASK.format(passage=passage)}])
    lines = renderer.decode(teacher.say(prompt, _QUESTION_TOKENS)).strip().splitlines()
    question = re.sub(r"^\W*(question\W+)?", "", lines[0], flags=re.IGNORECASE).strip(" \"'*") if lines else ""
    return question if len(question.split()) >= 3 and not renderer.special_token_in(question) else None
