"""A child that a signal ends is reported by the signal's name, the step and what to try, with its own last words."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from swaa_local.convert import quantize
from swaa_local.files import signals
from swaa_local.files.child_process import ChildError, run_child
from swaa_local.files.output_tail import OutputTail
from swaa_local.files.server_process import ServerDied, ServerError, ServerProcess
from tests.support.program import ROOT
from tests.support.serving import descendants, serving, wait_until

ABORT = "/tmp/build/vendor/llama.cpp/ggml/src/ggml.c:1742: GGML_ASSERT(ne[1] > 0) failed"
SHORT_ABORT = "ggml.c:1742: GGML_ASSERT(ne[1] > 0) failed"
# As gdb writes it, longer than what is kept of a log.
BACKTRACE = [
    '[Thread debugging using libthread_db enabled]\nUsing host libthread_db library "/lib/libthread_db.so.1".',
    "30\t../sysdeps/unix/sysv/linux/wait4.c: No such file or directory.",
    *(
        f"#{n}  0x00007f46 in ggml_abort (file=0x1, line={n}) at /src/ggml.c:{n}\n{n}\tin /src/ggml.c"
        for n in range(60)
    ),
    "[Inferior 1 (process 4242) detached]",
]


def tail(*lines: str) -> OutputTail:
    made = OutputTail()
    for line in "\n".join(lines).splitlines():
        made.add(line)
    return made


# What a program says last


@pytest.mark.parametrize(
    ("lines", "last_words"),
    [
        ([ABORT, *BACKTRACE], SHORT_ABORT),
        (["loading", ABORT], SHORT_ABORT),
        (["C:\\build\\ggml-cuda\\ggml-cuda.cu:99: CUDA error", *BACKTRACE], "ggml-cuda.cu:99: CUDA error"),
        (
            [*BACKTRACE, "terminate called after throwing an instance of 'std::runtime_error'", "  what():  no room"],
            "no room",
        ),
        (["terminate called without an active exception", *BACKTRACE], "terminate called without an active exception"),
        (["caught: std::exception", "  what():  no room"], ""),
        (["free(): invalid pointer"], "free(): invalid pointer"),
        (["malloc(): corrupted top size"], "malloc(): corrupted top size"),
        (["*** stack smashing detected ***: terminated"], "*** stack smashing detected ***: terminated"),
        (
            ["Fatal Python error: Segmentation fault", "", "Current thread 0x1"],
            "Fatal Python error: Segmentation fault",
        ),
        (BACKTRACE, ""),
        (["a.py:12: UserWarning: x", "[W123 NNPACK.cpp:56] Could not initialize NNPACK"], ""),
        ([], ""),
    ],
)
def test_the_line_that_says_why_is_found(lines: list[str], last_words: str) -> None:
    assert tail(*lines).last_words == last_words


def test_else_it_is_the_last_line() -> None:
    assert tail("one", "two", "").reason == "two"
    assert tail(ABORT, "detached").reason == SHORT_ABORT
    assert tail().reason == ""


# The sentence


@pytest.mark.parametrize(
    ("name", "to_try"),
    [
        ("SIGILL", "instruction that this CPU lacks: build it for this machine with `uv sync --reinstall-package"),
        ("SIGKILL", "unless somebody killed it, the memory ran out: take a smaller model"),
        ("SIGSEGV", "a broken model file, or a bug of the engine"),
        ("SIGABRT", "a broken model file, or a bug of the engine"),
        ("SIGBUS", "is its disk full"),
        ("SIGXFSZ", "ulimit -f"),
        ("SIGTERM", "another program asked it to end"),
    ],
)
def test_a_signal_has_a_name_and_an_advice(name: str, to_try: str) -> None:
    said = signals.ended_by(signal.Signals[name], "quantizing", memory="take a smaller model")
    assert said.startswith(f"quantizing was ended by {name}; ")
    assert to_try in said


def test_the_code_that_ran_is_named() -> None:
    said = signals.ended_by(signal.SIGILL, "the converter", culprit="PyTorch")
    assert "PyTorch used an instruction that this CPU lacks: install a build for this CPU" in said
    assert "a bug of PyTorch" in signals.ended_by(signal.SIGSEGV, "the converter", culprit="PyTorch")


def test_a_number_without_a_name() -> None:
    assert signals.ended_by(signal.SIGRTMIN + 3, "it").startswith(f"it was ended by signal {signal.SIGRTMIN + 3}; ")


# Children


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch):
    """`failed(**request) -> ChildError` of dying_worker.py."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

    def fail(**request: str) -> ChildError:
        with pytest.raises(ChildError) as caught:
            run_child("tests.support.dying_worker", request, what="quantizing")
        return caught.value

    return fail


@pytest.mark.parametrize("name", ["SIGILL", "SIGKILL", "SIGSEGV", "SIGTERM"])
def test_a_child_that_a_signal_ends(failed, name: str) -> None:
    error = failed(signal=name)
    assert str(error).startswith(f"quantizing was ended by {name}; ")
    assert (error.signal, error.last_words) == (signal.Signals[name], "")


def test_a_child_that_aborts_says_why(failed) -> None:
    """Whatever a debugger writes behind it, where the machine has one."""
    error = failed(abort="GGML_ASSERT(n > 0) failed")
    assert str(error).startswith("quantizing was ended by SIGABRT: ggml.c:12: GGML_ASSERT(n > 0) failed; ")


def test_a_childs_error_is_its_own_sentence(failed) -> None:
    assert str(failed(error="no such thing")) == "no such thing"


@pytest.mark.parametrize(
    ("error", "refused", "unchecked"),
    [
        (ChildError("x", SHORT_ABORT, signal=signal.SIGABRT), SHORT_ABORT, None),
        (ChildError("ended by SIGSEGV", signal=signal.SIGSEGV), "ended by SIGSEGV", None),
        # no fault of the file
        (ChildError("ended by SIGKILL", signal=signal.SIGKILL), None, "ended by SIGKILL"),
        (ChildError("ended by SIGILL", signal=signal.SIGILL), None, "ended by SIGILL"),
    ],
)
def test_a_file_is_refused_for_what_it_does_to_the_engine(
    monkeypatch: pytest.MonkeyPatch, error: ChildError, refused: str | None, unchecked: str | None
) -> None:
    def run(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(quantize, "run_child", run)
    assert quantize.engine_refusal(Path("m.gguf")) == (refused, unchecked)


# The server


def starting(tmp_path: Path, *lines: str, end: str) -> ServerError:
    """What is said of a server that writes these lines, and then does what `end` says."""
    log = tmp_path / "log"
    log.write_text("\n".join(lines) + "\n")
    program = f"import os, signal, sys; print(open({str(log)!r}).read()); sys.stdout.flush(); {end}"
    with ServerProcess([sys.executable, "-c", program], os.environ) as server:
        with pytest.raises(ServerError) as caught:
            server.wait_ready(lambda: False)
    return caught.value


def test_a_server_that_aborts_at_its_start(tmp_path: Path) -> None:
    error = starting(tmp_path, "loading", ABORT, *BACKTRACE, end="os.abort()")
    assert isinstance(error, ServerDied)
    assert error.exit_code == 128 + signal.SIGABRT
    assert f"was ended by SIGABRT: {SHORT_ABORT}; " in str(error)


def test_a_server_without_memory(tmp_path: Path) -> None:
    error = starting(tmp_path, "loading", end="os.kill(os.getpid(), signal.SIGKILL)")
    assert "was ended by SIGKILL: loading; " in str(error)
    assert "take a smaller context or model" in str(error)


def test_a_server_that_gives_a_reason_and_ends_by_itself(tmp_path: Path) -> None:
    error = starting(tmp_path, "0.00.1 E srv  load_model: no room", "cleaning up", end="sys.exit(1)")
    assert str(error) == "the server did not start (exit code 1): no room"


@pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux only")
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGILL", "SIGKILL"])
def test_a_server_that_dies_at_work(tiny_model: Path, name: str) -> None:
    with serving(tiny_model, "-c", "512") as running:
        [server] = descendants(running.process.pid)
        os.kill(server, signal.Signals[name])
        assert running.process.wait(timeout=30) == 128 + signal.Signals[name]
        wait_until(lambda: "swaa-local: error:" in running.log, "it is said")
        said = running.log.strip().splitlines()[-1]
        assert said.startswith(f"swaa-local: error: the server was ended by {name}; ")
