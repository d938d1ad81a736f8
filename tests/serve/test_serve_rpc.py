"""`swaa-local serve --rpc`: answers are those of one machine, also at once; a worker that dies fails its requests."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from swaa_local.engine.native import engine_program
from tests.support.program import fails
from tests.support.serving import Running, serving, together
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys, random_tokens
from tests.support.workers import Answering, Proxy, Worker, hello, worker, workers

SCHEDULE = ScheduleKeys(64, 4, (ALWAYS, PREFILL, FULL, PREFILL), tail=8)
OPTIONS = ("-c", "4096", "-np", "4", "-b", "128", "-ub", "64", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "-lv", "2")
PROMPTS = [random_tokens(300 + 97 * i, seed=i) for i in range(8)]


@pytest.fixture(scope="module")
def model(tiny_model_factory: Callable[..., Path]) -> Path:
    return tiny_model_factory(schedule=SCHEDULE)


@pytest.fixture(scope="module")
def two() -> Iterator[list[Worker]]:
    with workers(2) as started:
        yield started


def answers(server: Running) -> list[Any]:
    return [answer["tokens"] for answer in together([partial(server.complete, prompt, 16) for prompt in PROMPTS])]


def test_answers_over_two_workers_at_once_are_those_of_one_machine(model: Path, two: list[Worker]) -> None:
    with serving(model, *OPTIONS, "--no-cache") as alone:
        expected = answers(alone)
    assert all(len(tokens) == 16 for tokens in expected)
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    with Proxy(two[0].address) as first, Proxy(two[1].address) as second:
        rpc = ("--rpc", f"{first.address},{second.address}", "--tensor-split", "1,1")
        with serving(model, *OPTIONS, *rpc) as spread:
            assert answers(spread) == expected
            assert answers(spread) == expected  # slots that hold something else
        assert min(first.sent, second.sent) > model.stat().st_size / 4


def test_a_worker_that_dies_fails_every_request_by_its_name(model: Path, two: list[Worker]) -> None:
    with worker() as mortal:
        with serving(model, *OPTIONS, "--rpc", f"{two[0].address},{mortal.address}", "-ts", "1,1") as server:
            assert len(server.complete(PROMPTS[0], 4)["tokens"]) == 4
            body = {"prompt": PROMPTS[1], "n_predict": 2000, "temperature": 0, "ignore_eos": True}
            events = server.stream("/completion", body)
            before = [next(events) for _ in range(3)]
            waiting = threading.Thread(target=mortal.kill)
            waiting.start()
            after = list(events)
            waiting.join()
            assert all("content" in event for event in before)
            assert mortal.address in str(after[-1])
            for path, body in (
                ("/completion", {"prompt": PROMPTS[2], "n_predict": 4}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
            ):
                status, error = server.post(path, body)
                assert status == 500
                assert f"({mortal.address}), which has layers of the model, is lost" in error["error"]["message"]
            assert server.stop() == 0


def test_a_worker_that_is_not_there_is_told_before_the_model_is_loaded(model: Path) -> None:
    assert "no worker listens at 127.0.0.1:9" in fails("serve", model, "--port", "0", "--rpc", "127.0.0.1:9")
    assert "no worker listens at 127.0.0.1:9" in fails("serve", model, "--port", "0", LLAMA_ARG_RPC="127.0.0.1:9")


def test_llama_server_itself_refuses_what_is_no_worker(model: Path) -> None:
    """Without the command's own check before."""
    program = engine_program("llama-server", "LLAMA_BUILD_SERVER")
    with Answering(hello((8, 0, 0))) as other:
        for address, why in (
            ("127.0.0.1:9", "cannot be reached"),
            (other.address, "speaks version 8.0 of the protocol"),
        ):
            command = [str(program), "-m", str(model), "--port", "0", "--rpc", address]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            said = done.stdout + done.stderr
            assert done.returncode == 1, said
            assert f"the RPC server {address} {why}" in said
            assert f"the RPC server {address} cannot be used" in said
