"""A hybrid model in the real server: slots, prompts that are there already, checkpoints, the cache on disk, refusals.

The oracle is `Llama`, alone, on the same tokens, each in its phase from an empty context.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from swaa_local import Llama
from tests.support.program import fails
from tests.support.serving import Running, serving, together, wait_until
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens
from tests.support.tiny_hybrid import hybrid, write_tiny_hybrid

pytestmark = pytest.mark.usefixtures("engine")

SIZES = ("-c", "8192", "-b", "64", "-ub", "32", "-np", "2")
SCHEDULES = {
    "windowed prefill": (hybrid(64, 4, (PREFILL, FULL, PREFILL, PREFILL)), ("-kvu",)),
    "windowed prefill, each slot its own cache": (hybrid(64, 4, (PREFILL, FULL, PREFILL, PREFILL)), ("-no-kvu",)),
    "all modes": (hybrid(64, 4, (ALWAYS, FULL, PREFILL, ALWAYS)), ("-kvu",)),
    "no schedule": (None, ("-kvu",)),
}


class Alone:
    """The same model in this process."""

    def __init__(self, path: Path) -> None:
        self._llm = Llama(str(path), n_ctx=4096, n_batch=64, n_ubatch=32, n_threads=1, n_threads_batch=1)

    def complete(self, prompt: list[int], n: int) -> list[int]:
        """Greedy tokens after a cold prefill."""
        llm, tokens = self._llm, list[int]()
        llm.reset()
        llm.eval(prompt)
        while len(tokens) < n:
            tokens.append(int(llm.sample(temp=0.0)))
            llm.eval(tokens[-1:], decode=True)
        return tokens


@pytest.fixture(scope="module", params=SCHEDULES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Alone]]:
    schedule, options = SCHEDULES[request.param]
    path = write_tiny_hybrid(tmp_path_factory.mktemp("hybrid") / "m.gguf", schedule=schedule, n_ctx_train=8192)
    with serving(path, *SIZES, "--no-cache", *options) as running:
        yield running, Alone(path)


def test_it_answers_as_the_library_does(server):
    running, alone = server
    for length in (1, 2, 65, 700):
        prompt = random_tokens(length, seed=length)
        assert running.complete(prompt, 12)["tokens"] == alone.complete(prompt, 12), length


def test_two_slots_at_once(server):
    """One is read while the other answers; each is as alone."""
    running, alone = server
    prompts = [random_tokens(n, seed=n) for n in (500, 620, 333, 150)]
    answers = together([partial(running.complete, prompt, 12) for prompt in prompts])
    assert [answer["tokens"] for answer in answers] == [alone.complete(prompt, 12) for prompt in prompts]


def test_a_conversation_goes_on_and_goes_back(server):
    """Behind the answer nothing is read again; before it, from a checkpoint."""
    running, alone = server
    prompt = random_tokens(900, seed=3)
    first = running.complete(prompt, 12, id_slot=0)
    assert first["tokens"] == alone.complete(prompt, 12)
    more = [*prompt, *first["tokens"], *random_tokens(40, seed=4)]
    assert running.complete(more, 1, id_slot=0)["timings"]["prompt_n"] <= 41
    other = [*prompt, *random_tokens(50, seed=5)]
    answer = running.complete(other, 12, id_slot=0)
    assert answer["tokens"] == alone.complete(other, 12)
    assert answer["timings"]["prompt_n"] < len(other)


def test_props_tell_the_schedule(server):
    running, _ = server
    told = running.get("/props")[1]["swaa"]
    assert told is None or (len(told["layer_modes"]) == 7 and set(told["layer_modes"][0::2]) - {"F"} <= {"P", "A"})


@pytest.mark.parametrize("name", ["windowed prefill", "all modes", "no schedule"])
def test_a_prompt_that_was_read_before_a_restart(tmp_path, name):
    schedule, options = SCHEDULES[name]
    path = write_tiny_hybrid(tmp_path / "m.gguf", schedule=schedule, n_ctx_train=8192)
    prompt, other = random_tokens(1500, seed=6), random_tokens(60, seed=7)
    home = tmp_path / "cache"
    with serving(path, *SIZES, *options, XDG_CACHE_HOME=str(home)) as running:
        running.complete(prompt, 4)
        wait_until(lambda: any((home / "swaa-local" / "states").glob("*.prefix")), "a state is written")
    with serving(path, *SIZES, *options, XDG_CACHE_HOME=str(home)) as running:
        answer = running.complete([*prompt, *other], 12)
    assert answer["timings"]["cache_n"] > 1000
    assert answer["tokens"] == Alone(path).complete([*prompt, *other], 12)


def test_drafts_through_a_window_are_refused(tmp_path):
    path = write_tiny_hybrid(tmp_path / "m.gguf", schedule=SCHEDULES["windowed prefill"][0])
    said = fails("serve", path, "--port", "0", "--draft-window", "128", code=1)
    assert "recurrent layers, whose state cannot take drafts back" in said
