"""Questions about long texts: how long they are, where the answers stand, and that a seed makes them again."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from swaa_local.calibrate.haystack import Haystack, read_haystack, split_units
from swaa_local.calibrate.prompts import EASY, GENERATED, ROOM_TO_ANSWER, Maker
from swaa_local.calibrate.questions import divide, read_questions
from swaa_local.calibrate.results import CalibrateError
from swaa_local.files.document import DocumentError
from tests.support.program import ROOT

OVERHEAD = 20


def sentence_at(text: str, offset: int) -> str:
    return text[text[:offset].rindex(". ") + 2 : text.index(".", offset)]


DOCS = Haystack(split_units("\n\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))))


def count(text: str) -> int:
    """Tokens of a tokenizer that makes one of four characters: pieces have more together than alone."""
    return -(-len(text) // 4)


def maker(haystack: Haystack = Haystack(), **kwargs) -> Maker:  # noqa: B008 frozen
    return Maker(haystack, count, lambda message: count(message) + OVERHEAD, **kwargs)


@pytest.mark.parametrize("haystack", [Haystack(), DOCS], ids=["generated", "documents"])
@pytest.mark.parametrize(("length", "window"), [(1024, 128), (4096, 1024), (16384, 4096), (16384, 512)])
def test_prompts_have_the_length_and_answers_lie_beyond_the_window(haystack, length, window):
    for index in range(4):
        text = maker(haystack).text("search", length, window, index)
        tokens = [count(text.message(ask)) + OVERHEAD + ROOM_TO_ANSWER for ask in text.asks]
        assert 0.85 * length < min(tokens) <= max(tokens) <= length
        for ask in text.asks:
            assert ask.reference is not None
            assert ask.needle_at is not None
            assert text.text[ask.needle_at :].startswith(ask.reference)
            assert count(text.text[ask.needle_at :]) > window


def test_every_kind_is_asked_and_what_is_told_is_true():
    text = maker().text("search", 16384, 2048, 0)
    assert set(Counter(ask.kind for ask in text.asks)) == set(GENERATED)
    assert len(text.asks) == 16
    for ask in text.asks:
        if ask.kind in ("keys", "statements"):
            attribute, _, owner = ask.prefix.removeprefix("The ").removesuffix(" is").partition(" of ")
            assert ask.needle_at is not None
            sentence = sentence_at(text.text, ask.needle_at)
            assert attribute in sentence
            assert owner in sentence
        if ask.kind == "quotes":
            assert text.text.count(ask.prefix) == 1
            assert f"{ask.prefix} {ask.reference}" in text.text


def test_sentences_of_any_length_leave_room_for_the_questions():
    rng = random.Random(0)
    units = tuple("x" * rng.choice([10, 300, 1900]) + ". " for _ in range(3000))
    for index in range(60):
        text = maker(Haystack(units)).text("check", 2048, 64, index)
        assert max(count(text.message(ask)) + OVERHEAD + ROOM_TO_ANSWER for ask in text.asks) <= 2048


def test_a_section_fact_does_not_say_whose_it_is():
    text = maker().text("search", 16384, 2048, 0)
    for ask in (ask for ask in text.asks if ask.kind == "sections"):
        assert ask.needle_at is not None
        name = ask.prefix.split(" of ")[1].removesuffix(" is")
        assert name not in sentence_at(text.text, ask.needle_at)
        assert name in text.text[: ask.needle_at]


def test_the_same_seed_makes_the_same_text_and_another_another():
    first, again, other = (maker(seed=seed).text("search", 2048, 256, 0) for seed in (0, 0, 1))
    assert first == again
    assert first.digest == again.digest != other.digest
    assert maker().text("check", 2048, 256, 0).text != first.text


def test_the_check_reads_other_documents_than_the_search():
    units = tuple(f"Sentence number {i} is here. " for i in range(4000))
    search, check = (maker(Haystack(units)).text(part, 1024, 128, 0).text for part in ("search", "check"))
    assert not {unit for unit in units if unit in search} & {unit for unit in units if unit in check}


def test_easy_questions_are_of_keys_alone():
    assert {ask.kind for ask in maker(kinds=EASY).text("search", 1024, 128, 0).asks} == {"keys"}


def test_a_length_without_room_beyond_the_window_is_refused():
    with pytest.raises(CalibrateError, match="no room for questions whose answers lie more than 900 tokens"):
        maker().text("search", 1024, 900, 0)


def test_sentences_joined_are_the_text():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert "".join(split_units(text)) == text
    assert max(map(len, split_units("x" * 5000))) <= 2000
    assert split_units("One. Two!\nThree? 3.5 is one.") == ("One. ", "Two!\n", "Three? ", "3.5 is one.")


# The user's files


def test_a_folder_gives_its_text_files_and_says_what_is_left_out(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("First. ")
    (tmp_path / "two.md").write_text("Second. ")
    (tmp_path / ".hidden").write_text("No. ")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\xff")
    said: list[str] = []
    assert sorted("".join(read_haystack([str(tmp_path)], said.append).units).split()) == ["First.", "Second."]
    assert "image.png" in said[0]


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\0b")
    with pytest.raises(DocumentError, match="is not a text file"):
        read_haystack([str(tmp_path / "x.txt")])


def questions(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def line(text: str = "A text.", question: str = "What?", answer: str = "") -> str:
    import json

    return json.dumps({"text": text, "question": question} | ({"answer": answer} if answer else {}))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line()] * 3, "has 3 questions; give 4 at least"),
        (["{"], "line 1 is no JSON object"),
        ([line(), '{"text": "x"}'], "line 2 has the fields text; it needs text and question"),
        ([line(), '{"text": "x", "question": "y", "more": "z"}'], "line 2 has the fields more, question, text"),
        ([line(), '{"text": "x", "question": ""}'], "line 2 is no JSON object of texts"),
    ],
)
def test_questions_that_are_none_are_named_by_their_line(tmp_path, lines, said):
    with pytest.raises(CalibrateError, match=said):
        read_questions(questions(tmp_path / "q.jsonl", *lines))


def test_own_questions_are_divided_between_search_and_check(tmp_path):
    prose = "word " * 400
    lines = [
        line(f"The code of {i} is {i * 111}. {prose}", f"What is the code of {i}?", str(i * 111)) for i in range(8)
    ]
    own = divide(read_questions(questions(tmp_path / "q.jsonl", *lines)), 0, 1024, 128, count)
    asked = [{ask.question for text in part for ask in text.asks} for part in (own.search, own.check)]
    assert [len(part) for part in asked] == [4, 4]
    assert not asked[0] & asked[1]
    one_text = [line(f"Codes 111, 222, 333, 444. {prose}", f"Which is number {i}?", str(i * 111)) for i in range(1, 5)]
    own = divide(read_questions(questions(tmp_path / "q.jsonl", *one_text)), 0, 1024, 128, count)
    assert [len(part[0].asks) for part in (own.search, own.check)] == [2, 2]


def test_answers_inside_the_window_are_left_out_and_too_few_are_refused(tmp_path):
    prose = "word " * 400
    inside = [
        line(f"{prose} The code of {i} is {i * 111}.", f"What is the code of {i}?", str(i * 111)) for i in range(1, 6)
    ]
    found = read_questions(questions(tmp_path / "q.jsonl", *inside))
    with pytest.raises(CalibrateError, match=r"0 questions are left .* answers stand in the last 128 tokens"):
        divide(found, 0, 1024, 128, count)
    beyond = [line(f"The code is {i}. {prose}", "What is the code?", str(i)) for i in range(100, 104)]
    own = divide(read_questions(questions(tmp_path / "q.jsonl", *inside, *beyond)), 0, 1024, 128, count)
    assert sum(len(text.asks) for text in own.all) == 4
    assert own.left_out == ("5 questions were left out: their answers stand in the last 128 tokens",)
    short = [line(f"Text {i}.", "What?") for i in range(5)]
    with pytest.raises(CalibrateError, match="5 questions about texts that a window of 128 tokens shows whole"):
        divide(read_questions(questions(tmp_path / "q.jsonl", *short)), 0, 1024, 128, count)


def test_nothing_but_the_seed_decides():
    random.seed(0)
    first = maker().text("search", 1024, 128, 0)
    random.seed(1)
    assert maker().text("search", 1024, 128, 0) == first
