"""Paths and texts of users as they come: `~` of nobody, no home at all, bytes that are no UTF-8, dropped files."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_local.files.user_input import TextError, pasted_path, require_utf8, user_path
from tests.support.program import environment
from tests.support.scripted import thinker
from tests.support.tiny import ALWAYS, FULL, ScheduleKeys, write_tiny_gguf

LATIN = os.fsdecode(b"caf\xe9")
"""A name that is no UTF-8, as Python holds it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    thinker(folder / f"{LATIN}.gguf")
    write_tiny_gguf(folder / f"{LATIN}-swaa.gguf", n_layer=2, schedule=ScheduleKeys(64, 4, [FULL, ALWAYS]))
    (folder / f"{LATIN}.txt").write_text("It is.")
    return folder


def run(*args: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "swaa_local", *map(str, args)],
        cwd=cwd,
        env=environment() if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=300,
    )


def error_of(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of an error."""
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.decode().splitlines()
    return line.removeprefix("swaa-local: error: ")


# Paths


@pytest.fixture(params=["somebody", "homeless"])
def home(request, tmp_path) -> dict[str, str]:
    """An environment, with a home and without one: no HOME, and a user that the system does not know."""
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched" / "sitecustomize.py").write_text(
        "import pwd\ndef nobody(_): raise KeyError\npwd.getpwuid = pwd.getpwnam = nobody\n"
    )
    env = environment()
    if request.param == "homeless":
        env["PYTHONPATH"] = f"{tmp_path / 'patched'}{os.pathsep}{env['PYTHONPATH']}"
        env.pop("HOME", None)
    return env


COMMANDS = [
    ("inspect", "~no-such-user.gguf"),
    ("convert", "~no-such-user.gguf", "-o", "out.gguf"),
    ("convert", "~no-such-user", "-o", "out.gguf"),
    ("convert", "model.gguf", "-o", "~no-such-user/out.gguf", "--window", "32"),
    ("chat", "~no-such-user.gguf", "-p", "x"),
    ("chat", "model.gguf", "-p", "x", "-f", "~no-such-user.txt"),
    ("bench", "~no-such-user.gguf"),
    ("bench", "model.gguf", "--plot", "~no-such-user/plot.png"),
    ("eval", "~no-such-user.gguf"),
    ("eval", "model.gguf", "--variants", "full", "--results", "~no-such-user/results.jsonl"),
    ("eval", "model.gguf", "--variants", "full", "--dataset", "~no-such-user.jsonl"),
    ("eval", "model.gguf", "--variants", "full", "--task", "niah_single_2", "--haystack", "~no-such-user.txt"),
    ("demo", "-m", "~no-such-user.gguf"),
    ("serve", "~no-such-user.gguf"),
    ("serve", "model.gguf", "--port", "0", "--api-key-file", "~no-such-user.keys"),
]


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_tilde_that_is_nobodys_is_part_of_the_name(args, home, tmp_path, tiny_model):
    (tmp_path / "model.gguf").symlink_to(tiny_model)
    assert "~no-such-user" in error_of(run(*args, cwd=tmp_path, env=home))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "patched"]


def test_files_with_such_names_are_found(tmp_path, tiny_model):
    for name in ("~no-such-user.gguf", "~notes.txt"):
        (tmp_path / name).write_bytes(tiny_model.read_bytes() if name.endswith("gguf") else b"It is.")
    assert run("inspect", "~no-such-user.gguf", cwd=tmp_path).returncode == 0
    args = ("-t", 1, "-c", 512, "-n", 1, "-p", "x", "--file", "~notes.txt")
    assert run("chat", "~no-such-user.gguf", *args, cwd=tmp_path).returncode == 0


def test_a_tilde_is_the_home_in_every_path(tmp_path, tiny_model):
    """No shell expands it in --output=~/x, nor in quotes."""
    env = environment(HOME=str(tmp_path))
    (tmp_path / "in.gguf").write_bytes(tiny_model.read_bytes())
    assert run("inspect", "~/in.gguf", cwd=tmp_path, env=env).returncode == 0
    assert run("convert", "~/in.gguf", "--output=~/out.gguf", "--window", 32, cwd=tmp_path, env=env).returncode == 0
    assert (tmp_path / "out.gguf").exists()


def test_a_chat_needs_no_home(folder, tmp_path, home):
    done = run("chat", folder / f"{LATIN}.gguf", "-t", 1, "-c", 512, "-p", "Is it?", cwd=tmp_path, env=home)
    assert (done.returncode, done.stdout) == (0, b"Yes!\n")


def test_a_device_is_no_file(tmp_path, tiny_model):
    """It may have no end."""
    for args in (["--results", "/dev/zero"], ["--task", "niah_single_2", "--haystack", "/dev/zero"]):
        assert "/dev/zero" in error_of(run("eval", tiny_model, "--variants", "full", *args, cwd=tmp_path))
    assert "a device" in error_of(run("chat", tiny_model, "-p", "x", "-f", "/dev/zero", cwd=tmp_path))


def test_home_is_as_a_shell_has_it(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert [str(user_path(text)) for text in ("~/a", "~", "a~", "./~/a", "~no-such-user/a")] == [
        "/users/me/a",
        "/users/me",
        "a~",
        "~/a",
        "~no-such-user/a",
    ]


@pytest.mark.parametrize(
    "name", ["My File (1).txt", "it's.txt", 'a "quoted" one.txt', "back\\slash.txt", "$HOME &;.txt"]
)
def test_a_dropped_file_is_found_however_the_terminal_writes_it(name, tmp_path, monkeypatch):
    """GNOME, KDE and others quote as shlex does, macOS and iTerm put backslashes, some paste an address."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("x")
    backslashes = "".join(c if c.isalnum() or c in "/.-_" else f"\\{c}" for c in str(tmp_path / name))
    for pasted in (shlex.quote(str(tmp_path / name)), f"{backslashes} ", (tmp_path / name).as_uri(), f" {name} "):
        assert os.path.samefile(pasted_path(pasted), name)


def test_a_name_to_be_made_is_read_alike():
    for text, path in {
        "my chat.json": "my chat.json",
        r"my\ chat.json": "my chat.json",
        "'my chat.json'": "my chat.json",
        "it's.json": "it's.json",
        "'a' 'b'": "'a' 'b'",
        "end\\": "end\\",
        "file:///a%20b/caf%E9?": "/a b/caf\udce9?",
        "file://localhost/a": "/a",
        "file://elsewhere/a": "file://elsewhere/a",
        "file://[": "file://[",
    }.items():
        assert pasted_path(text) == path


# Bytes that are no UTF-8

ENCODINGS = [{}, {"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}]


@pytest.mark.parametrize("changes", ENCODINGS, ids=str)
def test_files_with_such_names_can_be_used(folder, tmp_path, changes):
    env = environment(**changes)
    model, swaa = folder / f"{LATIN}.gguf", folder / f"{LATIN}-swaa.gguf"
    done = run("inspect", model, "--json", cwd=tmp_path, env=env)
    assert json.loads(done.stdout)["path"] == str(model)
    assert run("inspect", model, cwd=tmp_path, env=env).returncode == 0
    args = ("-t", 1, "-c", 512, "-p", "Is it?", "-f", folder / f"{LATIN}.txt")
    done = run("chat", model, *args, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (0, b"Yes!\n"), done.stderr
    done = run("convert", swaa, "-o", f"{LATIN}.gguf", "--no-swaa", "--outtype", "q8_0", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{LATIN}.gguf").exists()


def test_such_names_are_measured_and_plotted(folder, tmp_path):
    swaa = folder / f"{LATIN}-swaa.gguf"
    plot = ("--plot", tmp_path / f"{LATIN}$x$.png")
    done = run("bench", swaa, "-t", 1, "-p", 64, "-n", 2, "-r", 1, *plot, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for form in ("md", "json"):  # the second one reads the results of the first
        done = run("eval", swaa, "-t", 1, "-n", 1, "--length", 512, "-o", form, *plot, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == swaa.name


@pytest.mark.parametrize(
    ("text", "byte", "before"), [(b"caf\xe9", "0xe9", "caf"), ("caf\u00e9".encode()[:-1], "0xc3", "caf")]
)
def test_a_message_in_another_encoding_or_cut_in_a_letter_is_one_error(folder, tmp_path, text, byte, before):
    model = folder / f"{LATIN}.gguf"
    for args in (["-p", text], ["-p", "Is it?", "-sys", text]):
        done = subprocess.run(
            [sys.executable, "-m", "swaa_local", "chat", os.fsencode(model), *args],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        assert f"message is not UTF-8: the byte {byte} after '{before}'" in error_of(done)


def test_what_else_takes_words_says_what_is_wrong(folder, tmp_path):
    for args in (["bench", "--variants"], ["eval", "--task"], ["convert", "-o", "x.gguf", "--outtype"]):
        done = run(args[0], folder / f"{LATIN}-swaa.gguf", *args[1:], LATIN, cwd=tmp_path)
        assert "caf\\udce9" in error_of(done)
    assert run(LATIN, cwd=tmp_path).returncode == 2


def test_half_of_a_surrogate_pair_is_named():
    assert require_utf8("caf\u00e9 \U0001f600", "it") == "caf\u00e9 \U0001f600"
    with pytest.raises(TextError, match=r"it is not UTF-8: the surrogate 0xd83d after 'x'"):
        require_utf8("x\ud83d", "it")
