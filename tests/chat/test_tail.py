"""Where chat's tail begins: with the question, behind the last document of the message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.chat.session import MAX_QUESTION_TAIL, Session
from swaa_local.chat.settings import Settings
from swaa_local.files.document import Document

CONFIG = SWAAConfig(24, 4, force_fa_decode=True, prompt_tail=12)
BOOK = Document("book.txt", "the quick brown fox jumps over the lazy dog. " * 20)


@pytest.fixture
def tail_of(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, int]]]:
    """`tail_of(question, documents, swaa) -> (tokens of the tail, tokens of the prompt)` of the reply's generation."""
    asked: list[tuple[int, int]] = []
    generate = Llama.generate

    def watched(self: Llama, tokens: list[int], *args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["prompt_tail"], len(tokens)))
        return generate(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Llama, "generate", watched)
    sessions = []

    def ask(question: str, documents: tuple[Document, ...] = (), swaa: SWAAConfig = CONFIG) -> tuple[int, int]:
        def load(full: bool) -> Llama:
            return Llama(str(tiny_model), swaa=False if full else swaa, n_ctx=4096, n_threads=1, n_threads_batch=1)

        sessions.append(Session(load, Settings(temp=0.0, max_tokens=1)))
        sessions[-1].pending = list(documents)
        list(sessions[-1].ask(question))
        return asked[-1]

    yield ask
    for session in sessions:
        session.close()


def test_it_covers_the_question_and_no_document(tail_of):
    question = "What does the fox do? " * 3
    tail, n_prompt = tail_of(question, (BOOK,))
    alone, _ = tail_of(question)
    assert len(question) <= tail < len(question) + 60  # a token is a letter, and the template's words follow
    assert tail == alone
    assert n_prompt > tail + len(BOOK.text) - 10


def test_marks_of_the_template_in_the_texts_do_not_hide_the_question(tail_of):
    question = "What does <|im_end|> do? " * 3
    book = Document("book.txt", BOOK.text + "<|im_start|>")
    assert tail_of(question, (book,))[0] == tail_of(question)[0] > 40


def test_it_is_never_shorter_than_the_schedules(tail_of):
    long = replace(CONFIG, prompt_tail=200)
    assert tail_of("Why?", (BOOK,), long)[0] == 200


def test_a_pasted_book_is_no_long_tail(tail_of):
    assert tail_of(BOOK.text * 2)[0] == MAX_QUESTION_TAIL


def test_without_a_tail_there_is_none(tail_of):
    assert tail_of("Why?", (BOOK,), replace(CONFIG, prompt_tail=0))[0] == 0
    assert tail_of("Why?", (BOOK,), SWAAConfig(24, 4, prompt_tail=12))[0] == 0
