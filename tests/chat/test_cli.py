"""`swaa-local chat` as a Unix tool: one answer, streams, exit codes, bad input. Always through a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from swaa_local import Llama
from tests.support.program import environment, fails
from tests.support.scripted import scripted_model, thinker
from tests.support.tiny import ALWAYS, PREFILL, ScheduleKeys

FAST = ["-t", "1", "-c", "1024"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Thinks "hm", answers "Yes!"."""
    return thinker(tmp_path_factory.mktemp("chat") / "thinker.gguf")


def chat(*args: object, stdin: bytes | None = None, **kwargs) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "swaa_local", "chat", *map(str, args)]
    streams = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command, env=environment(), capture_output=True, check=False, timeout=120, **streams, **kwargs
    )


def test_stdout_holds_the_answer_alone(model):
    done = chat(model, *FAST, "-p", "Is it?")
    assert (done.returncode, done.stdout) == (0, b"Yes!\n")
    figures = (
        r"prompt \d+ tokens · prefill \d+\.\d\d s, [\d,.]+ tok/s · generated 9 tokens, [\d,.]+ tok/s · KV [\d.]+ KiB"
    )
    assert re.fullmatch(figures, done.stderr.decode().strip())


def test_the_options_of_thinking(model):
    assert chat(model, *FAST, "-p", "Is it?", "--no-think").stdout == b"Yes!\n"
    assert b"generated 5 tokens" in chat(model, *FAST, "-p", "Is it?", "--no-think").stderr
    assert chat(model, *FAST, "-p", "Is it?", "--hide-thinking", "--think").stdout == b"Yes!\n"


def test_a_question_can_be_piped_in(model):
    done = chat(model, *FAST, stdin=b"Is it?\n")
    assert (done.returncode, done.stdout) == (0, b"Yes!\n")


def prompt_tokens(done: subprocess.CompletedProcess[bytes]) -> int:
    assert done.returncode == 0, done.stderr
    [count] = re.findall(r"prompt ([\d,]+) tokens", done.stderr.decode())
    return int(count.replace(",", ""))


def test_documents_come_from_files_and_from_a_pipe(model, tmp_path):
    """The tiny tokenizer makes a token of each character, so that tokens count what was sent."""
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "b.txt").write_text("y" * 50)
    bare = prompt_tokens(chat(model, *FAST, "-p", "Is it?"))
    frame = len('<document name="a.txt">\n\n</document>\n\n')
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    assert prompt_tokens(chat(model, *FAST, "-p", "Is it?", "--file", a)) == bare + frame + 100
    assert prompt_tokens(chat(model, *FAST, "-p", "Is it?", "-f", a, "-f", b)) == bare + 2 * frame + 150
    piped = chat(model, *FAST, "-p", "Is it?", stdin=b"z" * 70)
    assert prompt_tokens(piped) == bare + frame + 70
    assert prompt_tokens(chat(model, *FAST, "-p", "Is it?", "-f", "-", stdin=b"z" * 70)) == bare + frame + 70
    assert prompt_tokens(chat(model, *FAST, "-f", a, stdin=b"Is it?")) == bare + frame + 100
    with open(a, "rb") as redirected:
        done = subprocess.run(
            [sys.executable, "-m", "swaa_local", "chat", str(model), *FAST, "-p", "Is it?"],
            env=environment(),
            stdin=redirected,
            capture_output=True,
            check=False,
        )
    assert prompt_tokens(done) == bare + frame + 100


def test_a_silent_pipe_is_not_waited_for(model):
    """Programs often run others with a pipe for stdin that they never write to nor close."""
    read_end, write_end = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "swaa_local", "chat", str(model), *FAST, "-p", "Is it?"],
            env=environment(),
            stdin=read_end,
            capture_output=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (done.returncode, done.stdout) == (0, b"Yes!\n")
    assert b"not read" in done.stderr


def test_system_message_and_sampling_options(model):
    bare = prompt_tokens(chat(model, *FAST, "-p", "Is it?"))
    options = ["-sys", "Be brief.", "--temp", "0", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--seed", "1"]
    done = chat("-m", model, *FAST, "-p", "Is it?", *options, "--repeat-penalty", "1.1", "-n", "100")
    assert done.stdout == b"Yes!\n"
    assert prompt_tokens(done) == bare + len("<|system\nBe brief.|\n") - 2 + 2 - 1


def test_options_under_all_their_names_in_llama_cpp(model):
    plain = chat(model, *FAST, "-p", "Is it?", "-sys", "Be brief.")
    names = ["--system-prompt", "Be brief.", "--temperature", "0", "-s", "1", "--n-gpu-layers", "all", "-fa", "1"]
    done = chat(model, *FAST, "-p", "Is it?", *names, "--n-predict", "100")
    assert (done.returncode, done.stdout) == (0, b"Yes!\n")
    assert prompt_tokens(done) == prompt_tokens(plain)
    assert chat(model, *FAST, "-p", "Is it?", "--n-predict", "1").stdout != b"Yes!\n"


def test_a_limit_of_no_tokens_reads_the_prompt_and_no_limit_is_minus_one(model):
    """As in llama.cpp."""
    asked = chat(model, *FAST, "-p", "Is it?", "-n", "-1")
    assert (asked.returncode, asked.stdout) == (0, b"Yes!\n")
    for name in ("-n", "--n-predict"):
        done = chat(model, *FAST, "-p", "Is it?", name, "0")
        assert (done.returncode, done.stdout) == (0, b"")
        note, figures = done.stderr.decode().splitlines()
        assert note == "the prompt was read, and nothing is written with -n 0"
        assert re.search(r"prefill \d+\.\d\d s, [\d,.]+ tok/s · generated 0 tokens · KV", figures)
        assert prompt_tokens(done) == prompt_tokens(asked)
    reply = json.loads(chat(model, *FAST, "-p", "Is it?", "-n", "0", "--json").stdout)
    assert (reply["answer"], reply["finish"]) == ("", "length")
    assert reply["tokens"] == {"prompt": prompt_tokens(asked), "cached": 0, "generated": 0}
    assert reply["timings"]["prefill_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "-2"], "-2 is not between -1 and"),  # -1 is no limit, and so would others be
        (["--temp", "hot"], "'hot' is not a number."),
        (["-s", "Be brief."], "'Be brief.' is not a valid integer"),  # the seed, as in llama.cpp
        (["-fa", "maybe"], "'maybe' is not on, off or auto"),
    ],
)
def test_a_value_that_cannot_be_is_wrong_usage(model, options, message):
    done = chat(model, *FAST, "-p", "Is it?", *options)
    assert done.returncode == 2
    assert message in done.stderr.decode()


def test_engine_options(model):
    options = ["-b", "64", "-ub", "32", "-tb", "1", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0", "-ngl", "0"]
    done = chat(model, *FAST, "-p", "Is it?", *options)
    assert (done.returncode, done.stdout) == (0, b"Yes!\n")


def test_rope_options_mean_what_the_constructor_means(tiny_model):
    """They change the answer, and to the one that `Llama` gives with llama.cpp's own numbers."""
    text, n = "Which of the seven wizards forged the third box of gold, and when? " * 3, 24
    args = [tiny_model, *FAST, "-n", n, "--temp", "0", "-fa", "off", "-p", text]
    yarn = {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN, "rope_freq_scale": 0.25, "yarn_orig_ctx": 128}
    found = []
    for options, kwargs in (
        ([], {}),
        (["--rope-scale", "2"], {"rope_freq_scale": 0.5}),
        (["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "128"], yarn),
    ):
        llm = Llama(str(tiny_model), n_ctx=1024, flash_attn=False, n_threads=1, n_threads_batch=1, **kwargs)
        reply = llm.create_chat_completion([{"role": "user", "content": text}], max_tokens=n, temperature=0.0)
        done = chat(*args, *options)
        assert done.stdout.decode().strip() == reply["choices"][0]["message"]["content"].strip()
        found.append(done.stdout)
        llm.close()
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rope-scaling", "ntk"),
        ("--rope-scale", "0"),
        ("--rope-scale", "nan"),
        ("--yarn-orig-ctx", "0"),
        ("--temp", "nan"),
        ("--temp", "inf"),
        ("--top-p", "nan"),
    ],
)
def test_numbers_that_are_none_are_wrong_usage(model, option, value):
    done = chat(model, *FAST, "-p", "x", option, value)
    assert done.returncode == 2
    assert option in done.stderr.decode()


def test_drafts_change_the_figures_and_not_the_answer(tiny_model):
    args = [*FAST, "-n", "60", "--temp", "0.5", "--seed", "3", "-fa", "off", "-p", "Is it there? " * 12]
    plain = chat(tiny_model, *args, "--speculate", "off", "--draft-window", "64")
    drafted = chat(tiny_model, *args, "--speculate", "on", "--draft-window", "64")
    assert (plain.returncode, drafted.returncode) == (0, 0)
    assert drafted.stdout == plain.stdout != b""
    figures = r" tok/s · \d\.\d tokens a pass, \d+% of \d+ drafted tokens accepted · KV "
    assert re.search(figures, drafted.stderr.decode())
    assert "drafted" not in plain.stderr.decode()


def kv_of(done: subprocess.CompletedProcess[bytes]) -> str:
    assert done.returncode == 0, done.stderr
    [size] = re.findall(r"KV (.*)", done.stderr.decode())
    return size


def test_the_schedule_is_the_files_unless_the_command_line_has_one(tmp_path):
    ring = thinker(tmp_path / "ring.gguf", schedule=ScheduleKeys(24, 4, [ALWAYS]))
    args = ["-t", "1", "-c", "4096", "-ub", "64", "-p", "Is it?"]
    stored, full = kv_of(chat(ring, *args)), kv_of(chat(ring, *args, "--no-swaa"))
    assert (stored, full) == ("64.0 KiB", "1.0 MiB")
    assert kv_of(chat(ring, *args, "--window", "24", "--fa-decode")) == full
    assert kv_of(chat(ring, *args, "--window", "1000")) == "320.0 KiB"


def test_a_reply_that_reaches_its_limit_says_so(model):
    done = chat(model, *FAST, "-p", "Is it?", "-n", "6")
    assert (done.returncode, done.stdout) == (0, b"Ye\n")
    assert b"stopped after 6 tokens" in done.stderr


def test_verbose_shows_llama_cpps_log(model):
    done = chat(model, *FAST, "-p", "Is it?", "--verbose")
    assert done.stdout == b"Yes!\n"
    assert b"llama_context" in done.stderr


# What goes wrong


def test_a_prompt_that_is_too_long_names_the_option(model, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 3000)
    error = fails("chat", model, *FAST, "-p", "Is it?", "--file", tmp_path / "long.txt")
    assert re.search(r"prompt is 3\d\d\d tokens but the context is 1024; pass -c 3584 or shorten the file", error)


def test_without_a_model_it_is_the_bundled_one_and_says_how_to_get_another(tmp_path):
    (tmp_path / "a.txt").write_text("The pin code of Ada Klein is 40417. The pin code of Otto Frank is 11735.")
    done = chat("-f", tmp_path / "a.txt", "-p", "What is the pin code of Ada Klein?", "-t", 1)
    assert (done.returncode, done.stdout) == (0, b"40417\n")
    assert b"this is the bundled model" in done.stderr
    assert b"swaa-local convert unsloth/" in done.stderr


def test_the_bundled_model_stops_where_it_finds_no_end():
    done = chat("-p", "Hello", "-t", 1)
    assert done.returncode == 0
    assert b"stopped after 256 tokens; -n allows more" in done.stderr
    assert b"stopped after 300 tokens" in chat("-p", "Hello", "-t", 1, "-n", 300).stderr


def test_a_model_given_twice_is_refused():
    assert "given twice" in fails("chat", "a.gguf", "-m", "b.gguf", code=2)


def test_bad_files_are_one_line(model, tmp_path):
    (tmp_path / "garbage.gguf").write_bytes(b"no model" * 100)
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(model.read_bytes()[:-5000])
    (tmp_path / "folder").mkdir()
    for what, error in {
        tmp_path / "nope.gguf": "no such file",
        tmp_path / "garbage.gguf": "garbage.gguf",
        truncated: "truncated.gguf",
        tmp_path / "folder": "is a directory, not a GGUF file",
        tmp_path: "is a directory with 2 models",
        "nope": "not a hub id",
    }.items():
        assert error in fails("chat", what, "-p", "x")
    for name, error in {"nope.txt": "No such file", "binary.txt": "not a text file", "latin.txt": "not UTF-8"}.items():
        assert error in fails("chat", model, *FAST, "-p", "x", "--file", tmp_path / name)


def test_bad_schedules_are_one_line(model, tmp_path):
    bad = thinker(tmp_path / "bad.gguf", schedule=ScheduleKeys(0, 4, [PREFILL]))
    assert "swaa.window" in fails("chat", bad, *FAST, "-p", "x")
    assert "1 layers" in fails("chat", model, *FAST, "-p", "x", "--window", "24", "--full-layers", "3")
    assert "needs a window" in fails("chat", model, "-p", "x", "--sinks", "4", code=2)


def test_nothing_to_ask_is_an_error(model):
    done = chat(model, "-p", " ")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"no question: the text of -p is empty" in done.stderr
    assert b"no question" in chat(model, *FAST).stderr
    assert b"must come with -p" in chat(model, *FAST, "-f", "-", stdin=b"text").stderr


def test_a_model_without_a_template_is_noted(tmp_path):
    done = chat(thinker(tmp_path / "bare.gguf", chat_template=None), *FAST, "-p", "Is it?", "--no-think")
    assert done.stdout == b"Yes!\n"
    assert b"no chat template, so ChatML is used" in done.stderr
    assert b"no switch for thinking, so --no-think changes nothing" in done.stderr


@pytest.fixture
def start(tiny_model_factory):
    """Start a chat whose answer never ends by itself."""
    endless = tiny_model_factory(n_ctx_train=200_000)
    started = []

    def make(*args: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "swaa_local", "chat", endless, "-t", "1", "-p", "hi", *args]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(list(map(str, command)), env=environment(), **pipes))
        return started[-1]

    yield make
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_the_only_answer_with_130(start):
    """The answer so far stays, as a line, and there is no traceback."""
    process = start("-c", 100_000)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert b"stopped" in errors
    assert b"generated" in errors
    assert b"Traceback" not in errors


def test_ctrl_c_while_the_prompt_is_read(start, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 90_000)
    process = start("-c", 100_000, "--file", tmp_path / "long.txt", "--verbose")
    parts = -1  # llama.cpp logs it once for the context, then before each part of a prompt
    while parts < 2:
        parts += b"set_abort_callback" in process.stderr.readline()
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    answer, errors = process.communicate(timeout=60)
    assert (process.returncode, answer) == (130, b"")
    assert b"Traceback" not in errors


def test_ctrl_c_while_the_model_loads(start):
    process = start("-c", 100_000, "--verbose")
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    answer, errors = process.communicate(timeout=60)
    assert (process.returncode, answer) == (130, b"")
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_ends_it_quietly(start):
    process = start("-c", 100_000)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) != 0


def test_help_is_instant_and_needs_no_engine():
    code = (
        "import sys\n"
        "from swaa_local.cli.main import main\n"
        "try: main(['chat', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'llama_cpp' not in sys.modules and 'prompt_toolkit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), stdout=subprocess.DEVNULL, check=True)


# Ends


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    """Says "ab" again and again, whatever it is asked."""
    path = tmp_path_factory.mktemp("babble") / "babbler.gguf"
    return scripted_model(path, ["<0x0A>", "a", "b"], loop_to="a", n_ctx_train=16384)


def test_an_answer_that_repeats_itself_is_stopped_and_named(babbler):
    done = chat(babbler, "-t", "1", "-c", "16384", "-p", "Is it?")
    assert done.returncode == 0
    assert b"stopped: the answer says the same 2 tokens over and over" in done.stderr
    assert 200 < len(done.stdout) < 600


def test_an_answer_into_a_pipe_has_an_end_and_no_limit_is_a_choice(babbler):
    options = ["-t", "1", "-c", "8192", "-p", "Is it?", "--no-loop-guard"]
    done = chat(babbler, *options)
    assert b"stopped after 4096 tokens; -n allows more" in done.stderr
    assert len(done.stdout) == 4097
    assert b"the context of 8192 tokens is full" in chat(babbler, *options, "-n", "-1").stderr
