"""Requests that wait for a slot: each is answered as soon as a slot is free for it, and disturbs none that is running.

What runs is a stream that goes on until the test ends it; what waits is counted by the server's own metrics.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import Running, serving, wait_until
from tests.support.tiny import random_tokens

pytestmark = pytest.mark.usefixtures("engine")

ANSWERED_S = 30.0
N_LONG = 3000
WITHOUT_END = {"n_predict": -1, "ignore_eos": True, "cache_prompt": False, "temperature": 0, "return_tokens": True}

Ask = Callable[[Running], int]

# Of a context that shifts, a stream without an end does not come to one.
OPTIONS = ("-c", "1024", "--context-shift", "--metrics", "--slots", "--slot-save-path")


def are_deferred(server: Running, n: int) -> bool:
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        found = re.search(r"^llamacpp:requests_deferred (\d+)", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return int(found[1]) == n


def completion(**options: Any) -> Ask:
    body = {"prompt": "a", "n_predict": 2} | options
    return lambda server: server.post("/completion", body)[0]


def slot_action(action: str, slot: int = 0) -> Ask:
    return lambda server: server.post(f"/slots/{slot}?action={action}", {"filename": "slot.bin"})[0]


BAD_GRAMMAR = completion(grammar="root ::= (", grammar_lazy=False)
"""Refused when its sampler is made, which is when it gets a slot."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


class Busy:
    """A slot that is busy until it is told to stop."""

    def __init__(self, server: Running, slot: int) -> None:
        self._events = server.stream("/completion", {"prompt": "b", "id_slot": slot} | WITHOUT_END)
        next(self._events)

    def stop(self) -> None:
        self._events.close()


def waiting(server: Running, pool: ThreadPoolExecutor, asks: list[Ask]) -> list[Future[int]]:
    """Ask for all, each once those before it wait."""
    futures = []
    for n, ask in enumerate(asks, start=1):
        futures.append(pool.submit(ask, server))
        wait_until(partial(are_deferred, server, n), f"{n} wait")
    return futures


@pytest.mark.parametrize(
    ("asks", "statuses"),
    [
        ([slot_action("save"), slot_action("erase"), slot_action("save"), completion()], [200, 200, 200, 200]),
        ([slot_action("restore"), slot_action("restore"), completion(id_slot=0)], [400, 400, 200]),
        ([completion(), slot_action("erase"), slot_action("save"), completion(), completion()], [200] * 5),
        ([BAD_GRAMMAR, BAD_GRAMMAR, completion()], [400, 400, 200]),
    ],
    ids=["slot actions", "slot actions that fail", "some of each", "requests that fail"],
)
def test_all_that_wait_are_answered(
    tiny_model: Path, tmp_path: Path, pool: ThreadPoolExecutor, asks: list[Ask], statuses: list[int]
) -> None:
    """Whatever it is that gets the slot first, and though what is done at once never gives a slot back."""
    with serving(tiny_model, *OPTIONS, tmp_path, "-np", "1") as server:
        busy = Busy(server, 0)
        futures = waiting(server, pool, asks)
        busy.stop()
        assert [future.result(timeout=ANSWERED_S) for future in futures] == statuses


@pytest.mark.parametrize(
    "ask", [slot_action("save", 1), completion(id_slot=1), completion(n=2)], ids=["an action", "a pin", "two answers"]
)
def test_what_has_to_wait_longer_keeps_no_other_from_a_free_slot(
    tiny_model: Path, tmp_path: Path, pool: ThreadPoolExecutor, ask: Ask
) -> None:
    with serving(tiny_model, *OPTIONS, tmp_path, "-np", "2") as server:
        busy = [Busy(server, 0), Busy(server, 1)]
        late, early = waiting(server, pool, [ask, completion()])
        busy[0].stop()
        assert early.result(timeout=ANSWERED_S) == 200
        assert not late.done()
        busy[1].stop()
        assert late.result(timeout=ANSWERED_S) == 200


def test_who_waits_for_a_slot_leaves_its_conversation_alone(tiny_model: Path, pool: ThreadPoolExecutor) -> None:
    """Not even a prompt that the server has put aside is brought back before the slot is free."""
    running, kept = random_tokens(300, seed=1), random_tokens(300, seed=2)
    with serving(tiny_model, "-c", "4096", "-np", "1", "--metrics") as server:
        expected = server.complete(running, N_LONG, cache_prompt=False)["tokens"]
        expected_kept = server.complete(kept, 8)["tokens"]
        events = server.stream("/completion", WITHOUT_END | {"prompt": running, "n_predict": N_LONG, "id_slot": 0})
        tokens = next(events)["tokens"]
        [later] = waiting(server, pool, [lambda server: server.complete(kept, 8, id_slot=0)["tokens"]])
        tokens += [token for event in events for token in event["tokens"]]
        assert tokens == expected
        assert later.result(timeout=ANSWERED_S) == expected_kept
