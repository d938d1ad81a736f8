"""What breaks servers, sent to `swaa-local serve`: a good client beside it notices nothing, and the server still ends.

The faults are those of scripts/server_faults.py, each once; scripts/soak_server.py sends them for as long as one likes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from server_faults import CUT_OFF, FAULTS, OPEN, Target
from soak_server import N_OPEN, Soak, server_of
from tests.serve.test_serve import TOOLS
from tests.support import tiny
from tests.support.program import ROOT, environment
from tests.support.service import STOP_S
from tests.support.serving import Running, descendants, is_running, serving, wait_until

pytestmark = pytest.mark.usefixtures("engine")

linux = pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux only")

# Of the many that a soak sends, as many as a few seconds allow.
N_NEARLY_RIGHT = 400
MAX_RSS_MIB = 1500


def target_of(running: Running) -> Target:
    address = urlsplit(running.url)
    assert address.hostname is not None
    assert address.port is not None
    return Target(address.hostname, address.port)


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    """A model whose template knows tools, and every endpoint that a text model has."""
    folder = tmp_path_factory.mktemp("faults")
    model = tiny.write_tiny_gguf(folder / "tools.gguf", n_ctx_train=8192, chat_template=TOOLS)
    options = ("-c", 8192, "-np", 2, "--slots", "--slot-save-path", folder, "--embeddings", "--pooling", "mean")
    with serving(model, *options) as running:
        yield Soak(target_of(running), pid=server_of(running.process.pid), max_rss_mib=MAX_RSS_MIB)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_the_client_s_own(soak: Soak, name: str) -> None:
    soak.send(name)
    soak.check()
    assert not soak.report.wrong


def test_requests_that_are_nearly_right_are_never_the_server_s_fault(soak: Soak) -> None:
    for seed in range(N_NEARLY_RIGHT):
        soak.send_nearly_right(seed)
    soak.check()
    assert not soak.report.wrong


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", OPEN)
def test_nobody_waits_for_open_connections(tiny_model: Path, name: str, number: int) -> None:
    """Neither a monitor nor a new client, nor whoever stops the server, or kills the command that started it."""
    with serving(tiny_model, "-c", "4096", "-np", "2") as running:
        soak = Soak(target_of(running))
        [server] = descendants(running.process.pid)
        for _ in range(4 if name == "a reader that stalls" else N_OPEN):
            soak.open(name)
        soak.check()
        assert not soak.report.wrong
        if number == signal.SIGTERM:
            assert running.stop() == 0
        else:
            running.process.kill()
        wait_until(lambda: not is_running(server), "the server ends", timeout=STOP_S)
        soak.close()


@linux
def test_a_server_that_cannot_end_in_order_ends_all_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """It reads a slot from a pipe that nobody writes to, and so never comes to look at what it was told."""
    os.mkfifo(tmp_path / "pipe")
    with serving(tiny_model, "-c", "512", "-np", "1", "--slots", "--slot-save-path", tmp_path) as running:
        connection = target_of(running).connect()
        body = json.dumps({"filename": "pipe"}).encode()
        connection.sendall(target_of(running).head("POST", "/slots/0?action=restore", len(body)) + body)

        def hangs() -> bool:
            try:
                urllib.request.urlopen(running.url + "/slots", timeout=1).close()
            except TimeoutError:
                return True
            return False

        wait_until(hangs, "it waits for the pipe")
        assert running.stop() == 0
        assert "did not end in order" in running.log
        connection.close()


@linux
def test_a_server_that_hears_no_signal_is_killed(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512") as running:
        [server] = descendants(running.process.pid)
        os.kill(server, signal.SIGSTOP)
        assert running.stop(signal.SIGTERM) == 128 + signal.SIGKILL


def test_a_request_that_is_not_sent_to_its_end_is_given_up(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512", "-np", "1", "--timeout", "1") as running:
        for name in ("half a head", "half a body", "a chunk without an end"):
            with OPEN[name](target_of(running)) as connection:
                answer = b""
                while chunk := connection.recv(4096):
                    answer += chunk
                assert not answer or answer.startswith(b"HTTP/1.1 4"), (name, answer)


def bytes_on_the_way(port: int) -> int:
    """What was sent through a port of this machine and not read yet, in both directions (proc(5), /proc/net/tcp)."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [row[4].split(":") for row in rows if f":{port:04X}" in (row[1][-5:], row[2][-5:])]
    return sum(int(count, 16) for pair in queues for count in pair)


@linux
def test_large_requests_that_stay_open_keep_no_small_one_out(tiny_model: Path) -> None:
    """As much as the server holds is sent and not ended: another large one waits its turn, small ones do not."""
    with serving(tiny_model, "-c", "512", "-np", "1") as running:
        soak, connections = Soak(target_of(running)), []
        for _ in range(2):
            connection = target_of(running).connect()
            connection.sendall(target_of(running).head("POST", "/completion", 15 << 20) + b" " * (14 << 20))
            connections.append(connection)
        wait_until(lambda: bytes_on_the_way(target_of(running).port) == 0, "the server has read them")
        status, answer = target_of(running).ask("POST", "/completion", b" " * (15 << 20))
        assert status in (503, CUT_OFF), answer[:200]
        soak.check()
        assert not soak.report.wrong
        for connection in connections:
            connection.close()
        wait_until(lambda: target_of(running).ask("POST", "/completion", b" " * (15 << 20))[0] == 400, "they are gone")


def test_what_a_client_sends_does_not_reach_the_terminal_as_commands(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512", "-np", "1") as running:
        assert running.post("/completion", {"prompt": "a", "grammar": "root ::= \x1b]0;owned\x07(\r\n"})[0] == 400
        wait_until(lambda: "error parsing grammar" in running.log, "the reason is told")
        assert "\\x1b]0;owned\\x07" in running.log
        assert not {"\x1b", "\x07"} & set(running.log)


def test_the_harness_reports_what_is_wrong(tiny_model: Path) -> None:
    """It would be of no use if it were content with anything."""
    with serving(tiny_model, "-c", "512", "-np", "1", "--cors-origins", "*") as running:
        soak = Soak(target_of(running))
        soak.send("a page of another origin")
        soak.check()
        assert soak.report.wrong == ["a page of another origin: status 200, not 403"]


def test_the_harness_is_a_command(tiny_model: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "soak_server.py"),
        str(tiny_model),
        "--seconds",
        "2",
        "--seed",
        "1",
    ]
    done = subprocess.run(
        [*command, "--fault", "an image", "--", "--alias", "x"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "an image" in done.stdout
    assert "after SIGTERM" in done.stderr
