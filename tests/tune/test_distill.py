"""Texts as pieces, and examples in rows: no word is lost, nothing is longer than it may be. No model, no PyTorch.

Tokens are words here.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")

from swaa_local.files.document import Document
from swaa_local.report.progress import Reporter
from swaa_local.tune.distill import _parts, make_pieces, read_texts
from swaa_local.tune.examples import Example, pack, split_off, within
from swaa_local.tune.request import TuneError
from tests.support.tuning import write_text


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def words(text: str) -> int:
    return len(text.split())


LONG = "One. Two three!  'Four?' five\n\n  # Six\n" + "seven " * 100 + "eight.\nnine"


def test_parts_are_the_text():
    for text in (LONG, "x", " \n ", "a b c", LONG * 3):
        assert "".join(_parts(text)) == text
        assert max(map(words, _parts(text))) <= 40


def test_pieces_are_from_everywhere_and_full(tmp_path: Path):
    text = write_text(tmp_path / "t.txt", 400).read_text()
    notes = Notes()
    pieces = make_pieces([Document("t", text), Document("s", "Short. And whole.")], 40, 300, words, 0, notes)
    assert notes.notes == ["1 of 2 texts are longer than a row: they are split into pieces of 300 tokens"]
    found = [piece.document.text for piece in pieces if piece.document.name == "t"]
    assert all(150 <= words(piece) <= 300 and piece in text for piece in found)
    assert sum(words(piece) > 250 for piece in found) > len(found) / 2
    starts = sorted(text.index(piece) / len(text) for piece in found)
    assert starts[0] < 0.2
    assert starts[-1] > 0.7
    assert len(set(found)) > 30
    assert {piece.document.text for piece in pieces if piece.document.name == "s"} <= {"Short. And whole."}


def test_each_of_few_pieces_is_of_another_text():
    texts = [Document(str(i), f"Text {i}. It ends.") for i in range(5)]
    assert [piece.document.name for piece in make_pieces(texts, 3, 100, words, 0, Notes())] == ["0", "1", "2"]


def test_a_line_that_no_piece_can_hold_is_an_error():
    with pytest.raises(TuneError, match="t has a line of more than 20 tokens; pass a larger --length"):
        make_pieces([Document("t", "word " * 100)], 1, 20, words, 0, Notes())


def test_a_folder_gives_its_texts_in_order(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / ".hidden").write_text("h")
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.7")
    notes = Notes()
    assert [text.name for text in read_texts(tmp_path, notes)] == ["b.txt", "a.md"]
    assert notes.notes == [f"left out of {tmp_path}: 1 files that are no text (c.pdf)"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(TuneError, match="holds no text file"):
        read_texts(tmp_path / "empty", notes)


def examples(*sizes: int, teacher: bool = False) -> list[Example]:
    return [Example(tuple(range(n)), n - 1, f"line {i}", teacher) for i, n in enumerate(sizes)]


def test_packing_loses_nothing_and_fills_rows():
    rng = random.Random(0)
    given = examples(*(rng.randrange(10, 100) for _ in range(200))) + examples(30, 40, teacher=True)
    rows = pack(given, 100, seed=3)
    assert sorted((e.where, len(e)) for row in rows for e in row) == sorted((e.where, len(e)) for e in given)
    assert all(sum(map(len, row)) <= 100 and len({e.teacher for e in row}) == 1 for row in rows)
    assert len(rows) <= 1.1 * sum(map(len, given)) / 100 + 1
    assert rows != sorted(rows, key=lambda row: -sum(map(len, row)))


def test_what_is_held_out_is_not_trained_on():
    given = examples(*range(10, 60))
    trained, held_out = split_off(given, None, seed=0)
    assert (len(trained), len(held_out)) == (45, 5)
    assert {e.where for e in trained} | {e.where for e in held_out} == {e.where for e in given}
    assert split_off(given, None, seed=0) == (trained, held_out) != split_off(given, None, seed=1)
    assert len(split_off(given, 20, seed=0)[1]) == 20
    with pytest.raises(TuneError, match="2 examples are too few, for 2 are held out"):
        split_off(given[:2], None, seed=0)


def test_long_examples_are_left_out_only_if_asked():
    given = examples(10, 20, 30)
    assert within(given, 30, skip_long=False) == (given, 0)
    assert within(given, 20, skip_long=True) == (given[:2], 1)
    with pytest.raises(
        TuneError, match=r"line 1 is 20 tokens with its answer but a row is 15, and 1 more are longer; pass --"
    ):
        within(given, 15, skip_long=False)
