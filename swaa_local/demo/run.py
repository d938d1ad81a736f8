"""`swaa-local demo`: the whole story on the bundled model.

One document, and the same questions to full attention, to a naive window, to each strategy alone and to the file's
schedule, which has several: without its tail, with it, and after thinking.
Decides what is asked of whom and keeps count; how it looks is in `terminal`. Each contestant has its own context and
reads the document once: questions share it as the prompt's beginning.
"""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from swaa_local.engine.options import EngineOptions
from swaa_local.errors import SWAAError
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.needle import documents as facts
from swaa_local.schedule.variants import Variant, parse_variants
from swaa_local.tasks.facts_task import spread
from swaa_local.tasks.scoring import MISS, score

MAX_LENGTH = 7680
"""Tokens, where the user does not say: more takes too long."""
_QUESTIONS_A_DOCUMENT = 30
_THINK_TOKENS, _ANSWER_TOKENS = 64, 24
_CHAT_ROOM = 512  # tokens of the model's context, for talking about the document afterwards
_ROOM = 160  # tokens behind the document: question, template, thought and answer
_KIND: facts.Kind = "sections"
_WARM_UP_TOKENS = 64
_UBATCH = 256

_ROWS = (
    ("full attention", "full direct"),
    ("naive window", "naive direct"),
    ("window, sinks", "naive sinks direct"),
    ("window, FA decode", "naive fadec direct"),
    ("window, full layers", "naive layers direct"),
    ("window, thinking first", "naive think"),
    (WITHOUT_TAIL := "file's schedule, no tail", "file tail0 direct"),
    (OF_FILE := "file's schedule", "file direct"),
    (THINKING := "file's schedule, thinking first", "file think"),
)
"""What a row is called, and the variant it is. A file whose schedule has no tail has no row without it."""


class DemoError(SWAAError, ValueError):
    """A demo that cannot be given as asked."""


@dataclass(frozen=True)
class Verdict:
    answer: str
    correct: bool


@dataclass
class Row:
    """A contestant and how it does. prefill_tokens, prefill_s: of all documents so far."""

    title: str
    variant: Variant
    kv_bytes: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def right(self) -> int:
        return sum(verdict.correct for verdict in self.verdicts)


@dataclass(frozen=True)
class Asked:
    """A question of the demo. depth: of the fact in the document; number: from 1."""

    number: int
    document: facts.Document
    placed: facts.PlacedFact

    @property
    def depth(self) -> float:
        return self.document.depth(self.placed)


class View:
    """Takes what happens. This one is silent."""

    def begin(self, model: str, rows: Sequence[Row], n_questions: int) -> None:
        """The contestants are known."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def document(self, document: facts.Document, n_tokens: int, window: int) -> None:
        """A document was written; n_tokens is its length."""

    def reading(self, row: Row, done: int, total: int) -> None:
        """A contestant has read so many tokens of the document; at the end its figures are in its row."""

    def asking(self, asked: Asked) -> None:
        """The next question."""

    def answered(self, row: Row) -> None:
        """A contestant has answered; the verdict is its row's last."""

    def end(self) -> None:
        """All questions are answered."""


@dataclass(frozen=True)
class Outcome:
    rows: tuple[Row, ...]
    questions: tuple[Asked, ...]
    window: int
    prompt_tokens: int
    """Of the first document as it was read."""


def run_demo(
    model: Path, *, n_questions: int, seed: int, length: int | None, engine: EngineOptions, view: View | None = None
) -> Outcome:
    """Give the demo. length: of the prompts with their answers, in tokens; None: about what the model was
    trained for, but not more than `MAX_LENGTH`.

    Raises `DemoError` for a model without a schedule or a length that holds no document.
    """
    from swaa_local.engine.context_length import TrainedLengthWarning, beyond_training
    from swaa_local.generation.answer import Answerer
    from swaa_local.llama import Llama

    view = view or View()
    info, of_file = read_model_info(model), read_schedule(model)
    if of_file is None:
        why = f"none can apply: {info.unsupported}" if info.unsupported else "swaa-local convert adds one"
        raise DemoError(f"{model} has no schedule to show; {why}")
    length = length or min(MAX_LENGTH, (info.n_ctx_train or MAX_LENGTH) - _CHAT_ROOM)
    if said := beyond_training(length, info.n_ctx_train):
        view.note(said)
    shown = [(title, words) for title, words in _ROWS if title != WITHOUT_TAIL or of_file.active_tail]
    variants = parse_variants(",".join(words for _, words in shown), info.layers, of_file)
    rows = [Row(title, variant) for (title, _), variant in zip(shown, variants, strict=True)]
    with ExitStack() as stack:
        answerers = []
        for row in rows:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TrainedLengthWarning)  # the view has said so
                llm = Llama(str(model), swaa=row.variant.schedule, n_ctx=length, **_without_log(engine).arguments())
            stack.callback(llm.close)
            answerers.append(Answerer(llm, think=row.variant.think, think_tokens=_THINK_TOKENS))
            row.kv_bytes = llm.kv_bytes
        view.begin(model.name, rows, n_questions)
        rng = random.Random(f"{seed}/demo")
        questions: list[Asked] = []
        prompt_tokens = 0
        while len(questions) < n_questions:
            n = min(n_questions - len(questions), _QUESTIONS_A_DOCUMENT)
            document = _write(rng, length, answerers[0].count, max(n, 16))
            asked = list(_choose(document, n, len(questions)))
            shared = [_shared_tokens(answerer, document) for answerer in answerers]
            view.document(document, len(shared[0]), of_file.window)
            prompt_tokens = prompt_tokens or len(shared[0])
            for row, answerer, tokens in zip(rows, answerers, shared, strict=True):
                _read(row, answerer, tokens, view)
            for question in asked:
                view.asking(question)
                for row, answerer in zip(rows, answerers, strict=True):
                    row.verdicts.append(_answer(answerer, question))
                    view.answered(row)
            questions += asked
        view.end()
    return Outcome(tuple(rows), tuple(questions), of_file.window, prompt_tokens)


def _without_log(engine: EngineOptions) -> EngineOptions:
    """Few threads and small parts where the user does not say.

    More threads gain a small model little, and cost it much on busy cores. The buffers of full attention grow with the
    parts, and all contestants hold theirs at the same time.
    """
    few = max(1, min(4, (os.cpu_count() or 2) // 2))
    if not (engine.n_threads or engine.n_threads_batch):
        engine = replace(engine, n_threads=few)
    return engine if engine.n_ubatch or engine.n_batch else replace(engine, n_ubatch=_UBATCH)


def _write(rng: random.Random, length: int, count: Any, n_facts: int) -> facts.Document:
    """A document that leaves room for a question and its answer."""
    empty = count("")
    frame = count(facts.PROMPT.format(text="", question=""))
    room = length - frame - _ROOM
    try:
        return facts.make_document(
            rng, _KIND, room, lambda sentence: count(sentence) - empty, n_facts=min(n_facts, max(2, room // 100))
        )
    except ValueError:
        raise DemoError(f"{length} tokens hold no document with facts; ask for a longer --length") from None


def _choose(document: facts.Document, n: int, n_before: int) -> Iterator[Asked]:
    """Different facts, spread over the document; some again if it has not as many."""
    left: list[facts.PlacedFact] = []
    for i in range(n):
        left = left or list(document.facts)
        depth = spread(i + 1)
        placed = min(left, key=lambda fact: abs(document.depth(fact) - depth))
        left.remove(placed)
        yield Asked(n_before + i + 1, document, placed)


def _shared_tokens(answerer: Any, document: facts.Document) -> list[int]:
    """The beginning that the prompts of all questions about the document have in common."""
    prompts = [answerer.prompt(facts.PROMPT.format(text=document.text, question=q)).tokens for q in ("What", "Is")]
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))]


def _read(row: Row, answerer: Any, tokens: list[int], view: View) -> None:
    llm = answerer.llm
    llm.on_prefill = None
    llm.reset()
    llm.eval(tokens[:_WARM_UP_TOKENS])  # the first evaluation of a context also reads weights
    llm.reset()
    llm.on_prefill = lambda done, total: view.reading(row, done, total)
    started = time.perf_counter()
    llm.eval(tokens, ends_prompt=False)  # the question follows
    row.prefill_s += time.perf_counter() - started
    row.prefill_tokens += len(tokens)
    llm.on_prefill = None
    view.reading(row, len(tokens), len(tokens))


def _answer(answerer: Any, question: Asked) -> Verdict:
    document, placed = question.document, question.placed
    answer = answerer.ask(answerer.prompt(document.prompt(placed)), _ANSWER_TOKENS, reuse=True)
    others = [other.fact.value for other in document.facts if other is not placed]
    scored = score(answer.text, [placed.fact.value], "value", others) if answer.finish == "stop" else MISS
    return Verdict(answer.text or "(no end to its thinking)", scored.correct)
