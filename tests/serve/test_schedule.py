"""The schedule in the real server: phases, concurrency, prompt caching, and what is refused.

The oracle is `Llama`, alone, on the same tokens: it evaluates a prompt as one prefill from an empty cache.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cpp import llama_get_logits_ith

from swaa_local import Llama
from tests.support.adapters import write_adapter
from tests.support.program import fails
from tests.support.serving import Running, serving, together
from tests.support.tiny import (
    ALWAYS,
    FULL,
    PREFILL,
    ScheduleKeys,
    TinyShape,
    random_tokens,
    tiny_weights,
    with_own_windows,
)

pytestmark = pytest.mark.usefixtures("engine")

WINDOW, SINKS = 64, 4
PREFILLING = ScheduleKeys(WINDOW, SINKS, (PREFILL, FULL, PREFILL, PREFILL))
RING = ScheduleKeys(WINDOW, SINKS, (ALWAYS,) * 4)
MIXED = ScheduleKeys(WINDOW, SINKS, (FULL, PREFILL, ALWAYS, ALWAYS))
OWN = with_own_windows(48, (True, False, True, False))
OWN_PREFILLING = ScheduleKeys(WINDOW, SINKS, (FULL, PREFILL, FULL, PREFILL))
OWN_MIXED = ScheduleKeys(WINDOW, SINKS, (FULL, PREFILL, FULL, ALWAYS))
TIE = 3e-3
"""Difference of two log probabilities that is rounding.

Measured alone against among others, with flash attention: each up to 1.1e-3 without a schedule, up to 7e-4 with one.
"""
SIZES = ("-c", "8192", "-kvu", "-b", "64", "-ub", "32", "--no-cache")  # nothing of another test's prompts

Make = Callable[..., Path]


def phases(n_prompt: int, tail: int) -> list[bool]:
    """Of each token of a prompt that is not in the cache, whether it is decoded."""
    return [position >= n_prompt - tail for position in range(n_prompt)]


class Alone:
    """The same model in this process."""

    def __init__(self, path: Path) -> None:
        self._llm = Llama(str(path), n_ctx=4096, n_batch=64, n_ubatch=32, n_threads=1, n_threads_batch=1)

    def go_on(self, prompt: Sequence[int], n: int) -> list[int]:
        """Greedy tokens, where what was evaluated for the last prompt is not evaluated again."""
        return [int(token) for _, token in zip(range(n), self._llm.generate(prompt, temp=0.0), strict=False)]

    def complete(self, prompt: Sequence[int], n: int, *, tail: int = 0) -> list[int]:
        """Greedy tokens after a cold prefill of all but the last `tail` tokens, which are decoded."""
        return self.complete_as(prompt, phases(len(prompt), tail), n)

    def read(self, prompt: Sequence[int], decoded: Sequence[bool]) -> np.ndarray:
        """A cold start, each token in its phase; log probabilities of the next token."""
        llm = self._llm
        llm.reset()
        llm._forget()
        for decode, run in groupby(zip(prompt, decoded, strict=True), key=itemgetter(1)):
            llm.eval([token for token, _ in run], decode=decode, ends_prompt=False)
        logits = np.ctypeslib.as_array(llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    def complete_as(self, prompt: Sequence[int], decoded: Sequence[bool], n: int) -> list[int]:
        """Greedy tokens after a cold start, each token of the prompt in its phase."""
        llm = self._llm
        tokens: list[int] = []
        self.read(prompt, decoded)
        while len(tokens) < n:
            tokens.append(int(llm.sample(temp=0.0)))
            llm.eval(tokens[-1:], decode=True)
        return tokens


@pytest.fixture(
    scope="module",
    params=[
        (PREFILLING, (), {}),
        (RING, (), {}),
        (MIXED, ("-no-kvu", "-c", "16384"), {}),
        (OWN_PREFILLING, (), OWN),
        (OWN_PREFILLING, ("--swa-full",), OWN),
        (OWN_MIXED, ("-no-kvu", "-c", "16384"), OWN),
    ],
    ids=[
        "windowed prefill",
        "ring",
        "all modes, each slot its own cache",
        "windowed prefill beside the model's own windows",
        "the same with all their cells",
        "a ring beside the model's own windows, each slot its own cache",
    ],
)
def scheduled(request: pytest.FixtureRequest, tiny_model_factory: Make) -> Iterator[tuple[Running, Alone]]:
    schedule, options, model = request.param
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192, **model)
    with serving(path, *SIZES, "-np", "4", *options) as server:
        yield server, Alone(path)


@pytest.fixture(scope="module")
def prefilling(tiny_model_factory: Make) -> Path:
    return tiny_model_factory(schedule=PREFILLING, n_ctx_train=8192)


@pytest.fixture(scope="module")
def ring(tiny_model_factory: Make) -> Path:
    return tiny_model_factory(schedule=RING, n_ctx_train=8192)


def test_it_answers_as_the_library_does(scheduled: tuple[Running, Alone]) -> None:
    server, alone = scheduled
    for length in (1, 2, WINDOW, 65, 700):
        prompt = random_tokens(length, seed=length)
        assert server.complete(prompt, 16)["tokens"] == alone.complete(prompt, 16), length


def test_a_prompt_that_is_in_the_cache_is_still_a_prompt(scheduled: tuple[Running, Alone]) -> None:
    server, alone = scheduled
    prompt = random_tokens(401, seed=8)
    server.complete(prompt, 16)
    again = server.complete(prompt, 16)
    # its last token is evaluated again, in a batch of one
    assert again["timings"]["prompt_n"] == 1
    assert again["tokens"] == alone.complete(prompt, 16)


def test_a_guess_by_the_batch_would_show(prefilling: Path) -> None:
    """The premise of the test above: taken for a generated token, the last one changes the answer."""
    alone = Alone(prefilling)
    prompt = random_tokens(401, seed=8)
    assert alone.complete(prompt, 16) != alone.complete(prompt, 16, tail=1)


def test_slots_decode_while_another_prefills(scheduled: tuple[Running, Alone]) -> None:
    """Each request gets the tokens that it gets alone."""
    server, alone = scheduled
    long = random_tokens(2500, seed=7)
    short = [random_tokens(n, seed=n) for n in (30, 70, 129)]
    expected = [server.complete(prompt, 600, cache_prompt=False, n_probs=2) for prompt in short]
    expected_long = alone.complete(long, 8)
    for _ in range(10):
        got, during, answer = decode_while_prefilling(server, short, long)
        for tokens, reference in zip(got, expected, strict=True):
            assert_same(tokens, reference)
        assert answer["tokens"] == expected_long
        # the long prompt is 40 batches, and each of them took a token of the others along
        if during >= 20:
            return
    pytest.fail("the short requests were always done before the long one came")


def decode_while_prefilling(
    server: Running, short: Sequence[list[int]], long: list[int]
) -> tuple[list[list[int]], int, dict[str, Any]]:
    """The tokens of all, and how many of each short request came, at least, while the long one was served."""
    got: list[list[int]] = [[] for _ in short]
    begun = [threading.Event() for _ in short]

    def decode(index: int) -> None:
        body = {"prompt": short[index], "n_predict": 600, "temperature": 0, "return_tokens": True}
        for event in server.stream("/completion", body | {"cache_prompt": False}):
            got[index] += event["tokens"]
            begun[index].set()

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(short))]
    for thread in threads:
        thread.start()
    for event in begun:
        assert event.wait(timeout=60)
    before = [len(tokens) for tokens in got]
    answer = server.complete(long, 8, cache_prompt=False)
    during = min(len(tokens) - n for tokens, n in zip(got, before, strict=True))
    for thread in threads:
        thread.join(timeout=60)
    return got, during, answer


def assert_same(tokens: list[int], reference: dict[str, Any]) -> None:
    """The same tokens, up to one that was as good as tied: upstream itself rounds differently in another batch."""
    assert len(tokens) == len(reference["tokens"])
    for token, expected, probabilities in zip(
        tokens, reference["tokens"], reference["completion_probabilities"], strict=True
    ):
        if token != expected:
            first, second = (entry["logprob"] for entry in probabilities["top_logprobs"])
            assert first - second < TIE
            return


def test_a_follow_up_turn_prefills_the_new_tokens_only(scheduled: tuple[Running, Alone]) -> None:
    server, alone = scheduled
    prompt = random_tokens(300, seed=9)
    for turn in range(4):
        answer = server.complete(prompt, 10, n_probs=2)
        assert_same(alone.go_on(prompt, 10), answer)
        # the last generated token was never evaluated
        assert answer["timings"]["prompt_n"] == (300 if turn == 0 else 51)
        assert answer["timings"]["cache_n"] == (0 if turn == 0 else len(prompt) - 51)
        prompt = [*prompt, *answer["tokens"], *random_tokens(50, seed=20 + turn)]


def test_in_rings_a_conversation_goes_as_if_it_were_read_anew(ring: Path) -> None:
    """Always windowed layers know no phases, so whatever is reused, the tokens are those of a cold start.

    Going back: within what the ring still holds, to a checkpoint, and beyond both.
    """
    alone = Alone(ring)
    with serving(ring, *SIZES, "-np", "1") as server:
        prompt = random_tokens(300, seed=9)
        for turn in range(3):
            answer = server.complete(prompt, 40)
            assert answer["tokens"] == alone.complete(prompt, 40), turn
            prompt = [*prompt, *answer["tokens"], *random_tokens(90, seed=20 + turn)]
        reused = []
        for keep in (len(prompt) - 95, 400, 200, 100, 40):
            prompt = [*prompt[:keep], *random_tokens(60, seed=keep)]
            answer = server.complete(prompt, 40)
            assert answer["tokens"] == alone.complete(prompt, 40), keep
            reused.append(answer["timings"]["cache_n"])
        assert reused[0] > 400
        assert reused[-1] <= 40


def test_slots_that_change_hands_answer_right(ring: Path) -> None:
    """More conversations than slots: states go through the server's own cache of prompts and come back."""
    alone = Alone(ring)
    talks = [random_tokens(200 + 30 * i, seed=100 + i) for i in range(5)]
    with serving(ring, *SIZES, "-np", "2") as server:
        for _ in range(3):
            for index, prompt in enumerate(talks):
                answer = server.complete(prompt, 8)
                assert answer["tokens"] == alone.complete(prompt, 8)
                talks[index] = [*prompt, *answer["tokens"], *random_tokens(30, seed=len(prompt))]
        assert answer["timings"]["cache_n"] > 0


@pytest.mark.parametrize("window", [1, WINDOW])
@pytest.mark.parametrize("options", [("-kvu",), ("-no-kvu", "--ctx-checkpoints", "3")])
@pytest.mark.parametrize("model", ["plain", "own windows"])
def test_edited_conversations_in_rings_answer_right(
    tiny_model_factory: Make, model: str, window: int, options: tuple[str, ...]
) -> None:
    """Turns go on, back and elsewhere, at once; cells that a ring has lost must never be missed."""
    modes, kind = (RING.layer_modes, {}) if model == "plain" else ((FULL, ALWAYS, FULL, ALWAYS), OWN)
    ring = tiny_model_factory(schedule=ScheduleKeys(window, SINKS, modes), n_ctx_train=8192, **kind)
    alone, rng = Alone(ring), random.Random(3)
    talks = [random_tokens(rng.randrange(1, 300), seed=i) for i in range(3)]
    n_cached = 0
    with serving(ring, "-c", "4096", "-b", "64", "-ub", "32", "-np", "2", *options) as server:
        for _ in range(10):
            chosen = rng.sample(range(3), rng.randrange(1, 4))
            lengths = [rng.choice([1, 3, 40]) for _ in chosen]
            answers = together(
                [partial(server.complete, talks[i], n, n_probs=2) for i, n in zip(chosen, lengths, strict=True)]
            )
            for i, n, answer in zip(chosen, lengths, answers, strict=True):
                expected = alone.complete(talks[i], n)
                assert_same(expected, answer)
                n_cached += answer["timings"]["cache_n"]
                talks[i] = [*talks[i], *expected]
                if rng.random() < 0.5:
                    talks[i] = talks[i][: rng.randrange(1, len(talks[i]))]
                talks[i] = [*talks[i], *random_tokens(rng.randrange(1, 100), seed=rng.randrange(1000))]
    assert n_cached > 0


def test_several_answers_to_one_prompt(scheduled: tuple[Running, Alone]) -> None:
    server, _ = scheduled
    body = {"prompt": random_tokens(400, seed=3), "max_tokens": 20, "temperature": 0, "cache_prompt": False}
    [one] = server.post("/v1/completions", body)[1]["choices"]
    status, three = server.post("/v1/completions", body | {"n": 3})
    assert status == 200
    assert [choice["text"] for choice in three["choices"]] == [one["text"]] * 3


# what goes beside a schedule

REPEATING = random_tokens(30, seed=5) * 20


@pytest.mark.parametrize("schedule", [PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def test_drafts_change_no_token(tiny_model_factory: Make, schedule: ScheduleKeys) -> None:
    """A draft model that is often wrong, and another slot that writes into the ring between draft and rejection."""
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    draft = tiny_model_factory(n_ctx_train=8192)
    expected = Alone(path).complete(REPEATING, 60)
    options = ("-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", "6", "-np", "2")
    with serving(path, *SIZES, *options) as server:
        other = threading.Thread(target=server.complete, args=(random_tokens(2000, seed=3), 20))
        other.start()
        answer = server.complete(REPEATING, 60)
        other.join(timeout=60)
    assert answer["tokens"] == expected
    assert 0 < answer["timings"]["draft_n_accepted"] < answer["timings"]["draft_n"]


@pytest.mark.parametrize("schedule", [MIXED], ids=["all modes"])
def test_each_request_takes_its_own_adapters(tiny_model_factory: Make, tmp_path: Path, schedule: ScheduleKeys) -> None:
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    weights = tiny_weights(TinyShape())
    adapters = [write_adapter(tmp_path / f"{seed}.gguf", weights, seed=seed) for seed in (1, 2)]
    prompt = random_tokens(300, seed=4)
    scales = ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    bodies = [{"lora": [{"id": i, "scale": scale} for i, scale in enumerate(pair)]} for pair in scales]
    with serving(path, *SIZES, "-np", "4", "--lora", ",".join(map(str, adapters))) as server:

        def ask(body: dict[str, Any]) -> list[int]:
            return server.complete(prompt, 24, cache_prompt=False, **body)["tokens"]

        alone = [ask(body) for body in bodies]
        at_once = together([partial(ask, body) for body in bodies])
    assert alone[0] == Alone(path).complete(prompt, 24)
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert at_once == alone


@pytest.mark.parametrize("schedule", [PREFILLING, MIXED], ids=["windowed prefill", "all modes"])
def test_a_saved_slot_goes_on_in_another_server(
    tiny_model_factory: Make, tmp_path: Path, schedule: ScheduleKeys
) -> None:
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    options = (*SIZES, "-np", "1", "--slot-save-path", tmp_path)
    with serving(path, *options) as server:
        prompt = random_tokens(400, seed=6)
        prompt += [*server.complete(prompt, 10)["tokens"], *random_tokens(30, seed=8)]
        assert server.post("/slots/0?action=save", {"filename": "s.bin"})[0] == 200
        expected = server.complete(prompt, 16)["tokens"]
    with serving(path, *options) as server:
        assert server.post("/slots/0?action=restore", {"filename": "s.bin"})[0] == 200
        answer = server.complete(prompt, 16)
        assert answer["timings"]["prompt_n"] == 31
        assert answer["tokens"] == expected
    with serving(path, *options, "--window", "32") as server:
        assert server.post("/slots/0?action=restore", {"filename": "s.bin"})[0] == 400


def test_the_context_may_shift_under_windowed_prefill(prefilling: Path) -> None:
    with serving(prefilling, "-c", "512", "-np", "1", "-b", "64", "-ub", "32", "--context-shift") as server:
        answer = server.complete(random_tokens(300, seed=5), 600, n_keep=4)
        assert answer["truncated"]
        assert len(answer["tokens"]) == 600
        # and the slot is as good as new afterwards
        prompt = random_tokens(200, seed=6)
        assert server.complete(prompt, 16)["tokens"] == Alone(prefilling).complete(prompt, 16)


def test_chunks_are_reused_under_windowed_prefill(prefilling: Path) -> None:
    with serving(prefilling, *SIZES, "-np", "1", "--cache-reuse", "16") as server:
        prompt = random_tokens(300, seed=5)
        server.complete(prompt, 4)
        answer = server.complete([*prompt[:50], *prompt[100:], *random_tokens(20, seed=3)], 4)
        assert answer["timings"]["cache_n"] == 250


@pytest.mark.parametrize("schedule", [PREFILLING, RING], ids=["windowed prefill", "ring"])
def test_embeddings(tiny_model_factory: Make, schedule: ScheduleKeys) -> None:
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    with serving(path, "--embeddings", "--pooling", "last") as server:
        status, answer = server.post("/v1/embeddings", {"input": ["a" * 300, "b" * 300]})
    assert status == 200
    vectors = [item["embedding"] for item in answer["data"]]
    assert [len(vector) for vector in vectors] == [TinyShape().n_embd] * 2
    assert vectors[0] != vectors[1]


REFUSED = {
    "full-size rings": (RING, ["--swa-full"], "--swa-full keeps what an always windowed layer drops"),
    "shift": (RING, ["--context-shift"], "--context-shift moves positions"),
    "chunk reuse": (RING, ["--cache-reuse", "16"], "--cache-reuse moves positions"),
    "images": (PREFILLING, ["--mmproj", "{draft}", "-fit", "off"], "leave out --mmproj"),
    "drafts from hidden states": (PREFILLING, ["-md", "{draft}", "--spec-type", "draft-eagle3"], "draft-eagle3"),
    "a draft model with rings": (PREFILLING, ["-md", "{ring}", "--spec-type", "draft-simple"], "another draft model"),
}


@pytest.mark.parametrize("why", list(REFUSED))
def test_what_cannot_work_is_refused_at_start(tiny_model_factory: Make, tiny_model: Path, ring: Path, why: str) -> None:
    schedule, options, said = REFUSED[why]
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    words = [word.format(draft=tiny_model, ring=ring) for word in options]
    error = fails("serve", path, "--port", "0", "-t", "1", *SIZES, *words)
    assert said in error
    assert str(path) in error


def test_a_schedule_in_upstream_s_own_option_is_refused(prefilling: Path) -> None:
    """`serve` would announce another one than the server runs."""
    assert "--window" in fails("serve", prefilling, "--override-kv", "swaa.window=int:9")
