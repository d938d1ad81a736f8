"""Conversations on hybrid models and on models with windows of their own: sessions, what is read again, taking back.

Answers are greedy. That of a question that was taken back and is asked again is what it was: the text before it is as
it was, whatever states and windows have seen in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.chat.commands import run_command
from swaa_local.chat.session import Session
from swaa_local.chat.settings import Settings
from swaa_local.files.document import Document
from tests.chat.test_kept import cached, chat, turns
from tests.support.tiny import with_own_windows, write_tiny_gguf
from tests.support.tiny_hybrid import write_tiny_hybrid

pytestmark = pytest.mark.usefixtures("engine")

MAKE: dict[str, Callable[[Path], Path]] = {
    "hybrid": write_tiny_hybrid,
    "own windows": lambda path: write_tiny_gguf(path, **with_own_windows(16, [True, False, True, False])),
}
SCHEDULES: dict[str, tuple[Any, str]] = {
    "full": (False, "--no-swaa"),
    "FA decode with a tail": (SWAAConfig(32, 4, True, prompt_tail=16), "--window 32 --sinks 4 --fa-decode --tail 16"),
    "rings": (SWAAConfig(32, 4), "--window 32 --sinks 4"),
}
BOOK = " ".join(f"Line {i} of it." for i in range(90))


@pytest.fixture(params=MAKE)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MAKE[request.param](tmp_path / "m.gguf")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_session_goes_on_in_another_run(model, tmp_path, name):
    options = split(f"-n 12 --temp 0 {SCHEDULES[name][1]}")
    (tmp_path / "book.txt").write_text(BOOK)
    first = chat(model, *options, "--session", "s", "--file", tmp_path / "book.txt", "-p", "Is it?", home=tmp_path)
    assert cached(first) == 0
    second = chat(model, *options, "--session", "s", "-p", "And that?", home=tmp_path)
    assert cached(second) > len(BOOK)
    assert len(turns(tmp_path, "s")) == 4
    other = chat(model, *options, "--file", tmp_path / "book.txt", "-p", "What else?", home=tmp_path)
    assert cached(other) > 0.9 * len(BOOK)  # the document, of another conversation


class Talk:
    """A conversation on a loaded model, and the tokens of each prompt that were not read again."""

    def __init__(self, model: Path, name: str) -> None:
        sizes: dict[str, Any] = {"n_ctx": 4096, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}
        self.session = Session(
            lambda _full: Llama(str(model), swaa=SCHEDULES[name][0], **sizes), Settings(max_tokens=12, temp=0.0)
        )

    def ask(self, text: str) -> str:
        return "".join(piece.text for piece in self.session.ask(text))

    def command(self, line: str) -> None:
        run_command(self.session, line, lambda _text: None)

    @property
    def cached(self) -> int:
        assert self.session.stats is not None
        return self.session.stats.cached_tokens


@pytest.fixture
def talk(model: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Talk]]:
    opened: list[Talk] = []

    def start(name: str) -> Talk:
        opened.append(Talk(model, name))
        return opened[-1]

    yield start
    for each in opened:
        each.session.llm.close()


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_taken_back_leaves_nothing_behind(talk, name):
    t = talk(name)
    t.session.pending = [Document("book.txt", BOOK)]
    first = t.ask("Is it?")
    assert first
    second = t.ask("And that?")
    assert t.cached > len(BOOK)
    t.command("/undo")
    t.command("/undo")
    assert t.session.turns == []
    assert t.ask("Is it?") == first
    assert t.cached > 0.9 * len(BOOK)
    assert t.ask("And that?") == second
    # Another reply, and another question in the place of the last one: the text is not read again.
    again = "".join(piece.text for piece in t.session.regenerate())
    assert again == second
    assert t.cached > len(BOOK)
    t.command("/undo")
    t.ask("Why?")
    assert t.cached > len(BOOK)


def test_the_terminal_takes_back_and_goes_on(model, tmp_path):
    pytest.importorskip("pexpect")
    from tests.chat.test_repl import Talk as Terminal

    (tmp_path / "book.txt").write_text(BOOK)
    options = split("-c 4096 -n 12 --temp 0 --window 32 --sinks 4 --fa-decode --no-cache")
    terminal = Terminal(model, *options, "--file", tmp_path / "book.txt", state=tmp_path / "state")
    terminal.say("Is it?", "KV ")
    shown = terminal.say("And that?", "cached)")
    assert "prompt" in shown
    terminal.say("/undo", "taken back: And that?")
    terminal.say("Why?", "cached)")
    terminal.type("/bye")
    assert terminal.leave() == 0
