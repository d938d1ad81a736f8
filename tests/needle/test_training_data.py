"""What the bundled model is trained on: tokens, weights, and independence of who makes the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest

pytest.importorskip("tokenizers", reason="tokenizers, which transformers needs, is not installed")

from needle.docstrings import is_prose, read_docstrings
from needle.rows import _CHAT_PROMPT, VALUE_WEIGHT, RowKind, RowMaker, tokenizer_texts
from needle.tokenizer import CHAT_TEMPLATE, ENDOFTEXT, IM_END, IM_START, SPECIALS, THINK, Encoder, train_tokenizer
from swaa_local.files.document import Document, compose_message
from swaa_local.needle.documents import KINDS, Kind

SENTENCES = [
    "Return the sum of all elements, or zero where there are none.",
    "Raises ValueError if x-ray_2 (the 3rd argument) is not in range(10).",
    "It's what the caller's caller wants; see also the 'name' of the class.",
]
KIND = RowKind(512, 0.5)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer(tokenizer_texts(0, SENTENCES, 200), 1200))


@pytest.fixture(scope="module")
def maker(encoder: Encoder) -> RowMaker:
    return RowMaker(encoder, 7, SENTENCES)


@pytest.fixture(scope="module")
def decode(encoder: Encoder) -> Callable[[list[int]], str]:
    return lambda tokens: encoder._tokenizer.decode(tokens, skip_special_tokens=False)


def test_the_tokenizer_has_bytes_digits_and_its_special_tokens_last(encoder: Encoder) -> None:
    assert [encoder.special[name] for name in SPECIALS] == list(range(1195, 1200))
    assert len(encoder.encode("40417")) == 5
    for text in ("naïve 漢字 🙂\n\ttab", "The pin code of Ada Klein is 40417.\n\n", "  two  spaces  "):
        assert encoder._tokenizer.decode(encoder._tokenizer.encode(text).ids) == text


def test_the_same_texts_give_the_same_tokenizer(encoder: Encoder) -> None:
    again = train_tokenizer(tokenizer_texts(0, SENTENCES, 200), 1200)
    assert again.to_str() == encoder._tokenizer.to_str()


def test_too_few_texts_for_the_vocabulary_are_an_error() -> None:
    with pytest.raises(ValueError, match="not 2048; train on more"):
        train_tokenizer(["a b c"])


def test_the_fast_encoder_is_the_tokenizer(
    encoder: Encoder, maker: RowMaker, decode: Callable[[list[int]], str]
) -> None:
    for index in range(60):
        tokens = maker.row(index, KIND).tokens
        assert encoder._tokenizer.encode(decode(tokens), add_special_tokens=False).ids == tokens
    for sentence in SENTENCES:
        assert encoder.encode(sentence) == encoder._tokenizer.encode(sentence).ids


def test_a_row_depends_on_seed_and_index_alone(encoder: Encoder, maker: RowMaker) -> None:
    fresh = RowMaker(Encoder(encoder._tokenizer), 7, SENTENCES)
    tokens, weights = fresh.batch(40, 4, KIND)
    assert tokens.shape == weights.shape == (4, 512)
    for offset in (2, 0):
        row = maker.row(40 + offset, KIND)
        assert tokens[offset].tolist() == row.tokens
        assert weights[offset].tolist() == pytest.approx(row.weights)
    assert RowMaker(encoder, 8, SENTENCES).row(40, KIND) != maker.row(40, KIND)


def test_a_row_that_holds_no_document_is_an_error(maker: RowMaker) -> None:
    with pytest.raises(ValueError, match="2 facts alone are"):
        maker.row(0, RowKind(128, 0.0))


def test_rows_are_full_and_of_both_tasks(encoder: Encoder, maker: RowMaker) -> None:
    rows = [maker.row(index, KIND) for index in range(100)]
    assert all(len(row.tokens) == len(row.weights) == 512 for row in rows)
    padding = sum(row.tokens.count(encoder.special[ENDOFTEXT]) for row in rows) / (512 * len(rows))
    assert padding < 0.1
    for weight in VALUE_WEIGHT.values():
        assert 25 < sum(weight in row.weights for row in rows) < 75
    alone = [maker.row(index, RowKind(512, 0.0)) for index in range(20)]
    assert not any(VALUE_WEIGHT["sections"] in row.weights for row in alone)


def test_replies_are_learnt_and_what_is_given_is_not(
    encoder: Encoder, maker: RowMaker, decode: Callable[[list[int]], str]
) -> None:
    thoughts = replies = 0
    for index in range(40):
        row = maker.row(index, RowKind(1024, 0.5))
        tokens, weights = row.tokens, row.weights
        starts = [i for i, token in enumerate(tokens) if token == encoder.special[IM_START]]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            turn, weight = tokens[start:end], weights[start:end]
            if decode(turn).startswith("<|im_start|>user"):
                assert set(weight) <= {0.0, 0.15}
                continue
            values = decode([t for t, w in zip(turn, weight, strict=True) if w in VALUE_WEIGHT.values()])
            if not values:
                continue  # bare history
            replies += 1
            answer = decode(turn).partition("</think>\n\n")[2].partition(IM_END)[0]
            assert weight[turn.index(encoder.special[IM_END])] == 1.0
            if weight[turn.index(encoder.special[THINK])] == 1.0:
                thoughts += 1
                assert values == f" {answer}{answer}"
                assert "The text says that the " in decode(turn)
            else:
                assert values == answer
    assert 0.4 < thoughts / replies < 0.7  # 60 % of those that are tried; in a full row a short reply may still fit


def test_values_in_the_document_have_no_weight(
    encoder: Encoder, maker: RowMaker, decode: Callable[[list[int]], str]
) -> None:
    row = maker.row(3, RowKind(512, 0.0))
    end = row.tokens.index(encoder.special[IM_END])
    learnt = decode([t for t, w in zip(row.tokens[:end], row.weights[:end], strict=True) if w])
    given = decode([t for t, w in zip(row.tokens[:end], row.weights[:end], strict=True) if not w])
    answer = decode(row.tokens).partition("</think>\n\n")[2].partition(IM_END)[0]
    assert answer
    assert answer in given
    assert answer not in learnt


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("task", KINDS)
def test_a_question_is_what_the_chat_template_makes(
    encoder: Encoder, maker: RowMaker, decode: Callable[[list[int]], str], task: Kind, think: bool
) -> None:
    question = maker.question(5, task, 1024, think=think)
    assert 900 < len(question.tokens) <= 1024
    prompt, reply = decode(question.tokens[: question.prompt_end]), decode(question.tokens[question.prompt_end :])
    message = prompt.removeprefix("<|im_start|>user\n").partition(IM_END)[0]
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    rendered = template.render(
        messages=[{"role": "user", "content": message}], add_generation_prompt=True, enable_thinking=think
    )
    assert prompt == rendered
    assert encoder._tokenizer.encode(rendered, add_special_tokens=False).ids == question.tokens[: question.prompt_end]
    value = reply.rpartition("</think>\n\n")[2].removesuffix(IM_END)
    assert decode(question.tokens[question.value :]).lstrip().startswith(f"{value}.")
    asked = message.rpartition(" of ")[2].removesuffix("?")
    assert decode(question.tokens[question.name :]).lstrip().startswith(asked)
    assert question.name < question.value < question.prompt_end


def test_the_model_knows_how_chat_puts_a_document_into_a_message() -> None:
    composed = compose_message("Why?", [Document("a.txt", "Some text.")])
    assert composed == _CHAT_PROMPT.format(name="a.txt", text="Some text.", question="Why?")


def test_docstrings_are_prose(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '"""Do what has to be done, slowly. X = f(y)\n\nAnother sentence that spans\ntwo lines."""\n'
        'def f():\n    """Return the number 12345 of the call, always."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""This is in a folder of tests alone."""\n')
    assert read_docstrings(tmp_path) == ["Another sentence that spans two lines.", "Do what has to be done, slowly."]
    assert not is_prose("Call f(x)[0] and `g` = h.")
