"""Documents with hidden facts: what every one of them holds, whoever asks for it."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable

import pytest

from swaa_local.needle import documents as facts
from swaa_local.needle.documents import Document, Filler, Kind, PlacedFact, make_document

HEADER = re.compile(r"(?:This section is about|The next part is about|What follows is about) (\w+ \w+)\.")


def words(text: str) -> int:
    return len(text.split())


def document(kind: Kind, seed: object = 0, length: int = 1500, n_facts: int = 20, **options: object) -> Document:
    return make_document(random.Random(f"{seed}"), kind, length, words, n_facts=n_facts, **options)  # type: ignore[arg-type]


def sentence_of(text: str, placed: PlacedFact) -> str:
    end = text.index(".", placed.value_offset)
    start = max(text.rfind(mark, 0, placed.value_offset) for mark in (". ", ".\n", "\n"))
    return text[start + 1 : end + 1].strip()


@pytest.fixture(params=[(kind, seed) for kind in facts.KINDS for seed in range(8)], ids=lambda p: f"{p[0]}-{p[1]}")
def written(request: pytest.FixtureRequest) -> tuple[Kind, Document]:
    kind, seed = request.param
    n_facts = (2, 3, 5, 8, 13, 20, 30, 40)[seed]
    return kind, document(kind, seed, n_facts=n_facts)


def test_every_value_stands_once_in_a_sentence_with_its_attribute(written: tuple[Kind, Document]) -> None:
    _, made = written
    assert len(made.facts) >= 2
    for placed in made.facts:
        fact = placed.fact
        assert made.text.count(f" {fact.value}.") == 1
        assert made.text[placed.value_offset :].startswith(f"{fact.value}.")
        assert f"{fact.attribute} " in sentence_of(made.text, placed)
    assert [placed.value_offset for placed in made.facts] == sorted(placed.value_offset for placed in made.facts)


def test_the_entity_is_named_where_the_offset_says(written: tuple[Kind, Document]) -> None:
    kind, made = written
    for placed in made.facts:
        assert made.text[placed.name_offset :].startswith(placed.fact.entity)
        sentence = sentence_of(made.text, placed)
        if kind == "statements":
            assert placed.fact.entity in sentence
        else:
            assert "their" in sentence.lower()
            assert placed.fact.entity not in sentence
            headers = [header[1] for header in HEADER.finditer(made.text, 0, placed.value_offset)]
            assert headers[-1] == placed.fact.entity


def test_no_two_facts_are_alike_and_some_differ_in_one_thing_only(written: tuple[Kind, Document]) -> None:
    kind, made = written
    known = [placed.fact for placed in made.facts]
    assert len({fact.value for fact in known}) == len({(fact.entity, fact.attribute) for fact in known}) == len(known)
    same_attribute = [(a, b) for a in known for b in known if a.attribute == b.attribute and a.entity != b.entity]
    same_entity = [(a, b) for a in known for b in known if a.entity == b.entity and a.attribute != b.attribute]
    if kind == "sections":
        assert {a for a, _ in same_attribute} == set(known), "the name alone tells the facts apart"
    elif len(known) >= 3:
        assert same_attribute
        assert same_entity


def test_only_facts_have_numbers_of_five_digits(written: tuple[Kind, Document]) -> None:
    _, made = written
    numbers = {placed.fact.value for placed in made.facts if placed.fact.value.isdigit()}
    assert set(re.findall(r"\d{5,}", made.text)) == numbers


@pytest.mark.parametrize("kind", facts.KINDS)
@pytest.mark.parametrize("length", [300, 1500, 4000])
def test_the_length_is_what_was_asked_for_and_hardly_less(kind: Kind, length: int) -> None:
    for seed in range(5):
        made = document(kind, seed, length, n_facts=6)
        assert length - 12 <= words(made.text) <= length


@pytest.mark.parametrize("kind", facts.KINDS)
def test_facts_are_everywhere(kind: Kind) -> None:
    depths = [made.depth(p) for made in (document(kind, seed, 800) for seed in range(20)) for p in made.facts]
    tenths = [sum(i / 10 <= depth < (i + 1) / 10 for depth in depths) / len(depths) for i in range(10)]
    assert min(tenths) > 0.04
    made = document(kind, length=2000, n_facts=30)
    for depth in (0.1, 0.5, 0.9):
        assert abs(made.depth(made.nearest(depth)) - depth) < 0.12


def test_headers_are_further_from_their_facts_than_a_window_reaches() -> None:
    """What makes full layers necessary: 256 tokens are about 200 words."""
    distances = [
        words(made.text[placed.name_offset : placed.value_offset])
        for made in (document("sections", seed, 3000) for seed in range(20))
        for placed in made.facts
    ]
    assert sum(distance > 200 for distance in distances) > len(distances) / 3


def test_names_are_shared_in_part_and_sometimes_made_up() -> None:
    names = [facts.make_names(random.Random(seed), 12) for seed in range(30)]
    assert all(len(set(some)) == 12 for some in names)
    halves = [[half for name in some for half in name.split(" ")] for some in names]
    assert sum(len(set(some)) < 24 for some in halves) > 20
    known = set(facts.words.FIRST_NAMES + facts.words.LAST_NAMES)
    share = sum(half not in known for some in halves for half in some) / sum(map(len, halves))
    assert 0.2 < share < 0.4


def test_filler_can_come_from_elsewhere_and_breaks_too() -> None:
    foreign = ["Foreign words fill this gap."]
    made = document("statements", filler=Filler(foreign, 1.0), breaks=("\n\n",), n_facts=5)
    assert made.text.count(foreign[0]) > 100
    assert set(made.text.split("\n\n")) - set(foreign) == {sentence_of(made.text, placed) for placed in made.facts}
    for placed in made.facts:
        assert made.text[placed.value_offset :].startswith(f"{placed.fact.value}.")


def test_equal_seeds_write_equal_documents() -> None:
    assert document("sections", 3) == document("sections", 3)
    assert document("sections", 3) != document("sections", 4)


def test_the_documents_are_those_that_the_bundled_model_was_trained_on() -> None:
    """A change of words or rules moves them away from the model, which then has to be trained again."""
    text = "\n".join(document(kind, seed).text for kind in facts.KINDS for seed in range(10))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "0ff23268ed286c0baf5d0fc18bfff6da3fc3b402e0029211134776b9ff94272f"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: document("statements", n_facts=1), "2 facts or more, not 1"),
        (lambda: document("statements", length=50, n_facts=20), "20 facts alone are .* more than 50"),
    ],
)
def test_impossible_documents_are_refused(call: Callable[[], Document], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_a_prompt_ends_with_the_question() -> None:
    made = document("statements")
    placed = made.facts[0]
    assert made.prompt(placed).endswith(f"\n\nWhat is the {placed.fact.attribute} of {placed.fact.entity}?")
    assert made.text in made.prompt(placed)
