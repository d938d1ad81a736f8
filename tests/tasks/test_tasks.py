"""The tasks of eval against RULER's rules, written down here by hand from its configuration and generators.

Source: NVIDIA/RULER, scripts/synthetic.yaml and scripts/data/synthetic/*.py. Tokens are words here.
"""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from swaa_local.tasks import GROUPS, TASKS, Question, TaskError, make_tasks
from swaa_local.tasks.essay import Essay, read_essay, split_sentences
from swaa_local.tasks.facts_task import spread

# keys, values of each key, keys asked for, type of key, type of value
NEEDLES = {
    "niah_single_1": (1, 1, 1, "word", "number"),
    "niah_single_2": (1, 1, 1, "word", "number"),
    "niah_single_3": (1, 1, 1, "word", "uuid"),
    "niah_multikey_1": (4, 1, 1, "word", "number"),
    "niah_multikey_2": (1, 1, 1, "word", "number"),
    "niah_multikey_3": (1, 1, 1, "uuid", "uuid"),
    "niah_multivalue": (1, 4, 1, "word", "number"),
    "niah_multiquery": (4, 1, 4, "word", "number"),
}
HAYSTACK = " ".join(f"Sentence {i} has its own words." for i in range(50))
FORM = {
    "word": r"[a-z]+-[a-z]+",
    "number": r"[1-9]\d{6}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}
FRAME = 7  # tokens of a chat template


def count(prompt: str, answer_prefix: str = "") -> int:
    return FRAME + len(f"{prompt} {answer_prefix}".split())


def make(name: str, length: int = 1000, index: int = 0, seed: int = 0) -> Question:
    [task] = make_tasks([name], Essay(tuple(HAYSTACK.split())))
    return task.make(random.Random(f"{seed}/{index}"), length, index, count)


def needles(question: Question) -> list[tuple[str, str]]:
    return re.findall(r"One of the secret \w+ of (\S+) is: (\S+)\.", question.prompt)


# All tasks


@pytest.mark.parametrize("name", TASKS)
def test_questions_fill_their_length_and_no_more(name):
    for length in (700, 5000):
        question = make(name, length)
        used = count(question.prompt, question.answer_prefix) + question.max_tokens
        assert length - 60 <= used <= length


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_makes_the_same_question_and_another_another(name):
    assert make(name) == make(name)
    assert make(name).references != make(name, seed=1).references
    assert make(name).references != make(name, index=1).references


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_holds_no_question_is_refused(name):
    with pytest.raises(TaskError, match=f"{name} needs more than 100 tokens; ask for a longer --length"):
        make(name, 100)


@pytest.mark.parametrize(
    ("name", "tokens"), {"niah_single_1": 128, "niah_multiquery": 128, "vt": 30, "cwe": 120, "fwe": 50}.items()
)
def test_answers_may_be_as_long_as_rulers(name, tokens):
    assert make(name).max_tokens == tokens


# Needles


@pytest.mark.parametrize("name", [*NEEDLES, *GROUPS["ruler-synth"]])
def test_needles_are_as_many_and_of_the_kinds_that_ruler_has(name):
    n_keys, n_values, n_queries, key_form, value_form = NEEDLES[name.removesuffix("-synth")]
    question = make(name)
    found = needles(question)
    values = dict[str, list[str]]()
    for key, value in found:
        values.setdefault(key, []).append(value)
        assert re.fullmatch(FORM[key_form], key)
        assert re.fullmatch(FORM[value_form], value)
    assert len({value for _, value in found}) == len(found)
    among_needles = name in ("niah_multikey_2", "niah_multikey_3")
    assert (len(values) > 20) if among_needles else (len(values) == n_keys)
    assert {len(each) for each in values.values()} == {n_values}
    last_line = question.prompt.splitlines()[-1]
    asked = [key for key in values if key in last_line]
    assert len(asked) == n_queries
    assert all(key in question.answer_prefix for key in asked)
    assert sorted(question.references) == sorted(value for key in asked for value in values[key])


def test_the_question_agrees_in_number_with_what_is_asked():
    one, four = make("niah_single_1"), make("niah_multiquery")
    assert "What is the secret number of " in one.prompt
    assert one.answer_prefix.endswith("mentions is")
    assert re.search(r"What are all the secret numbers of \S+, \S+, \S+, and \S+ that", four.prompt)
    assert four.answer_prefix.endswith("mentions are")


def test_a_needle_among_noise_stands_between_whole_lines():
    lines = make("niah_single_1").prompt.splitlines()[1:-1]
    noise = Counter(lines).most_common(1)[0][0]
    assert noise.count(".") == 5
    assert len([line for line in lines if line != noise]) == 1


def test_the_depth_of_a_single_needle_is_where_its_value_stands():
    depths = []
    for index in range(40):
        question = make("niah_single_1", 2000, index)
        assert question.needle_at is not None
        assert question.depth is not None
        assert question.prompt[question.needle_at :].startswith(question.references[0])
        assert question.depth == pytest.approx(question.needle_at / len(question.prompt), abs=0.06)
        depths.append(question.depth)
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert make("niah_multivalue").depth is None


def test_an_essay_keeps_its_words_and_needles_stand_between_sentences():
    question = make("niah_multikey_1", 1000)
    body = "\n".join(question.prompt.splitlines()[1:-1])
    rest = re.sub(r"One of the secret \w+ of \S+ is: \S+\. ?", "", body).strip()
    words = HAYSTACK.split()
    assert rest.split() == (words * 4)[: len(rest.split())]  # the text is repeated where it is too short
    for before in re.findall(r"(\S+) One of the secret", body):
        assert before.endswith(".")


def test_needles_stand_at_different_ones_of_rulers_forty_depths():
    essay = "\n".join(f"Sentence {i} has its own words." for i in range(50))
    [task] = make_tasks(["niah_multivalue"], Essay(tuple(essay.split())))
    question = task.make(random.Random(1), 128 + FRAME + 40 + 6 * 40 + 4 * 9, 0, count)
    body = question.prompt.splitlines()[1]
    n_sentences = len(re.findall(r"Sentence \d+", body))
    places = [len(re.findall(r"Sentence \d+", body[: m.start()])) for m in re.finditer("One of the secret", body)]
    grid = {int(n_sentences * round(100 * i / 39) / 100) for i in range(40)}
    assert set(places) <= grid


def test_sentences_end_at_marks_before_capitals_and_join_to_the_text():
    text = 'He paid 3.50 in total. "Is it 5 p.m. now?" she asked. (Yes.) It was. 7 men left! e.g. this'
    assert split_sentences(text) == [
        "He paid 3.50 in total.",
        '"Is it 5 p.m. now?" she asked.',
        "(Yes.)",
        "It was.",
        "7 men left! e.g. this",
    ]
    assert " ".join(split_sentences(text)) == text


def test_a_haystack_must_be_a_text(tmp_path):
    for data, reason in ((b" \n", "is empty"), (b"a\xff", r"not UTF-8 \(byte 2\)")):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(TaskError, match=reason):
            read_essay(tmp_path / "a.txt")
    with pytest.raises(TaskError, match="No such file"):
        read_essay(tmp_path / "nope.txt")


# Variable tracking


def test_a_chain_of_four_hops_follows_a_solved_example():
    question = make("vt", 2000)
    example, main = re.split(r"\n\n\n+(?=Follow)", question.prompt)
    for text, letters in ((example, 3), (main, 5)):
        first = re.search(rf"^VAR ([A-Z]{{{letters}}}) = (\d{{5}})$", text, re.M)
        assert first
        names = [first[1]]
        for name, source in re.findall(rf"^VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}})$", text, re.M):
            assert source == names[-1]
            names.append(name)
        assert len(names) == 5
        if text is main:
            assert question.references == tuple(names)
            assert f"5 variables have the value {first[2]}" in question.answer_prefix
        else:
            assert text.endswith(" ".join(names))
        assert f"the value {first[2]}?" in text
    assert count(example) < 500 + FRAME


# Common and frequent words


def numbered(text: str) -> list[str]:
    found = re.findall(r"(\d+)\. (\w+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(2000, 6, 1, (20, 3, 1)), (4096, 30, 3, (40, 10, 3))]
)
def test_ten_words_are_common_as_often_as_rulers(length, often, seldom, example):
    question = make("cwe", length)
    lists = [numbered(line) for line in question.prompt.splitlines() if line.startswith("1. ")]
    for words, (common, uncommon) in zip(lists, ((example[1], example[2]), (often, seldom)), strict=True):
        times = Counter(Counter(words).values())
        assert set(times) == {common, uncommon}
        assert times[common] == 10
    assert len(set(lists[0])) == example[0]
    assert {word for word, times in Counter(lists[1]).items() if times == often} == set(question.references)
    solution = numbered(question.prompt.partition("are: ")[2].partition("\n")[0])
    assert {word for word, times in Counter(lists[0]).items() if times == example[1]} == set(solution)


def test_frequencies_of_coded_words_follow_a_zeta_distribution():
    question = make("fwe", 3000)
    words = Counter(
        re.findall(r"\.\.\.(?= )|\b[a-z]{6}\b", question.prompt.partition("most often. ")[2].split("\n")[0])
    )
    ranked = [word for word, _ in words.most_common()]
    assert ranked[0] == "..."
    assert set(question.references) == set(ranked[1:4])
    n = words["..."] * 3.14159265**2 / 6
    for rank in range(1, 8):
        assert words[ranked[rank - 1]] == pytest.approx(n / rank**2 / (3.14159265**2 / 6), abs=1.5)


# Facts


def test_facts_are_asked_for_at_all_depths():
    assert [spread(i) for i in range(1, 8)] == [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    depths = [make("facts_statements", 3000, index).depth for index in range(20)]
    assert [depth for depth in depths if depth is None] == []
    bins = Counter(int((depth or 0) * 4) for depth in depths)
    assert sorted(bins) == [0, 1, 2, 3]
    assert max(bins.values()) <= 8


def test_a_facts_answer_is_in_the_text_where_it_is_said_to_be():
    for name in GROUPS["facts"]:
        for index in range(5):
            question = make(name, 1500, index)
            assert question.needle_at is not None
            assert question.prompt[question.needle_at :].startswith(question.references[0])
            assert len(question.distractors) >= 3
            assert question.references[0] not in question.distractors
            assert all(value in question.prompt for value in question.distractors)


# Names


def test_groups_stand_for_their_tasks_each_once():
    names = [task.name for task in make_tasks(["ruler", "vt", "facts"])]
    assert names == ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe", *GROUPS["facts"]]


def test_wrong_names_and_missing_texts_are_refused():
    with pytest.raises(TaskError, match="unknown task 'nope'; known are facts, ruler"):
        make_tasks(["nope"])
    with pytest.raises(TaskError, match=r"niah_single_2 needs a text: --haystack FILE, or take niah_single_2-synth"):
        make_tasks(["niah_single_2"])


def test_a_quote_stands_once_in_the_text_and_is_asked_for_by_its_author():
    question = make("quote-synth", 2000)
    [quote] = question.references
    assert len(quote.split()) == 10
    assert question.prompt.count(quote) == 1
    assert question.needle_at is not None
    author = question.answer_prefix.removeprefix("The ledger of ").removesuffix(" says:")
    assert question.prompt[question.needle_at :].startswith(f"The ledger of {author} says: {quote}.")
    assert question.prompt.endswith(f"Repeat, word for word, what the ledger of {author} says in the text.")


def test_a_question_that_stands_first_is_not_repeated_at_the_end():
    question = make("quote_first-synth", 2000)
    author = question.prompt.split("what the ledger of ")[1].split(" says")[0]
    assert question.prompt.startswith("Repeat, word for word")
    assert question.prompt.count(author) == 2  # in the question and in the sentence
    assert author not in question.answer_prefix
    assert question.prompt[question.needle_at :].startswith(f"The ledger of {author} says: {question.references[0]}.")
