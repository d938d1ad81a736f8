"""`swaa-local worker`: what it prints and warns of, what it refuses, how it ends, and what it keeps."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from swaa_local import Llama
from swaa_local.engine.workers import PROTOCOL, WorkerAddress, ask_version
from tests.support.libraries import linked
from tests.support.program import fails, run, succeeds
from tests.support.serving import descendants, is_running, wait_until
from tests.support.tiny import random_tokens
from tests.support.workers import Proxy, worker

TOKENS = random_tokens(100)


def test_it_prints_the_address_for_the_other_side() -> None:
    with worker() as started:
        assert re.fullmatch(r"127\.0\.0\.1:\d+", started.address)
        assert f"on the other machine: swaa-local chat MODEL --rpc {started.address}" in started.log
        assert "CPU · " in started.log
        assert "no authentication" not in started.log


def test_it_speaks_the_version_that_is_asked_for() -> None:
    """What the engine was built with, by the worker's own answer."""
    with worker() as started:
        assert ask_version(WorkerAddress.parse(started.address)) == PROTOCOL


def test_one_that_others_reach_is_warned_of() -> None:
    """It listens everywhere, and prints an address that is no loopback's where the machine has one."""
    with worker("--host", "0.0.0.0") as started:
        said = " ".join(started.log.split())
        assert "whoever reaches" in said
        assert "no authentication and no encryption" in said
        port = started.address.rpartition(":")[2]
        assert f"ssh -N -L {port}:127.0.0.1:{port}" in said
        assert ask_version(WorkerAddress.parse(started.address)) == PROTOCOL
        assert ask_version(WorkerAddress("127.0.0.1", int(port))) == PROTOCOL


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_in_order(name: str, tiny_model: Path) -> None:
    """Also while it serves a program."""
    with worker() as started:
        [server] = descendants(started.process.pid)
        llm = Llama(str(tiny_model), n_ctx=256, rpc_servers=[started.address])
        assert started.stop(signal.Signals[name]) == 0
        assert not is_running(server)
        llm.close()
        assert "error" not in started.log


def test_one_that_is_killed_is_told() -> None:
    with worker() as started:
        [server] = descendants(started.process.pid)
        os.kill(server, signal.SIGKILL)
        assert started.process.wait(timeout=30) == 128 + signal.SIGKILL
        assert "the worker was ended by SIGKILL" in " ".join(started.log.split())
        assert "--tensor-split" in started.log


def test_the_server_goes_with_the_command() -> None:
    with worker() as started:
        [server] = descendants(started.process.pid)
        started.process.kill()
        wait_until(lambda: not is_running(server), "the server's end")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} is taken by another program" in fails("worker", "--port", port)


@pytest.mark.parametrize("host", ["no.such.name.invalid", "::1", "203.0.113.1"])
def test_an_address_that_is_not_this_machines(host: str) -> None:
    assert host in fails("worker", "--host", host, "--port", "0")


def test_a_device_that_is_not_there() -> None:
    error = fails("worker", "--port", "0", "--device", "CPU,GPU9")
    assert "this machine has no device 'GPU9'; it has CPU" in error


def test_a_build_without_it(tmp_path: Path) -> None:
    import llama_cpp.llama_cpp as engine

    libraries = linked(Path(engine._lib._name).parent, tmp_path, lambda name: name != "ggml-rpc-server")
    error = fails("worker", LLAMA_CPP_LIB_PATH=str(libraries))
    assert "has no ggml-rpc-server" in error
    assert "without GGML_RPC=OFF" in error


def test_weights_are_sent_once(tmp_path: Path, tiny_model_factory: Callable[..., Path]) -> None:
    """Tensors above 10 MiB are kept by their content; a file that was damaged meanwhile is not used."""
    path = tiny_model_factory(n_layer=1, n_embd=1024, n_ff=4096)
    cache = tmp_path / "kept"
    with worker("--cache", cache) as started:
        expected, first = _read(path, started.address)
        again, second = _read(path, started.address)
        kept = sorted((cache / "rpc").iterdir())
        assert kept
        assert second < first - sum(file.stat().st_size for file in kept) * 0.9
        assert again == expected
        content = kept[0].read_bytes()
        kept[0].write_bytes(content[: len(content) // 2])
        cut, _ = _read(path, started.address)
        assert cut == expected
        assert kept[0].read_bytes() == content
        kept[0].write_bytes(content[:-4] + bytes(4))
        changed, _ = _read(path, started.address)
        assert changed == expected
    assert (cache / "rpc").stat().st_mode & 0o077 == 0


def _read(path: Path, address: str) -> tuple[list[float], int]:
    """Logits behind some tokens, and the bytes that went to the worker."""
    with Proxy(address) as proxy:
        llm = Llama(str(path), n_ctx=256, rpc_servers=[proxy.address], logits_all=True, n_threads=1, n_threads_batch=1)
        llm.eval(TOKENS)
        found = llm.scores[len(TOKENS) - 1].tolist()
        llm.close()
        return found, proxy.sent


# The commands that use it


def test_chat_says_where_the_layers_are_and_answers_the_same(tiny_model: Path) -> None:
    asked = ("chat", tiny_model, "-p", "hello", "--temp", "0", "-n", "8", "-c", "512", "-t", "1", "--no-cache")
    with worker() as first, worker() as second:
        shared = ("--rpc", f"{first.address},{second.address}", "-ts", "3,2")
        done = run(*asked, *shared)
        assert done.returncode == 0, done.stderr
        assert f"layers 0-2 on {first.address}, 3 on {second.address}" in done.stderr
        assert done.stdout == succeeds(*asked)
        alone = run(*asked, *shared[:2], "-sm", "none", "-mg", "1")
        assert f"layers 0-3 on {second.address}" in alone.stderr
        assert alone.stdout == done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "-p", "64", "-n", "4", "-r", "1", "--variants", "full"),
        ("eval", "--task", "facts_statements", "--length", "2048", "--samples", "1", "--variants", "full"),
    ],
    ids=lambda command: command[0],
)
def test_commands_take_workers(tiny_model: Path, command: tuple[str, ...], tmp_path: Path) -> None:
    with worker() as started, Proxy(started.address) as proxy:
        name, *options = command
        done = run(name, tiny_model, *options, "-t", "1", "--rpc", proxy.address, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert proxy.sent > tiny_model.stat().st_size / 2


def test_commands_name_a_worker_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    for command in (("chat", "-p", "a"), ("bench",), ("eval",), ("calibrate", "-o", "out.gguf"), ("serve",)):
        name, *options = command
        error = fails(name, tiny_model, *options, "--rpc", "127.0.0.1:9", cwd=tmp_path)
        assert "no worker listens at 127.0.0.1:9; start one there" in error, name


def test_shares_that_are_none(tiny_model: Path) -> None:
    for wrong in ("a", "1,,2", "-1,2", "0,0", "nan"):
        assert "not a list of shares such as 3,1" in fails("chat", tiny_model, "-p", "a", "-ts", wrong, code=2)


def test_commands_name_a_worker_that_dies(tiny_model: Path, tmp_path: Path) -> None:
    """In the middle of a prompt: one line, no figures, and no answer."""
    for command in (("bench", "-p", "2000", "-n", "4", "-r", "1", "--variants", "full"), ("chat", "-p", "a" * 2000)):
        name, *options = command
        with worker() as started:
            at = tiny_model.stat().st_size * 1.2

            def end(sent: int, at: float = at, ends: Callable[[], None] = started.kill) -> None:
                if sent > at and started.process.poll() is None:
                    ends()

            with Proxy(started.address, end) as proxy:
                error = fails(name, tiny_model, *options, "-t", "1", "-b", "64", "--rpc", proxy.address, cwd=tmp_path)
                assert f"the worker {proxy.address} is lost" in error, name
