"""A command that a signal ends while the engine works in its process says which, what it was doing and what to try."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swaa_local.files.signals import advice
from tests.support.program import environment
from tests.support.serving import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals, and no fork")

WATCH = "from swaa_local.engine import crash; crash.watch('running a test'); import os, signal, sys;"
ABORT = "crash_native._c._lib.ggml_abort(b'/build/ggml/src/ggml.c', 12, b'GGML_ASSERT(%s) failed', b'n > 0')"


def python(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], env=environment(**env), capture_output=True, text=True)


def kill(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})"


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGXCPU"])
def test_a_fatal_signal_is_told_and_ends_it_as_ever(name: str) -> None:
    done = python(f"{WATCH} {kill(name)}")
    assert done.returncode == -signal.Signals[name]
    assert done.stderr == f"swaa-local: error: ended by {name} while running a test; {advice(name)}\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_who_sends_a_signal_knows_of_it(name: str) -> None:
    done = python(f"{WATCH} {kill(name)}")
    assert (done.returncode, done.stderr) == (-signal.Signals[name], "")


@pytest.mark.parametrize(("code", "returned"), [("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 1)", 0)])
def test_an_end_in_order_is_silent(code: str, returned: int) -> None:
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN);" if "kill" in code else ""
    done = python(f"import signal; {ignored} {WATCH} {code}")
    assert (done.returncode, done.stderr) == (returned, "")


def test_the_step_is_the_innermost_one() -> None:
    code = f"""{WATCH}
with crash.step('reading'):
    with crash.step('loading'):
        pass
    {kill("SIGSEGV")}"""
    assert "ended by SIGSEGV while reading; " in python(code).stderr
    code = f"{WATCH}\nwith crash.step('reading'): pass\n{kill('SIGKILL')}"
    assert "ended by SIGKILL while running a test; " in python(code).stderr


def test_a_file_name_reaches_no_terminal_raw() -> None:
    code = f"{WATCH}\nwith crash.step('loading \\x1b[2J\\n\\udcff' + 'x' * 1000): {kill('SIGSEGV')}"
    said = python(code).stderr
    assert said.startswith("swaa-local: error: ended by SIGSEGV while loading \\x1b[2J\\n\\xffxxx")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("thread", [False, True])
def test_an_abort_of_the_engine_says_why(thread: bool) -> None:
    call = f"import threading; t = threading.Thread(target=lambda: {ABORT}); t.start(); t.join()" if thread else ABORT
    code = f"{WATCH} from swaa_local.engine import native as crash_native\nwith crash.step('reading'): {call}"
    done = python(code)
    assert done.returncode == -signal.SIGABRT
    # one line, whatever debugger the machine has
    assert done.stderr == (
        "swaa-local: error: ended by SIGABRT while reading: ggml.c:12: GGML_ASSERT(n > 0) failed; "
        f"{advice('SIGABRT')}\n"
    )


def test_verbose_keeps_the_engines_own_report() -> None:
    watch = WATCH.replace("test'", "test', keep_backtrace=True")
    done = python(f"{watch} from swaa_local.engine import native as crash_native; {ABORT}", GGML_NO_BACKTRACE="1")
    first, last = done.stderr.splitlines()
    assert first == "/build/ggml/src/ggml.c:12: GGML_ASSERT(n > 0) failed"
    assert last.startswith("swaa-local: error: ended by SIGABRT while running a test; ")


def test_a_stack_that_overflows_is_told() -> None:
    recursion = "f = ctypes.CFUNCTYPE(None)(lambda: f()); f()"
    done = python(f"{WATCH} import ctypes; sys.setrecursionlimit(10**9); {recursion}")
    assert done.returncode == -signal.SIGSEGV
    assert "ended by SIGSEGV while running a test; " in done.stderr


def test_pythons_own_report_of_a_fault_follows() -> None:
    done = python(f"{WATCH} {kill('SIGSEGV')}", "-X", "faulthandler")
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith("swaa-local: error: ended by SIGSEGV")
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_where_no_process_can_be_forked_faults_are_told_all_the_same() -> None:
    """As under `ulimit -u`."""
    refuse = "import os\ndef refuse(): raise BlockingIOError(11, 'no more processes')\nos.fork = refuse\n"
    done = python(f"{refuse}{WATCH} {kill('SIGSEGV')}")
    assert done.stderr.startswith("swaa-local: error: ended by SIGSEGV while running a test; ")
    done = python(f"{refuse}{WATCH} print('ok')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_a_library_is_not_watched() -> None:
    done = python(f"import swaa_local.llama, os, signal; {kill('SIGSEGV')}")
    assert (done.returncode, done.stderr) == (-signal.SIGSEGV, "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
@pytest.mark.parametrize("command", ["demo", "eval", "bench", "chat"])
def test_the_commands_say_what_they_were_doing(command: str, name: str, tiny_model_factory, tmp_path: Path) -> None:
    document = tmp_path / "document"
    document.write_text("a" * 30_000)
    model = tiny_model_factory(n_ctx_train=65536, n_layer=2)
    commands: dict[str, list[object]] = {
        "demo": ["--no-chat"],
        "eval": ["--results", tmp_path / "results.jsonl"],
        "bench": [model, "-p", "30000"],
        "chat": [model, "-f", document, "-p", "x"],
    }
    words = commands[command]
    file = model.name if model in words else "needle.gguf"
    process = subprocess.Popen(
        [sys.executable, "-m", "swaa_local", command, *map(str, words), "-t", "1"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: process.poll() is not None or file in maps.read_text(), "the model is loaded", timeout=60)
        process.send_signal(signal.Signals[name])
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.Signals[name], error
    said = error.strip().splitlines()[-1]
    assert said.startswith(f"swaa-local: error: ended by {name} while ")
    assert advice(name) in said
