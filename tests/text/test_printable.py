"""What came from outside reaches terminals, logs and tables as text: no codes, no lines that we did not write."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from swaa_local.text.printable import printable, printable_json, printable_lines
from tests.support.program import environment, run, succeeds
from tests.support.serving import serving
from tests.support.tiny import ALWAYS, ScheduleKeys, write_tiny_gguf

NAME = "good\x1b]0;owned\x07\nschedule   all is well\x9b2J\u202egnp"
SHOWN = r"good\x1b]0;owned\x07\nschedule   all is well\x9b2J\u202egnp"
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def is_dangerous(char: str) -> bool:
    """By Unicode's own account: a control, half a pair, a line's end, or what turns the direction of writing."""
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in BIDI


def assert_clean(text: str) -> None:
    assert not [char for char in text if is_dangerous(char) and char != "\n"], text


def test_all_of_unicode():
    for code in range(sys.maxunicode + 1):
        shown = printable(chr(code))
        if is_dangerous(chr(code)):
            assert shown.isascii()
            assert shown.isprintable()
        elif chr(code).isprintable():
            assert shown == chr(code)
        assert not any(map(is_dangerous, shown)), hex(code)
        assert printable(shown) == shown


def test_names_and_bytes_are_spelled_as_in_c():
    assert printable("a\tb\r\n\0\x7f") == r"a\tb\r\n\x00\x7f"
    assert printable(NAME) == SHOWN
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape")) == r"caf\xe9"
    assert printable("grüße 你好 🦙 می‌خواهم") == "grüße 你好 🦙 می‌خواهم"


def test_lines_may_be_meant():
    assert printable_lines("a\tb\n\x1b[1mc\r\n") == "a\tb\n\\x1b[1mc\\r\n"


def test_json_stays_json_of_the_same_value():
    value = {NAME: [NAME, "\udce9", "\u2028", "é", 1.5, None]}
    for options in ({}, {"indent": 2}):
        text = printable_json(value, **options)
        assert json.loads(text) == value
        assert text.isascii()
        assert_clean(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its name, its template's error and its file's name want the terminal."""
    path = tmp_path_factory.mktemp("names") / "mo\x1b[31mdel\n[red]ok.gguf"
    schedule = ScheduleKeys(16, 2, (ALWAYS,) * 4)
    return write_tiny_gguf(path, schedule=schedule, extra={"general.name": NAME, "general.basename": NAME})


def test_inspect_spells_out_names(model):
    shown = succeeds("inspect", model)
    assert_clean(shown)
    assert SHOWN in shown
    assert r"mo\x1b[31mdel\n[red]ok.gguf" in shown
    assert len([line for line in shown.splitlines() if line.startswith("schedule")]) == 1
    as_json = succeeds("inspect", model, "--json")
    assert_clean(as_json)
    assert json.loads(as_json)["model"]["name"] == NAME
    assert json.loads(as_json)["path"] == str(model)


def test_commands_spell_out_names(model, tmp_path):
    out = tmp_path / "o\x1b[1mut.gguf"
    window = ("--window", "8", "--fa-decode")
    fast = ("-t", "1")
    for command in (
        ("convert", model, "-o", out, *window, "--dry-run"),
        ("convert", model, "-o", out, *window),
        ("chat", model, *fast, "-c", "512", "-n", "4", "-p", "Hi"),
        ("bench", model, *fast, "-p", "32", "-n", "2", "-r", "1"),
        ("bench", model, *fast, "-p", "32", "-n", "2", "-r", "1", "-o", "csv"),
        ("bench", model, *fast, "-p", "32", "-n", "2", "-r", "1", "-o", "json"),
        (
            "eval",
            model,
            *fast,
            "--task",
            "niah_single_1",
            "--length",
            "2000",
            "-n",
            "1",
            "--results",
            tmp_path / "r\x1b.jsonl",
        ),
    ):
        done = run(*command, COLUMNS="400")
        assert done.returncode == 0, done.stderr
        assert_clean(done.stdout)
        assert_clean(done.stderr)
        assert "1b" in done.stdout + done.stderr or command[0] == "chat"


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("chat", "-p", "x"), ("bench",), ("eval",), ("serve",), ("convert", "-o", "o", "--no-swaa")],
)
def test_errors_spell_out_names(tmp_path, command):
    name = "no\x1b[31m\x9b\u202e\nswaa-local: error: forged"
    for path in (tmp_path / f"{name}.gguf", Path(name), Path("caf\udce9.gguf")):
        done = run(command[0], path, *command[1:], cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert_clean(done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_wrong_usage_spells_out_what_was_given():
    for words in (
        ["\x1b[31m"],
        ["inspect", "--\x1b[31mno"],
        ["bench", "-p", "\x1b[31m\x9b"],
        ["inspect", "a", "b\x1b"],
    ):
        done = run(*words)
        assert done.returncode == 2
        assert_clean(done.stderr)


def test_a_template_s_error_is_spelled_out(tmp_path):
    template = "{{ raise_exception('no\x1b[31m\nswaa-local: error: forged') }}"
    model = write_tiny_gguf(tmp_path / "m.gguf", chat_template=template)
    done = run("chat", model, "-t", "1", "-c", "512", "-p", "Hi")
    assert done.returncode == 1
    assert_clean(done.stderr)
    assert len(done.stderr.splitlines()) == 1


def test_serve_spells_out_names(model):
    with serving(model, "-c", "512", "-t", "1", "-v") as server:
        log = server.log
    assert_clean(log)
    assert r"mo\x1b[31mdel\n[red]ok" in log
    assert not [line for line in log.splitlines() if line.startswith("schedule   all is well")]


def test_the_engine_s_log_is_spelled_out(model):
    code = "import sys; from swaa_local import Llama; Llama(sys.argv[1], n_ctx=256, verbose=True).close()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], env=environment(), capture_output=True, text=True, check=True
    )
    assert "owned" in done.stderr
    assert_clean(done.stderr)
    assert not [line for line in done.stderr.splitlines() if line.startswith("schedule   all is well")]
