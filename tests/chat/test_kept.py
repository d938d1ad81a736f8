"""Conversations that go on in another run: named, the last one, and saved ones."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from swaa_local.chat.kept import SessionFile
from swaa_local.chat.session import Turn
from swaa_local.chat.store import Conversation, load_conversation, save_conversation
from tests.support.adapters import write_adapter
from tests.support.program import environment
from tests.support.scripted import thinker
from tests.support.tiny import TinyShape, tiny_weights, write_tiny_gguf


@pytest.fixture
def model(tmp_path) -> Path:
    """Answers "Yes!", whatever it is asked."""
    return thinker(tmp_path / "thinker.gguf")


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text("A book. " * 60)
    return tmp_path / "book.txt"


def chat(*args: object, home: Path, context: str | None = "2048", **env: str) -> subprocess.CompletedProcess[str]:
    env = environment(XDG_CACHE_HOME=str(home / "cache"), XDG_STATE_HOME=str(home / "state"), **env)
    command = [sys.executable, "-m", "swaa_local", "chat", *map(str, args), "-t", "1"]
    command += ["-c", context] if context else []
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
    )


def turns(home: Path, name: str) -> list[str]:
    data = json.loads((home / "state" / "swaa-local" / "sessions" / f"{name}.json").read_text())
    return [turn["text"] for turn in data["turns"]]


def cached(done: subprocess.CompletedProcess[str]) -> int:
    assert done.returncode == 0, done.stderr
    words = done.stderr.replace(",", "").split()
    return int(words[words.index("cached)") - 1].lstrip("(")) if "cached)" in words else 0


def test_a_session_goes_on_and_reads_only_what_is_new(model, book, tmp_path):
    first = chat(model, "--session", "thesis", "--file", book, "-p", "Is it?", home=tmp_path)
    assert (first.stdout, cached(first)) == ("Yes!\n", 0)
    assert turns(tmp_path, "thesis") == ["Is it?", "Yes!"]
    second = chat(model, "--session", "thesis", "-p", "And that?", home=tmp_path)
    n_book = len(book.read_text())
    assert cached(second) > n_book + len("Is it?")  # its answer too: it was written in the same conversation
    third = chat("--continue", "-p", "Sure?", home=tmp_path)  # the model is the conversation's
    assert cached(third) > n_book + len("Is it?And that?")
    assert turns(tmp_path, "thesis") == ["Is it?", "Yes!", "And that?", "Yes!", "Sure?", "Yes!"]


def test_a_conversation_that_the_cache_has_lost_is_read_again(model, book, tmp_path):
    chat(model, "--session", "thesis", "--file", book, "-p", "Is it?", home=tmp_path)
    for path in (tmp_path / "cache" / "swaa-local" / "states").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    done = chat(model, "--session", "thesis", "-p", "And that?", home=tmp_path)
    assert (done.stdout, cached(done)) == ("Yes!\n", 0)
    assert "a cached state is not used" in done.stderr
    assert len(turns(tmp_path, "thesis")) == 4


def test_only_the_owner_may_read_a_session(model, tmp_path):
    chat(model, "--session", "thesis", "-p", "Is it?", home=tmp_path)
    file = tmp_path / "state" / "swaa-local" / "sessions" / "thesis.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_system_message_is_kept_and_can_be_replaced(model, tmp_path):
    def system() -> str:
        return json.loads((tmp_path / "state/swaa-local/sessions/s.json").read_text())["system"]

    chat(model, "--session", "s", "-sys", "Be brief.", "-p", "Is it?", home=tmp_path)
    chat(model, "--session", "s", "-p", "And that?", home=tmp_path)
    assert system() == "Be brief."
    chat(model, "--session", "s", "-sys", "Be long.", "-p", "And that?", home=tmp_path)
    assert system() == "Be long."


def test_what_cannot_be_gone_on_with_is_one_line(model, tmp_path):
    for args, error in (
        ([model, "--continue", "-p", "x"], "there is no conversation to go on with"),
        ([model, "--session", "nope", "--continue", "-p", "x"], "there is no session 'nope'"),
        ([model, "--session", "../x", "-p", "x"], "a session's name is made of"),
    ):
        done = chat(*args, home=tmp_path)
        assert done.returncode == 1
        assert error in done.stderr
        assert "Traceback" not in done.stderr
    sessions = tmp_path / "state" / "swaa-local" / "sessions"
    sessions.mkdir(parents=True)
    (sessions / "torn.json").write_text('{"format": "swaa-local-chat", "ver')
    assert "torn.json is not a saved conversation" in chat(model, "--session", "torn", "-p", "x", home=tmp_path).stderr


def test_a_session_that_cannot_be_written_still_answers(model, tmp_path):
    (tmp_path / "state").write_text("in the way")
    done = chat(model, "--session", "s", "-p", "Is it?", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Yes!\n")
    assert done.stderr.count("the conversation is not kept") == 1


# What the model ran with


@pytest.fixture
def tiny(tmp_path) -> tuple[Path, Path]:
    """A model without a schedule, and an adapter that changes what it says."""
    weights = tiny_weights(TinyShape())
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    return model, write_adapter(tmp_path / "mine.gguf", weights)


ROPE = ["--rope-scaling", "yarn", "--rope-scale", "2", "--yarn-orig-ctx", "1024"]
SETUP = [*ROPE, "--window", "48", "--sinks", "4", "--full-layers", "1", "--fa-decode", "--tail", "8", "-ctk", "q8_0"]


def facts(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], str]:
    """The schedule, and the answer."""
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    return reply["schedule"], reply["answer"]


def test_a_conversation_goes_on_with_the_schedule_adapter_context_and_settings_that_it_had(tiny, book, tmp_path):
    model, adapter = tiny
    begin = ["--session", "s", "--file", book, "-p", "Is it?", "--json", "-n", "12", "--temp", "0"]
    schedule, _ = facts(chat(model, *begin, "--lora", f"{adapter}:0.5", *SETUP, home=tmp_path, context="1536"))
    assert schedule == {"window": 48, "sinks": 4, "tail": 8, "layer_modes": [1, 0, 1, 1]}
    for args in (["--continue"], [model, "--session", "s"]):
        done = chat(*args, "-p", "And that?", "--json", home=tmp_path, context=None)
        assert facts(done)[0] == schedule
        assert json.loads(done.stdout)["tokens"]["cached"] > len(book.read_text())  # so no cell is of another kind
        assert json.loads(done.stdout)["tokens"]["generated"] <= 12
    # as one run of the same program says it
    data = json.loads((tmp_path / "state/swaa-local/sessions/s.json").read_text())
    assert data["setup"]["lora"] == str(adapter)
    assert (data["setup"]["lora_scale"], data["setup"]["n_ctx"], data["setup"]["type_k"]) == (0.5, 1536, "q8_0")
    assert [data["setup"][name] for name in ("rope_scaling", "rope_scale", "yarn_orig_ctx")] == ["yarn", 2.0, 1024]
    other = chat("--continue", "-p", "x" * 1600, home=tmp_path, context=None)
    assert "the context is 1536" in other.stderr


def test_the_answers_of_a_conversation_that_goes_on_are_those_of_the_same_options(tiny, book, tmp_path):
    model, adapter = tiny
    options = ["--lora", f"{adapter}:0.5", *SETUP, "-n", "12", "--temp", "0"]

    def second(home: Path, *args: object, **kwargs: Any) -> str:
        chat(model, "--session", "s", "--file", book, "-p", "Is it?", *options, home=home)
        return facts(chat(*args, "-p", "And that?", "--json", home=home, **kwargs))[1]

    told = second(tmp_path / "a", model, "--session", "s", *options)
    assert second(tmp_path / "b", "--continue", context=None) == told
    plain = [*options[2:], "--lora", f"{adapter}:0"]
    assert second(tmp_path / "c", model, "--session", "s", *plain) != told  # so the adapter has a say


def test_the_command_line_wins_and_what_differs_is_named(tiny, tmp_path):
    model, adapter = tiny
    chat(model, "--session", "s", "-p", "Is it?", "--lora", adapter, *SETUP, "-n", "4", home=tmp_path)
    done = chat("--continue", "-p", "x", "--no-swaa", "--lora", f"{adapter}:2", home=tmp_path, context="1024")
    [said] = [line for line in done.stderr.splitlines() if line.startswith("unlike before")]
    for what in (
        f"LoRA adapter {adapter} scaled by 2 (before: LoRA adapter {adapter})",
        "schedule none: full attention (before: layer 1 full, others window 48 while reading, 4 sinks, tail 8)",
        "context 1,024 (before: 2,048)",
    ):
        assert what in said
    assert "cached keys" not in said
    # --tail alone is another tail of the conversation's schedule
    done = chat("--continue", "-p", "x", "--tail", "5", *SETUP[:-4], "--json", home=tmp_path, context=None)
    assert facts(done)[0]["tail"] == 5
    done = chat("--continue", "-p", "x", "--tail", "6", "--json", home=tmp_path, context=None)
    assert facts(done)[0] == {"window": 48, "sinks": 4, "tail": 6, "layer_modes": [1, 0, 1, 1]}


def test_defaults_do_not_win_over_what_a_conversation_ran_with(model, tmp_path):
    chat(model, "--session", "s", "-p", "Is it?", home=tmp_path, context="1024")
    done = chat("--continue", "-p", "x" * 1100, home=tmp_path, context=None, SWAA_LOCAL_CHAT_CTX_SIZE="512")
    assert "the context is 1024" in done.stderr


def test_files_that_are_others_now_are_named(tiny, model, tmp_path):
    path, adapter = tiny
    begin = ["--session", "s", "-p", "Is it?", "-n", "12"]
    chat(path, *begin, "--lora", adapter, home=tmp_path)
    write_adapter(adapter, tiny_weights(TinyShape()), seed=6)
    write_tiny_gguf(path, seed=3)
    done = chat("--continue", "-p", "x", home=tmp_path)
    assert "unlike before: the model's file has changed; the LoRA adapter's file has changed" in done.stderr
    assert "unlike before" not in chat("--continue", "-p", "x", home=tmp_path).stderr  # it goes on with these
    adapter.unlink()
    done = chat("--continue", "-p", "x", home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the LoRA adapter of this conversation, {adapter}, is not there any more" in done.stderr
    done = chat(model, "--session", "s", "-p", "x", home=tmp_path)  # nothing of it would suit another model
    assert f"unlike before: model {model} (before: {path})" in done.stderr
    assert done.stdout == "Yes!\n"


def test_a_conversation_of_an_earlier_version_goes_on(model, tmp_path):
    chat(model, "--session", "s", "-p", "Is it?", home=tmp_path)
    file = tmp_path / "state/swaa-local/sessions/s.json"
    data = json.loads(file.read_text())
    del data["setup"]
    file.write_text(json.dumps(data))
    assert chat("--continue", "-p", "x", home=tmp_path).stdout == "Yes!\n"


@pytest.mark.parametrize(
    "damage",
    [
        {"n_ctx": "many"},
        {"type_k": "banana"},
        {"rope_scaling": "banana"},
        {"rope_scale": 0},
        {"yarn_orig_ctx": "many"},
        {"schedule": {"window": 0, "sinks": 0, "layer_modes": [1]}},
        {"schedule": 3},
        {"settings": {"temp": "hot"}},
        {"settings": {"nonsense": 1}},
        {"settings": [1]},
    ],
)
def test_a_damaged_setup_is_one_line(model, tmp_path, damage):
    chat(model, "--session", "s", "-p", "Is it?", home=tmp_path)
    file = tmp_path / "state/swaa-local/sessions/s.json"
    data = json.loads(file.read_text())
    data["setup"] |= damage
    file.write_text(json.dumps(data))
    done = chat("--continue", "-p", "x", home=tmp_path)
    assert done.returncode == 1
    assert "s.json is damaged" in done.stderr
    assert "Traceback" not in done.stderr


# Two chats at once


def test_a_session_belongs_to_one_chat_at_a_time_and_nothing_is_lost(model, tmp_path):
    env = environment(XDG_CACHE_HOME=str(tmp_path / "cache"), XDG_STATE_HOME=str(tmp_path / "state"))
    command = [sys.executable, "-m", "swaa_local", "chat", str(model), "-t", "1", "-c", "2048", "--session", "s"]
    chat(model, "--session", "s", "-p", "Is it?", home=tmp_path)
    pipe = subprocess.Popen([*command, "--file", "-", "-p", "First?"], env=env, stdin=-1, stdout=-1, stderr=-1)
    try:
        lock = tmp_path / "state/swaa-local/sessions/.s.lock"
        deadline = time.monotonic() + 60
        while not lock.exists() or not lock.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done = chat(model, "--session", "s", "-p", "Second?", home=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"the session 's' is in use by another chat (process {pipe.pid})" in done.stderr
        assert chat("--continue", "-p", "Second?", home=tmp_path).returncode == 1
        assert chat(model, "--session", "other", "-p", "Second?", home=tmp_path).returncode == 0
        assert pipe.communicate(b"a text", timeout=60)[0] == b"Yes!\n"
    finally:
        pipe.kill()
        pipe.wait()
    assert turns(tmp_path, "s") == ["Is it?", "Yes!", "First?", "Yes!"]
    assert chat(model, "--session", "s", "-p", "Third?", home=tmp_path).returncode == 0
    assert not lock.exists()


def test_a_chat_that_was_killed_does_not_keep_its_session(model, tmp_path):
    lock = tmp_path / "state/swaa-local/sessions/.s.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("1")
    assert chat(model, "--session", "s", "-p", "Is it?", home=tmp_path).stdout == "Yes!\n"


def test_a_session_that_another_program_has_changed_stays_and_ours_gets_another_name(tmp_path):
    file = SessionFile(tmp_path / "s.json")
    mine, theirs = Conversation((Turn("user", "mine"),)), Conversation((Turn("user", "theirs"),))
    assert file.write(mine) is None
    assert file.write(mine) is None
    save_conversation(str(tmp_path / "s.json"), theirs, overwrite=True)
    assert "another program has changed the session 's' meanwhile" in str(file.write(mine))
    assert load_conversation(str(tmp_path / "s.json")) == theirs
    assert load_conversation(str(tmp_path / "s-2.json")) == mine
    assert file.write(mine) is None  # and stays there
    file.path.unlink()
    assert file.write(mine) is None  # somebody wanted it away, and it was said again
    assert file.path.name == "s-2.json"
