"""The conversation on a terminal: `swaa-local chat MODEL` driven through a pseudo-terminal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from program import environment
from scripted import thinker

pexpect = pytest.importorskip("pexpect")

PROMPT = ">>>"
DIM = "\x1b[2;3m"  # and slanted: a thought
BABBLE = r"[ -~]{150}"  # an answer that is under way: nothing else is as long


class Talk:
    """A chat in a terminal of 200 columns. prompt_toolkit redraws lines, so texts are looked for, not compared."""

    def __init__(self, model: Path, *args: object, state: Path) -> None:
        env = environment(TERM="xterm", XDG_STATE_HOME=str(state), PROMPT_TOOLKIT_NO_CPR="1")
        env.pop("NO_COLOR")
        command = ["-m", "swaa_local", "chat", str(model), "-t", "1", *map(str, args)]
        self.child = pexpect.spawn(sys.executable, command, env=env, encoding="utf-8", timeout=60, dimensions=(50, 200))
        self.child.expect(PROMPT)

    def type(self, line: str) -> None:
        self.child.send(f"{line}\r")

    def say(self, line: str, *expected: str) -> str:
        """Type a line and wait for each text, and for the next prompt; all that was shown between."""
        self.type(line)
        shown = ""
        for text in (*expected, PROMPT):
            self.child.expect(re.escape(text))
            shown += self.child.before + text
        return shown

    def leave(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def model(tmp_path) -> Path:
    return thinker(tmp_path / "thinker.gguf")


@pytest.fixture
def talk(tmp_path):
    started = []

    def start(model: Path, *args: object) -> Talk:
        started.append(Talk(model, *(args or ("-c", "1024")), state=tmp_path / "state"))
        return started[-1]

    yield start
    for each in started:
        each.child.close(force=True)


def test_a_conversation(talk, model, tmp_path):
    (tmp_path / "a.txt").write_text("a text " * 20)
    t = talk(model)
    t.say("Is it?", DIM + "h", "Y", "prompt", "generated 9 tokens", "KV")
    assert "cached" in t.say("And that?", "Yes!", "KV")
    t.say(f"/read {tmp_path / 'a.txt'}", "a.txt: 140 tokens, goes with your next message")
    t.say("Is it there?", "Yes!", "KV")
    t.say("/regen", "Yes!", "cached", "KV")
    t.say("/info", "a.txt (140 characters)")
    t.say("/set hide-thinking on", "hide-thinking on")
    assert DIM not in t.say("Is it?", "Yes!", "KV")
    t.say("/nonsense", "there is no command /nonsense")
    t.say("/read /no/such/file", "cannot read /no/such/file")
    t.say("/clear", "cleared")
    t.type("/exit")
    assert t.leave() == 0


def test_several_lines_are_one_message(talk, model, tmp_path):
    t = talk(model)
    t.type('"""first')
    t.child.expect(r"\.\.\.")
    t.type("/second")
    t.child.expect(r"\.\.\.")
    t.say('third"""', "Yes!", "KV")
    t.say(f"/save {tmp_path / 'c.json'}", "saved 2 messages")
    assert json.loads((tmp_path / "c.json").read_text())["turns"][0]["text"] == "first\n/second\nthird"


def test_saving_never_overwrites_and_loading_goes_on(talk, model, tmp_path):
    t, path = talk(model), tmp_path / "c.json"
    path.write_text("precious")
    t.say("Is it?", "Yes!", "KV")
    t.say(f"/save {path}", "exists; /save -f")
    assert path.read_text() == "precious"
    t.say(f"/save -f {path}", "saved 2 messages")
    t.type("/exit")
    t.leave()
    again = talk(model)
    again.say(f"/load {path}", "loaded 2 messages")
    again.say("/regen", "Yes!", "KV")


def test_the_schedule_is_switched_in_a_running_conversation(talk, model):
    t = talk(model, "-c", "1024", "--window", "24", "--sinks", "4")
    t.say("Is it?", "Yes!", "KV")
    t.say("/swaa off", "none: full attention")
    t.say("/regen", "Yes!", "KV")
    t.say("/swaa on", "window 24, 4 sinks")


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(talk, tiny_model_factory):
    t = talk(tiny_model_factory(n_ctx_train=100_000), "-c", "100000")
    t.type("hi")
    t.child.expect(BABBLE)
    t.child.sendintr()
    for text in ("stopped", "generated", PROMPT):
        t.child.expect(text)
    t.say("/set max-tokens 3", "max-tokens 3")
    t.say("more", "stopped after 3 tokens", "cached", "KV")
    t.child.sendintr()
    t.child.expect("Ctrl-C once more leaves")
    t.child.expect(PROMPT)
    t.child.sendintr()
    assert t.leave() == 0


def test_ctrl_c_right_after_a_stopped_answer_leaves(talk, tiny_model_factory):
    t = talk(tiny_model_factory(n_ctx_train=100_000), "-c", "100000")
    t.type("hi")
    t.child.expect(BABBLE)
    t.child.sendintr()
    for text in ("stopped", PROMPT):
        t.child.expect(text)
    t.child.sendintr()
    assert t.leave() == 0


def test_ctrl_c_while_reading_takes_the_message_back_and_keeps_what_was_read(talk, tiny_model_factory, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 60_000)
    t = talk(tiny_model_factory(n_ctx_train=100_000), "-c", "100000", "--file", tmp_path / "long.txt", "-n", "3")
    t.type("hi")
    t.child.expect("reading")
    t.child.expect(r"[1-9][\d,]*/60,")  # some of it is read
    t.child.sendintr()
    for text in ("taken back", PROMPT):
        t.child.expect(text)
    t.say("/info", "long.txt (60,000 characters)")
    t.type("/exit")
    assert t.leave() == 0


def test_a_document_that_does_not_fit_is_put_away(talk, model, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 3000)
    t = talk(model, "-c", "1024", "--file", tmp_path / "long.txt")
    t.say("Is it?", "but the context is 1024; pass -c 3584 or shorten the file", "put away")
    t.say("Is it?", "Yes!", "KV")


def test_history_is_kept_and_its_loss_is_harmless(talk, model, tmp_path):
    t = talk(model)
    t.say("Is it history?", "Yes!", "KV")
    t.type("/exit")
    t.leave()
    history = tmp_path / "state" / "swaa-local" / "chat_history"
    assert "Is it history?" in history.read_text()
    again = talk(model)
    again.child.send("\x1b[A\x1b[A")  # up twice: past /exit
    again.child.expect("Is it history")
    again.child.send("\r")
    again.child.expect("Yes!")
    again.child.close(force=True)
    history.unlink()
    history.mkdir()
    t = talk(model)
    t.say("Is it?", "Yes!", "KV")


def test_ctrl_d_leaves(talk, model):
    t = talk(model)
    t.child.sendeof()
    assert t.leave() == 0
