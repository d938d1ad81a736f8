"""The tail in the real server: the last tokens of each prompt are decoded, as many as the model or the request says.

The oracle is `Llama`, alone, told the phase of each token. Greedy tokens often come out the same, so the probabilities
of the first one are compared too.
"""

from __future__ import annotations

import itertools
import random
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.test_schedule import SIZES, TIE, Alone, assert_same, decode_while_prefilling, phases
from tests.support.serving import Running, serving, together
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

WINDOW, SINKS, TAIL = 64, 4, 40
N_PROBS = 8
PREFILLING = ScheduleKeys(WINDOW, SINKS, (PREFILL, FULL, PREFILL, PREFILL), tail=TAIL)
MIXED = ScheduleKeys(WINDOW, SINKS, (FULL, PREFILL, ALWAYS, ALWAYS), tail=TAIL)
RING = ScheduleKeys(WINDOW, SINKS, (ALWAYS,) * 4, tail=TAIL)

Make = Callable[..., Path]


@pytest.fixture(scope="module", params=[PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def tailed(request: pytest.FixtureRequest, tiny_model_factory: Make) -> Iterator[tuple[Running, Alone]]:
    path = tiny_model_factory(schedule=request.param, n_ctx_train=8192)
    with serving(path, *SIZES, "-np", "4", "--slots") as server:
        yield server, Alone(path)


@pytest.fixture(scope="module")
def prefilling(tiny_model_factory: Make) -> Path:
    return tiny_model_factory(schedule=PREFILLING, n_ctx_train=8192)


def ask(server: Running, prompt: Sequence[int], n: int, **options: Any) -> dict[str, Any]:
    return server.complete(prompt, n, n_probs=N_PROBS, **options)


def assert_read_as(answer: dict[str, Any], alone: Alone, prompt: Sequence[int], decoded: Sequence[bool]) -> None:
    """The prompt was read in these phases, and generated tokens were decoded."""
    expected = alone.read(prompt, decoded)
    first = answer["completion_probabilities"][0]["top_logprobs"]
    assert len(first) == N_PROBS
    assert max(abs(entry["logprob"] - expected[entry["id"]]) for entry in first) < TIE
    assert_same(alone.complete_as(prompt, decoded, len(answer["tokens"])), answer)


class Talk:
    """A conversation in a slot: its tokens, and which of them were decoded."""

    def __init__(self, server: Running, alone: Alone) -> None:
        self._server, self._alone = server, alone
        self.decoded: list[bool] = []
        self.text: list[int] = []

    def turn(self, prompt: Sequence[int], n: int, *, tail: int = TAIL, **options: Any) -> int:
        """Ask, and hold the answer against what it must be; the number of tokens that were in the cache."""
        answer = ask(self._server, prompt, n, **options)
        n_cached = answer["timings"]["cache_n"]
        assert answer["timings"]["prompt_n"] == len(prompt) - n_cached
        n_prefill = max(n_cached, len(prompt) - tail)
        decoded = self.decoded[:n_cached] + [position >= n_prefill for position in range(n_cached, len(prompt))]
        assert_read_as(answer, self._alone, prompt, decoded)
        self.text = [*prompt, *answer["tokens"]]
        # the last generated token was never evaluated
        self.decoded = decoded + [True] * (n - 1)
        return int(n_cached)


@pytest.mark.parametrize("schedule", [PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def test_a_tail_shows(tiny_model_factory: Make, schedule: ScheduleKeys) -> None:
    """The premise of these tests: each of these tails gives other probabilities."""
    alone, prompt = Alone(tiny_model_factory(schedule=schedule, n_ctx_train=8192)), random_tokens(700, seed=700)
    of_each = [alone.read(prompt, phases(700, tail)) for tail in (0, 1, TAIL, 300)]
    likely = np.argsort(of_each[0])[-N_PROBS:]
    for one, other in itertools.combinations(of_each, 2):
        assert np.abs(one - other)[likely].max() > 2 * TIE


def test_the_model_s_tail_is_the_default(tailed: tuple[Running, Alone]) -> None:
    server, alone = tailed
    for length in (1, 2, TAIL - 1, TAIL, TAIL + 1, 128, 700):
        prompt = random_tokens(length, seed=length)
        assert_read_as(ask(server, prompt, 16), alone, prompt, phases(length, TAIL))


@pytest.mark.parametrize("tail", [0, 1, 33, 300, 699, 700, 2**30, None])
def test_a_request_says_another(tailed: tuple[Running, Alone], tail: int | None) -> None:
    server, alone = tailed
    prompt = random_tokens(700, seed=700)
    answer = ask(server, prompt, 16, cache_prompt=False, prompt_tail=tail)
    tail = TAIL if tail is None else tail
    assert_read_as(answer, alone, prompt, phases(700, tail))
    assert answer["generation_settings"]["prompt_tail"] == tail
    # and the next one has the default again
    assert_read_as(ask(server, prompt, 16, cache_prompt=False), alone, prompt, phases(700, TAIL))


def text_of_seed(seed: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters, k=400))


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "temperature": 0}


TEXT = text_of_seed(0)
ENDPOINTS: dict[str, tuple[Callable[[str], dict[str, Any]], Callable[[Any], str]]] = {
    "/completion": (lambda text: {"prompt": text, "n_predict": 16, "temperature": 0}, lambda a: a["content"]),
    "/v1/completions": (
        lambda text: {"prompt": text, "max_tokens": 16, "temperature": 0},
        lambda a: a["choices"][0]["text"],
    ),
    "/v1/chat/completions": (chat, lambda a: a["choices"][0]["message"]["content"]),
    "/v1/responses": (
        lambda text: {"input": text, "max_output_tokens": 16, "temperature": 0},
        lambda a: a["output"][-1]["content"][0]["text"],
    ),
    "/v1/messages": (chat, lambda a: a["content"][-1]["text"]),
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_takes_it(tailed: tuple[Running, Alone], path: str) -> None:
    """On a text to which the answers with and without a tail differ. Each text is new to the server."""
    server, alone = tailed
    body_of, text_of = ENDPOINTS[path]
    n_differ = 0
    for seed in range(1, 40):
        text, tail = text_of_seed(1000 * list(ENDPOINTS).index(path) + seed), seed % 2 * TAIL
        template = {"messages": chat(text)["messages"]}
        read = text if "prompt" in body_of(text) else server.post("/apply-template", template)[1]["prompt"]
        prompt = server.post("/tokenize", {"content": read, "parse_special": True})[1]["tokens"]
        expected, other = (alone.complete(prompt, 16, tail=t) for t in (tail, TAIL - tail))
        if expected != other:
            # the model's own tail is not asked for
            status, answer = server.post(path, body_of(text) | ({} if tail else {"prompt_tail": 0}))
            assert status == 200, answer
            assert text_of(answer) == server.post("/detokenize", {"tokens": expected})[1]["content"], seed
            n_differ += 1
        if n_differ == 4:
            return
    pytest.fail("too few texts whose answers differ")


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("bad", [-1, 2**30 + 1, 2**32 + 1, 2**63, 2**64 + 1, 1.5, "40", True, [40]], ids=repr)
def test_what_is_no_tail_is_the_client_s_error(tailed: tuple[Running, Alone], path: str, bad: object) -> None:
    status, answer = tailed[0].post(path, ENDPOINTS[path][0](TEXT) | {"prompt_tail": bad})
    assert status == 400, answer
    assert "prompt_tail" in answer["error"]["message"]


# what is in the cache


def test_a_cached_prompt_answers_the_same(tailed: tuple[Running, Alone]) -> None:
    """Its last token alone is evaluated again, as the tail that it is part of."""
    server, alone = tailed
    prompt = random_tokens(401, seed=8)
    for turn in range(3):
        answer = ask(server, prompt, 16)
        assert answer["timings"]["prompt_n"] == (1 if turn else 401)
        assert_read_as(answer, alone, prompt, phases(401, TAIL))


@pytest.mark.parametrize("n_new", [1, TAIL - 2, TAIL - 1, TAIL, 100])
def test_a_follow_up_turn(tailed: tuple[Running, Alone], n_new: int) -> None:
    """Shorter than the tail, it is decoded as a whole; what is cached of it is not read again."""
    talk = Talk(*tailed)
    prompt = random_tokens(300, seed=1000 + n_new)
    for turn in range(4):
        n_cached = talk.turn(prompt, 10)
        assert n_cached == (0 if turn == 0 else len(prompt) - n_new - 1)
        prompt = [*talk.text, *random_tokens(n_new, seed=20 + turn)]


def test_turns_with_tails_of_their_own(tailed: tuple[Running, Alone]) -> None:
    talk = Talk(*tailed)
    prompt = random_tokens(300, seed=77)
    for turn, tail in enumerate((0, 200, 5, 0, TAIL)):
        talk.turn(prompt, 10, tail=tail, prompt_tail=tail)
        prompt = [*talk.text, *random_tokens(60, seed=20 + turn)]


@pytest.mark.parametrize("schedule", [PREFILLING, MIXED, RING], ids=["windowed prefill", "all modes", "ring"])
@pytest.mark.parametrize("options", [("-kvu",), ("-no-kvu", "--ctx-checkpoints", "3")])
def test_an_edited_conversation(tiny_model_factory: Make, schedule: ScheduleKeys, options: tuple[str, ...]) -> None:
    """Back into the tail, before it, and far back: rings go to a checkpoint, which may lie in a tail."""
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    with serving(path, "-c", "4096", "-b", "64", "-ub", "32", "-np", "1", *options) as server:
        talk = Talk(server, Alone(path))
        talk.turn(random_tokens(400, seed=5), 20)
        n_cached = []
        for step, n_keep in enumerate((415, 397, 380, 365, 355, 330, 200, 60, 2)):
            prompt = [*talk.text[:n_keep], *random_tokens(430 - n_keep + step, seed=step)]
            n_cached.append(talk.turn(prompt, 20))
            assert n_cached[-1] <= n_keep
    assert max(n_cached) > 350


def test_slots_that_change_hands(tailed: tuple[Running, Alone]) -> None:
    """More conversations than slots: prompts go through the server's cache of prompts and come back."""
    talks = [Talk(*tailed) for _ in range(6)]
    prompts = [random_tokens(200 + 30 * i, seed=100 + i) for i in range(6)]
    reused = 0
    for _ in range(2):
        for index, talk in enumerate(talks):
            reused += talk.turn(prompts[index], 8)
            prompts[index] = [*talk.text, *random_tokens(30, seed=len(talk.text))]
    assert reused > 0


@pytest.mark.parametrize("other", [None, 7], ids=["no tail", "another tail"])
@pytest.mark.parametrize("schedule", [PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def test_a_slot_that_was_saved_under_another_tail_goes_on(
    tiny_model_factory: Make, tmp_path: Path, schedule: ScheduleKeys, other: int | None
) -> None:
    path, other_path = (
        tiny_model_factory(schedule=schedule._replace(tail=tail), n_ctx_train=8192) for tail in (TAIL, other)
    )
    options = (*SIZES, "-np", "1", "--slot-save-path", tmp_path)
    with serving(path, *options) as server:
        talk = Talk(server, Alone(path))
        talk.turn(random_tokens(400, seed=6), 10)
        assert server.post("/slots/0?action=save", {"filename": "s.bin"})[0] == 200
    with serving(other_path, *options) as server:
        assert server.post("/slots/0?action=restore", {"filename": "s.bin"})[0] == 200
        talk._server = server
        assert talk.turn([*talk.text, *random_tokens(30, seed=8)], 16, tail=other or 0) == 409


# several at once


def test_each_slot_has_its_own(tailed: tuple[Running, Alone]) -> None:
    server, alone = tailed
    tails = (0, 1, TAIL, 500)
    prompts = [random_tokens(300 + 100 * i, seed=50 + i) for i in range(4)]
    for _ in range(3):
        answers = together(
            [
                partial(ask, server, prompt, 24, cache_prompt=False, prompt_tail=tail)
                for prompt, tail in zip(prompts, tails, strict=True)
            ]
        )
        for prompt, tail, answer in zip(prompts, tails, answers, strict=True):
            assert_read_as(answer, alone, prompt, phases(len(prompt), tail))


def test_slots_decode_while_another_reads_its_tail(tailed: tuple[Running, Alone]) -> None:
    server, alone = tailed
    long = random_tokens(1500, seed=7)
    short = [random_tokens(n, seed=n) for n in (30, 129)]
    expected = [server.complete(prompt, 600, cache_prompt=False, n_probs=2) for prompt in short]
    got, _, answer = decode_while_prefilling(server, short, long)
    for tokens, reference in zip(got, expected, strict=True):
        assert_same(tokens, reference)
    assert answer["tokens"] == alone.complete(long, 8, tail=TAIL)


def test_several_answers_to_one_prompt(tailed: tuple[Running, Alone]) -> None:
    server, alone = tailed
    prompt = random_tokens(400, seed=3)
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0, "cache_prompt": False, "n": 3}
    status, three = server.post("/v1/completions", body)
    assert status == 200
    text = server.post("/detokenize", {"tokens": alone.complete(prompt, 20, tail=TAIL)})[1]["content"]
    assert [choice["text"] for choice in three["choices"]] == [text] * 3


REPEATING = random_tokens(30, seed=5) * 20


@pytest.mark.parametrize("tail", [None, 0, 200])
@pytest.mark.parametrize("schedule", [PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def test_drafts_change_no_token(tiny_model_factory: Make, schedule: ScheduleKeys, tail: int | None) -> None:
    """A draft model that has windows too, and another slot that reads beside it."""
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    draft = tiny_model_factory(schedule=PREFILLING._replace(tail=3), seed=1, n_ctx_train=8192)
    expected = Alone(path).complete(REPEATING, 60, tail=TAIL if tail is None else tail)
    options = ("-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", "6", "-np", "2")
    with serving(path, *SIZES, *options) as server:
        other = threading.Thread(target=server.complete, args=(random_tokens(2000, seed=3), 20))
        other.start()
        answer = server.complete(REPEATING, 60, prompt_tail=tail)
        other.join(timeout=60)
    assert answer["tokens"] == expected
    assert answer["timings"]["draft_n"] > 0


def test_the_context_may_shift(prefilling: Path) -> None:
    with serving(prefilling, "-c", "512", "-np", "1", "-b", "64", "-ub", "32", "--context-shift") as server:
        answer = server.complete(random_tokens(300, seed=5), 600, n_keep=4)
        assert answer["truncated"]
        prompt = random_tokens(200, seed=6)
        assert_read_as(ask(server, prompt, 16), Alone(prefilling), prompt, phases(200, TAIL))


# what has no tail, and what the server tells


@pytest.mark.parametrize("schedule", [PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def test_embeddings_have_none(tiny_model_factory: Make, schedule: ScheduleKeys) -> None:
    def embed(tail: int | None) -> Any:
        path = tiny_model_factory(schedule=schedule._replace(tail=tail), n_ctx_train=8192)
        with serving(path, "--embeddings", "--pooling", "last") as server:
            status, answer = server.post("/v1/embeddings", {"input": [TEXT, "b" * 300]})
        assert status == 200
        return [item["embedding"] for item in answer["data"]]

    assert embed(TAIL) == embed(None)


def test_without_a_schedule_it_changes_nothing(tiny_model: Path) -> None:
    prompt = random_tokens(300, seed=4)
    with serving(tiny_model, *SIZES, "-np", "1") as server:
        tokens = [server.complete(prompt, 16, cache_prompt=False, prompt_tail=tail)["tokens"] for tail in (0, 100)]
        assert server.get("/props")[1]["swaa"] is None
    assert tokens[0] == tokens[1]


def test_the_server_tells_it(tailed: tuple[Running, Alone]) -> None:
    server, _ = tailed
    props = server.get("/props")[1]
    assert (props["swaa"]["window"], props["swaa"]["sinks"], props["swaa"]["tail"]) == (WINDOW, SINKS, TAIL)
    assert props["swaa"]["layer_modes"] in ("PFPP", "FPAA")
    assert props["default_generation_settings"]["params"]["prompt_tail"] == TAIL
    for fields, tail in (({}, TAIL), ({"prompt_tail": 9}, 9)):
        assert server.complete("a", 2, id_slot=2, **fields)["generation_settings"]["prompt_tail"] == tail
        assert server.get("/slots")[1][2]["params"]["prompt_tail"] == tail
