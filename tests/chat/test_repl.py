"""The conversation on a terminal: `swaa-local chat MODEL` driven through a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from swaa_local import Llama
from swaa_local.chat.repl import converse
from swaa_local.chat.session import Session
from swaa_local.chat.settings import Settings
from swaa_local.chat.terminal import Terminal
from tests.support.program import environment
from tests.support.scripted import thinker

pexpect = pytest.importorskip("pexpect")

PROMPT = ">>>"
DIM = "\x1b[2;3m"  # and slanted: a thought
BABBLE = r"[ -~]{150}"  # an answer that is under way: nothing else is as long


class Talk:
    """A chat in a terminal of 200 columns. prompt_toolkit redraws lines, so texts are looked for, not compared."""

    def __init__(self, model: Path, *args: object, state: Path, term: str = "xterm") -> None:
        env = environment(TERM=term, XDG_STATE_HOME=str(state), PROMPT_TOOLKIT_NO_CPR="1")
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

    def start(model: Path, *args: object, **kwargs: str) -> Talk:
        started.append(Talk(model, *(args or ("-c", "1024")), state=tmp_path / "state", **kwargs))
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


def test_a_long_prompt_is_announced_and_its_progress_leaves_nothing(talk, tiny_model_factory, tmp_path):
    # What is read within a second is not announced where nothing can be drawn.
    model = tiny_model_factory(n_layer=12, n_embd=512, n_ff=3072)
    (tmp_path / "long.txt").write_text("a text " * 500)
    ask = ["-c", "4096", "-f", str(tmp_path / "long.txt"), "--no-cache"]
    t = talk(model, *ask)
    t.say("/set max-tokens 2", "max-tokens 2")
    assert "reading" in (shown := t.say("Is it?", "tokens", "left", "KV"))
    assert shown.rindex("\x1b[2K") < shown.index("stopped after")  # erased
    dumb = talk(model, *ask, term="dumb")
    dumb.say("/set max-tokens 2", "max-tokens 2")
    shown = dumb.say("Is it?", "reading 3,5", " tokens", "KV")
    assert "\x1b[2K" not in shown


def test_the_first_prompt_of_a_model_has_an_estimate_before_any_of_it_is_read(
    talk, tiny_model_factory, tmp_path, monkeypatch
):
    """Most of it is one part, of which the engine tells nothing until it is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_model_factory(n_layer=8, n_embd=512, n_ff=1024)
    (tmp_path / "long.txt").write_text("a text " * 500)
    t = talk(model, "-c", "4096", "-f", tmp_path / "long.txt", "-b", "4096", "-ub", "3072", "-n", "2")
    shown = t.say("Is it?", "left", "KV")
    counts = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+)/3,[56]\d\d", shown)]
    assert len({count for count in counts if 0 < count < 3072}) > 1  # within the first part


def test_the_last_conversation_is_kept_without_being_asked(talk, model, tmp_path):
    t = talk(model)
    t.say("Is it?", "Yes!", "KV")
    t.type("/exit")
    t.leave()
    again = talk(model, "--continue", "-c", "1024")
    again.say("/regen", "Yes!", "KV")
    again.say(f"/save {tmp_path / 'c.json'}", "saved 2 messages")


def test_two_chats_without_a_name_keep_a_conversation_each(talk, model, tmp_path):
    one = talk(model)
    two = talk(model, "-c", "1024")
    assert "another chat keeps its conversation as 'last'; this one is kept as 'last-2'" in two.child.before
    for t, question in ((two, "Second?"), (one, "First?")):
        t.say(question, "Yes!", "KV")
        t.type("/exit")
        assert t.leave() == 0
    for name, question in (("last", "First?"), ("last-2", "Second?")):
        kept = json.loads((tmp_path / "state" / "swaa-local" / "sessions" / f"{name}.json").read_text())
        assert kept["turns"][0]["text"] == question
    three = talk(model)
    assert "another chat" not in three.child.before


def test_a_model_that_was_replaced_during_a_chat_is_not_taken_for_the_same(talk, model, tmp_path):
    t = talk(model, "-c", "1024", "--session", "thesis")
    t.say("Is it?", "Yes!", "KV")
    thinker(tmp_path / "new.gguf", n_ctx_train=2048).replace(model)
    for command in ("/set ctx 2048", "/swaa off"):
        t.say(command, "was replaced or removed since this chat began")
    t.say("And that?", "Yes!", "cached", "KV")  # what is loaded serves on
    model.unlink()
    t.say("/set ctx 2048", "was replaced or removed since this chat began")
    t.say("/info", "of 1,024 tokens")
    thinker(model)
    t.type("/exit")
    t.leave()
    again = talk(model, "--session", "thesis")
    assert "unlike before: the model's file has changed" in again.child.before
    again.say("/set ctx 2048", "context 2,048 tokens")


def test_what_is_set_in_a_conversation_is_so_when_it_goes_on(talk, model):
    t = talk(model, "-c", "1024", "--session", "thesis", "--window", "64", "--fa-decode")
    t.say("Is it?", "Yes!", "KV")
    for command in ("/set temp 0.3", "/set hide-thinking on", "/set ctx 2048", "/swaa off", "/set seed 5"):
        t.say(command)
    t.say("And that?", "Yes!", "KV")
    t.type("/exit")
    t.leave()
    again = talk(model, "--session", "thesis", "--min-p", "0.1")
    assert "context 2,048 tokens · none: full attention" in again.child.before
    again.say("/set", "ctx 2048", "temp 0.3", "min-p 0.1", "seed 5", "hide-thinking on")
    again.say("/swaa on", "all layers window 64 while reading")
    again.say("/undo", "taken back: And that?")


def test_loading_a_conversation_names_what_it_ran_with(talk, model, tmp_path):
    t = talk(model)
    t.say("Is it?", "Yes!", "KV")
    t.say(f"/save {tmp_path / 'c.json'}", "saved 2 messages")
    other = talk(model, "-c", "512", "--window", "64", "--fa-decode")
    other.say(
        f"/load {tmp_path / 'c.json'}",
        "loaded 2 messages",
        "unlike there: schedule all layers window 64 while reading (before: none: full attention); "
        "context 512 (before: 1,024)",
    )


def test_a_conversation_that_was_cleared_does_not_come_back(talk, model, tmp_path):
    t = talk(model, "--session", "thesis")
    t.say("Is it?", "Yes!", "KV")
    t.say("/clear", "cleared")
    t.type("/exit")
    t.leave()
    again = talk(model, "--session", "thesis")
    again.say("/undo", "there is no question yet")


def test_a_conversation_goes_on_in_another_directory(talk, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = talk(Path(model.name), "--session", "thesis")
    t.say("Is it?", "Yes!", "KV")
    t.type("/exit")
    t.leave()
    monkeypatch.chdir("/")
    kept = tmp_path / "state" / "swaa-local" / "sessions" / "thesis.json"
    assert Path(json.loads(kept.read_text())["model"]) == model


def test_an_answer_in_the_background_is_not_stopped_by_the_terminal(model, tmp_path):
    """As `swaa-local chat ... > answer &` in a shell: the keyboard is the shell's."""
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"))
    shell = pexpect.spawn("/bin/bash", ["--norc", "-i"], env=env, encoding="utf-8", timeout=60, dimensions=(50, 200))
    command = f"{sys.executable} -m swaa_local chat {model} -t 1 -c 1024 -p 'Is it?' -q"
    shell.sendline(f"cd {Path.cwd()}; {command} > {tmp_path / 'answer'} & wait $!; echo ended $?")
    shell.expect(r"ended (\d+)")
    assert shell.match[1] == "0"
    assert (tmp_path / "answer").read_text() == "Yes!\n"
    shell.close(force=True)


def test_the_schedule_is_switched_in_a_running_conversation(talk, model):
    t = talk(model, "-c", "1024", "--window", "24", "--sinks", "4")
    t.say("Is it?", "Yes!", "KV")
    t.say("/swaa off", "none: full attention")
    t.say("/regen", "Yes!", "KV")
    t.say("/swaa on", "all layers window 24 always, 4 sinks")


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
    t.child.expect("press Ctrl-C again to quit")
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
    t.child.expect(r"[2-9],\d{3}/60,")  # more than a part of it is read
    t.child.sendintr()
    for text in (r"your message is not kept, but the first [\d,]+ of its 60,\d+ tokens are", PROMPT):
        t.child.expect(text)
    t.say("/info", "long.txt (60,000 characters)")
    t.type("/exit")
    assert t.leave() == 0


def test_a_limit_of_no_tokens_reads_a_document_for_the_next_message(talk, model, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 300)
    t = talk(model, "-f", tmp_path / "a.txt")
    t.say("/set max-tokens 0", "max-tokens 0 (the prompt is read, and nothing written)")
    t.say("Ready?", "your message is not kept, its documents go with the next one", "generated 0 tokens")
    t.say("/set max-tokens -1", "max-tokens -1 (until the context is full)")
    [count] = re.findall(r"\((\d+) cached\)", t.say("Is it?", "Yes!", "KV"))
    assert int(count) > 300


def test_a_document_that_does_not_fit_is_put_away(talk, model, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 3000)
    t = talk(model, "-c", "1024", "--file", tmp_path / "long.txt")
    t.say("Is it?", "but the context is 1024; shorten the file, or make it larger with /set ctx 3584", "removed")
    t.say("Is it?", "Yes!", "KV")


LINES = [
    b"caf\xe9",  # a terminal in Latin-1
    "caf\u00e9".encode()[:-1],
    b"/read ~no-such-user.txt",
    b"/save ~no-such-user/c.json",
    b"/load ~no-such-user.json",
    b"/read \x11\x00x",  # a zero byte, quoted
    b"/save \x11\x00x",
    b"/load /dev/zero",
    b"/read /dev/zero",
    b"/set system \xe9",
    b"/\xe9",
    b"/set top-k 99999999999999999999",
]


def test_no_line_ends_the_conversation(talk, model, tmp_path):
    t = talk(model)
    t.say("Is it?", "Yes!", "KV")
    for line in LINES:
        os.write(t.child.child_fd, line + b"\r")
        t.child.expect("UTF-8|cannot|there is no command|must be")
        t.child.expect(PROMPT)
    t.say("Is it still there?", "Yes!", "KV")
    t.say(f"/save {tmp_path / 'c.json'}", "saved 4 messages")
    history = (tmp_path / "state" / "swaa-local" / "chat_history").read_text()
    assert "Is it still there?" in history


def test_a_name_that_is_no_utf8_can_be_read_and_saved(talk, model, tmp_path):
    t, name = talk(model), os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(name)).write_text("a text")
    for command, said in ((b"/read ", "6 tokens"), (b"/save -f ", "saved 0 messages"), (b"/load ", "loaded 0")):
        os.write(t.child.child_fd, command + name + b"\r")
        t.child.expect(said)
        t.child.expect(PROMPT)


def test_a_dropped_file_is_read(talk, model, tmp_path):
    (tmp_path / "My File (1).txt").write_text("a text " * 20)
    t, spelled = talk(model), str(tmp_path).replace(" ", r"\ ") + r"/My\ File\ \(1\).txt"
    t.say(f"/read {spelled} ", "My File (1).txt: 140 tokens")
    t.say(f"/read '{tmp_path}/My File (1).txt'", "My File (1).txt: 140 tokens")
    t.say(f"/save {tmp_path}/my\\ talk.json", "saved 0 messages")
    assert (tmp_path / "my talk.json").exists()
    t.say(spelled, "there is no command", "to read a file: /read /")


def test_a_mistake_of_ours_does_not_end_it(model, tmp_path, monkeypatch, capsys):
    """Also when the line editor itself fails: the conversation goes on without it."""
    session = Session(lambda full: Llama(str(model), n_ctx=1024, n_threads=1), Settings())
    lines = iter(["Is it?", "/clear", f"/save {tmp_path / 'c.json'}"])

    def read_line(_prompt: str, *, default: str = "") -> str:
        if (line := next(lines, None)) is None:
            raise ZeroDivisionError("in the editor")
        return line

    monkeypatch.setattr(session, "clear", lambda: 1 / 0)
    monkeypatch.setattr("builtins.input", _inputs("Is it there?", f"/save -f {tmp_path / 'c.json'}"))
    with closing(session):
        converse(session, Terminal(), read_line)
    errors = capsys.readouterr().err
    assert "please report it (ZeroDivisionError: division by zero)" in errors
    assert "the conversation is still here; /save PATH writes it to a file" in errors
    assert "in the editor); going on without line editing" in errors
    assert [turn["text"] for turn in json.loads((tmp_path / "c.json").read_text())["turns"]] == [
        "Is it?",
        "Yes!",
        "Is it there?",
        "Yes!",
    ]


def _inputs(*lines: str) -> Callable[[], str]:
    """An `input()` that returns these, and then finds the end."""
    left = list(lines)

    def read() -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


def test_advice_is_what_can_be_typed(talk, model, tmp_path):
    """-c and -n are for the command line."""
    t = talk(model)
    t.say("x" * 600, "Yes!", "KV")
    shown = t.say("x" * 600, "but the context is 1024; /drop forgets the oldest messages, and /set ctx 1792 makes")
    assert "-c" not in shown
    t.say("/clear", "cleared")
    t.say("/set max-tokens 3", "max-tokens 3")
    assert "-n" not in t.say("Is it?", "stopped after 3 tokens; /set max-tokens allows more")


def test_a_full_context_says_how_to_make_room(talk, tiny_model_factory):
    t = talk(tiny_model_factory(), "-c", "256", "--temp", "0")
    t.say("hi", "tokens is full, so the answer is cut; /drop forgets the oldest messages, and /set ctx 512 makes")


def test_a_full_conversation_goes_on_when_the_oldest_messages_are_dropped_or_the_context_grows(talk, model, tmp_path):
    (tmp_path / "a.txt").write_text("a text " * 60)
    t = talk(model, "-c", "1024", "-f", tmp_path / "a.txt")
    t.say("x" * 50, "Yes!", "KV")
    t.say("y" * 200, "Yes!", "KV")
    t.say("z" * 400, "/set ctx 1792 makes the context larger")
    t.say("/set ctx 2048", "context 2,048 tokens")
    assert "cached" in t.say("z" * 400, "Yes!", "cached", "KV")  # nothing is read again
    t.say("/set ctx 1", "KV")  # padded by the engine
    t.say("Is it?", "but the context is 256; /drop forgets")
    t.say("/set ctx nonsense", "ctx is a number of tokens")
    t.say("/set ctx 1024", "context 1,024 tokens")
    t.say("/drop 2", f"forgotten: 2 messages and their answers, with a.txt; the first was: {'x' * 50}")
    t.say("Is it?", "Yes!", "KV")
    t.say("/drop 0", "takes a number of messages")
    t.say("/drop 9", "forgotten: 2 messages and their answers; the first was: zzz")
    t.say("/drop", "no messages to forget")


def test_a_model_that_sees_a_window_alone_forgets_by_itself(talk, model):
    t = talk(model, "-c", "1024", "--window", "64", "--sinks", "4")
    for letter in "xyz":
        t.say(letter * 250, "Yes!", "KV")
    t.say("w" * 190, "forgotten: 2 messages", "xxx", "the model saw the last 64 of it", "Yes!", "KV")
    t.say("Is it?", "Yes!", "KV")


def test_a_message_is_taken_back_or_changed(talk, model, tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    t = talk(model, "-c", "1024", "-f", tmp_path / "a.txt")
    t.say("/undo", "there is no question yet")
    t.say("Is it so?", "Yes!", "KV")
    t.say("/undo", "taken back: Is it so?", "a.txt: goes with your next message")
    t.say("Is it not so?", "Yes!", "KV")
    t.say("/edit Is it perhaps so?", "Yes!", "KV")
    t.type("/edit")
    t.child.expect("Is it perhaps so")  # in the line, to be edited
    t.say(" Or not?", "Yes!", "KV")
    t.say("/system Be brief.", "system Be brief.")
    t.say("/system", "system (none)")
    t.say(f"/save {tmp_path / 'c.json'}", "saved 2 messages")
    data = json.loads((tmp_path / "c.json").read_text())
    assert [turn["text"] for turn in data["turns"]] == ["Is it perhaps so? Or not?", "Yes!"]
    assert [document["name"] for document in data["turns"][0]["documents"]] == ["a.txt"]
    t.type("/bye")
    assert t.leave() == 0


def test_what_is_typed_during_an_answer_waits_for_the_next_line(talk, tiny_model_factory):
    t = talk(tiny_model_factory(n_ctx_train=100_000), "-c", "100000")
    t.type("hi")
    t.child.expect(BABBLE)
    t.child.send("/set temp 0.25\r")
    t.child.expect(BABBLE)
    t.child.sendintr()
    t.child.expect("stopped")
    assert "/set temp" not in t.child.before
    t.child.expect("temp 0.25\x1b")  # it was run
    t.child.expect(PROMPT)


@pytest.mark.parametrize("commands", [["fg"], ["bg", "fg"]])
def test_an_answer_that_was_suspended_goes_on_and_typing_ahead_with_it(tiny_model_factory, tmp_path, commands):
    """The shell sets the terminal as it wants it meanwhile."""
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"), TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
    shell = pexpect.spawn("/bin/bash", ["--norc", "-i"], env=env, encoding="utf-8", timeout=60, dimensions=(50, 200))
    with closing(shell):
        model = tiny_model_factory(n_ctx_train=100_000)
        shell.sendline(f"cd {Path.cwd()}; {sys.executable} -m swaa_local chat {model} -t 1 -c 100000")
        shell.expect(PROMPT)
        shell.send("hi\r")
        shell.expect(BABBLE)
        shell.sendcontrol("z")
        shell.expect("Stopped")
        for command in commands:
            shell.sendline(command)
            shell.expect(BABBLE)
            shell.expect(BABBLE)
        shell.send("/set temp 0.25\r")
        shell.expect(BABBLE)
        shell.sendintr()
        shell.expect("stopped")
        assert "/set temp" not in shell.before
        shell.expect("temp 0.25\x1b")  # it was run
        shell.expect(PROMPT)
        shell.send("/exit\r")
        shell.sendline("stty -a; echo of $((40 + 2))")
        shell.expect("of 42")
        assert re.search(r"(?<!-)\becho\b", shell.before)


def test_history_is_kept_and_its_loss_is_harmless(talk, model, tmp_path):
    t = talk(model)
    t.say("Is it history?", "Yes!", "KV")
    t.type("/exit")
    t.leave()
    history = tmp_path / "state" / "swaa-local" / "chat_history"
    assert "Is it history?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
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
