"""Drafts through a window in the real server: the answers are those without drafts, and fewer passes made them.

The oracle is the same server without drafts. Both round differently, for batches have other shapes: where two tokens
are as good as tied, either may come, as with any other drafts of llama-server.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.serve.test_schedule import MIXED, OWN, OWN_MIXED, OWN_PREFILLING, PREFILLING, RING, TIE, assert_same
from tests.support.adapters import write_adapter
from tests.support.engine import GPU_LAYERS
from tests.support.foreign import FOREIGN
from tests.support.program import fails, succeeds
from tests.support.serving import Running, serving, together, wait_until
from tests.support.tiny import ScheduleKeys, TinyShape, random_tokens, tiny_weights, write_tiny_gguf

pytestmark = pytest.mark.usefixtures("engine")

Make = Callable[..., Path]

SIZES = ("-c", "8192", "-b", "64", "-ub", "32", "--no-cache")
DRAFTS = ("--draft-window", "128")
"""A window that most of these prompts are longer than, and that the tiny models miss now and then."""
TIGHT = ScheduleKeys(120, 4, MIXED.layer_modes)
"""Of two slots and an ubatch of 8: 256 cells, and no rounding. A draft overwrites what the tokens before it saw."""
LAYOUTS = {
    "no schedule": (None, ("-np", "1")),
    "no schedule, no flash attention": (None, ("-np", "1", "-fa", "off")),
    "windowed prefill": (PREFILLING, ("-np", "1")),
    "ring": (RING, ("-np", "1")),
    "all modes": (MIXED, ("-np", "1")),
    "all modes, slots share a cache": (MIXED, ("-np", "4", "-kvu")),
    "all modes, each slot its own cache": (MIXED, ("-np", "4", "-no-kvu", "-c", "16384", "-ub", "64")),
    "all modes, slots share a ring without a cell to spare": (TIGHT, ("-np", "2", "-kvu", "-ub", "8")),
    "all modes, drafts longer than an ubatch": (MIXED, ("-np", "1", "-ub", "8", "--spec-window-n-max", "9")),
    "own windows, no schedule": (None, ("-np", "1")),
    "own windows, slots share a cache": (OWN_PREFILLING, ("-np", "2", "-kvu")),
    "own windows, all their cells": (OWN_PREFILLING, ("-np", "1", "--swa-full")),
    "own windows, a ring": (OWN_MIXED, ("-np", "2", "-no-kvu", "-c", "16384")),
}


def accepted(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of its drafts that were accepted, and all of them."""
    timings = answer["timings"]
    return timings.get("draft_n_accepted", 0), timings.get("draft_n", 0)


class Pair:
    """Two servers of one model, of which one drafts."""

    def __init__(self, drafting: Running, plain: Running) -> None:
        self.drafting, self.plain = drafting, plain

    def compare(self, prompt: Any, n: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answers of both, whose tokens are the same."""
        drafted = self.drafting.complete(prompt, n, **options)
        plain = self.plain.complete(prompt, n, **{"n_probs": 2} | options)
        assert_same(drafted["tokens"], plain)
        return drafted, plain


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tiny_model_factory: Make) -> Iterator[Pair]:
    schedule, options = LAYOUTS[request.param]
    model = OWN if request.param.startswith("own windows") else {}
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192, **model)
    plain = tuple(option for option in options if option not in ("--spec-window-n-max", "9"))
    with serving(path, *SIZES, *options, *DRAFTS) as drafting, serving(path, *SIZES, *plain) as other:
        yield Pair(drafting, other)


@pytest.fixture(scope="module")
def prefilling(tiny_model_factory: Make) -> Iterator[Pair]:
    path = tiny_model_factory(schedule=PREFILLING, n_ctx_train=8192)
    with serving(path, *SIZES, "-np", "2", "-kvu", *DRAFTS) as drafting, serving(path, *SIZES, "-np", "1") as plain:
        yield Pair(drafting, plain)


def test_drafts_change_no_token_and_save_passes(pair: Pair) -> None:
    for seed in range(3):
        answer, _ = pair.compare(random_tokens(700, seed=seed), 80, cache_prompt=False)
        n_accepted, n_drafted = accepted(answer)
        assert 0 < n_accepted <= n_drafted
        assert "draft_n" not in pair.plain.complete(random_tokens(200), 4)["timings"]


def test_below_the_window_nothing_is_drafted(pair: Pair) -> None:
    """There a draft would cost what a decoded token costs."""
    answer, _ = pair.compare(random_tokens(20, seed=1), 90)
    assert accepted(answer) == (0, 0)
    answer, _ = pair.compare(random_tokens(20, seed=2), 200)
    assert 0 < accepted(answer)[1] < 200


def test_conversations_go_on_and_back(pair: Pair) -> None:
    """What was drafted and rejected is in no cache: turns go on, and others begin anew where they differ."""
    rng = random.Random(3)
    talk = random_tokens(300, seed=9)
    n_cached = 0
    for turn in range(8):
        answer, plain = pair.compare(talk, rng.choice([1, 3, 40]))
        assert answer["timings"]["cache_n"] == plain["timings"]["cache_n"]
        n_cached += answer["timings"]["cache_n"]
        talk = [*talk, *plain["tokens"], *random_tokens(rng.randrange(1, 60), seed=turn)]
        if turn % 3 == 2:
            talk = [*talk[: rng.randrange(150, len(talk))], *random_tokens(20, seed=turn)]
    assert n_cached > 1000


def test_the_context_is_used_to_its_end(pair: Pair) -> None:
    n_ctx = pair.plain.get("/props")[1]["default_generation_settings"]["n_ctx"]
    n_prompt = n_ctx - 30
    answer, plain = pair.compare(random_tokens(n_prompt, seed=6), 100)
    assert len(answer["tokens"]) == len(plain["tokens"]) < 100


def test_every_kind_of_answer_is_the_one_without_drafts(prefilling: Pair) -> None:
    prompt = random_tokens(500, seed=11)
    kinds: dict[str, dict[str, Any]] = {
        "a grammar": {"grammar": "root ::= [a-z ]+"},
        "a schema": {"json_schema": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}}}},
        "penalties": {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "repeat_last_n": 64},
        "a bias": {"logit_bias": [[prompt[0], 3.0]]},
        "dry": {"dry_multiplier": 0.8},
        "a tail": {"prompt_tail": 40},
        "no end": {"ignore_eos": True},
    }
    for name, options in kinds.items():
        answer, plain = prefilling.compare(prompt, 60, cache_prompt=False, **options)
        assert accepted(answer)[1] > 0, name
        if answer["tokens"] == plain["tokens"]:
            assert answer["content"] == plain["content"], name
            assert answer["stop_type"] == plain["stop_type"], name


def test_a_stop_string_ends_it_within_a_draft(prefilling: Pair) -> None:
    prompt = random_tokens(500, seed=11)
    whole = prefilling.drafting.complete(prompt, 60)
    assert accepted(whole)[0] > 20
    for at in range(25, 33):
        stop = whole["content"][at : at + 3]
        answer = prefilling.drafting.complete(prompt, 60, stop=[stop])
        assert answer["content"] == whole["content"].partition(stop)[0]
        assert (answer["stop_type"], answer["stopping_word"]) == ("word", stop)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 0, "min_p": 0.1}, {"mirostat": 2}]
)
def test_a_seed_gives_the_text_that_it_gives_without_drafts(prefilling: Pair, sampling: dict[str, Any]) -> None:
    """The draft draws the numbers that the sampler will draw. Rounding decides once in a long while."""
    prompt = random_tokens(400, seed=5)
    n_same = n_accepted = 0
    for seed in range(8):
        options = {"temperature": 1.0, "seed": seed, "cache_prompt": False} | sampling
        answer = prefilling.drafting.complete(prompt, 24, **options)
        assert prefilling.drafting.complete(prompt, 24, **options)["tokens"] == answer["tokens"]
        n_same += answer["tokens"] == prefilling.plain.complete(prompt, 24, **options)["tokens"]
        n_accepted += accepted(answer)[0]
    assert n_same >= 6
    assert n_accepted > 0


def test_a_grammar_that_fails_within_a_draft_fails_as_without(prefilling: Pair) -> None:
    """It can go on in too many ways, once some characters are written; and the next answer knows nothing of it."""
    rules = [f'r{i} ::= r{i + 1} | r{i + 1} "{chr(97 + i)}"' for i in range(20)]
    grammar = "\n".join(["root ::= [ -~]{20} r0", *rules, 'r20 ::= "z"'])
    prompt = random_tokens(400, seed=31)
    body = {"prompt": prompt, "n_predict": 60, "temperature": 0, "grammar": grammar}
    failures = [server.post("/completion", body) for server in (prefilling.drafting, prefilling.plain)]
    assert failures[0] == failures[1]
    assert "too many ways" in str(failures[0])
    prefilling.compare([*prompt, *random_tokens(30, seed=32)], 40, cache_prompt=False)


@pytest.mark.parametrize("drafts", [DRAFTS, ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2")])
def test_drafted_tokens_have_their_probabilities(tiny_model_factory: Make, drafts: tuple[str, ...]) -> None:
    path = tiny_model_factory(schedule=PREFILLING, n_ctx_train=8192)
    prompt = random_tokens(30, seed=5) * 20
    with serving(path, *SIZES, "-np", "1", *drafts) as drafting, serving(path, *SIZES, "-np", "1") as plain:
        answers = [server.complete(prompt, 60, n_probs=3) for server in (drafting, plain)]
        assert accepted(answers[0])[0] > 0
        n_tokens = 0
        for got, want in zip(*(answer["completion_probabilities"] for answer in answers), strict=True):
            if got["id"] != want["id"]:
                break
            assert got["logprob"] == pytest.approx(want["logprob"], abs=TIE)
            assert len(got["top_logprobs"]) == 3
            n_tokens += 1
        assert n_tokens > 20
        # those after sampling are known of the last sampled token alone: there are no drafts then
        sampled = [server.complete(prompt, 20, n_probs=2, post_sampling_probs=True) for server in (drafting, plain)]
        assert accepted(sampled[0]) == (0, 0)
        assert sampled[0]["completion_probabilities"] == sampled[1]["completion_probabilities"]


def test_nothing_is_drafted_while_several_slots_decode(prefilling: Pair) -> None:
    """They share the cost of a pass already; one that decodes beside a long prompt drafts."""
    server = prefilling.drafting
    begun, done = threading.Event(), threading.Event()
    timings: dict[str, Any] = {}

    def talk() -> None:
        body = {"prompt": random_tokens(300, seed=1), "n_predict": 3000, "temperature": 0, "ignore_eos": True}
        for event in server.stream("/completion", body):
            begun.set()
            timings.update(event.get("timings", {}))
        done.set()

    thread = threading.Thread(target=talk)
    thread.start()
    assert begun.wait(timeout=60)
    beside = server.complete(random_tokens(300, seed=2), 40, cache_prompt=False)
    assert not done.is_set()
    thread.join(timeout=300)
    assert accepted(beside) == (0, 0)
    assert timings["draft_n_accepted"] > 0
    alone = prefilling.plain.complete(random_tokens(300, seed=2), 40, cache_prompt=False, n_probs=2)
    assert_same(beside["tokens"], alone)


def test_a_client_that_leaves_takes_its_drafts_along(prefilling: Pair) -> None:
    prompt = random_tokens(300, seed=21)
    for n_events in (1, 2, 5):
        events = prefilling.drafting.stream("/completion", {"prompt": prompt, "n_predict": 2000, "temperature": 0})
        for _ in range(n_events):
            next(events)
        events.close()
        wait_until(lambda: not any(slot["is_processing"] for slot in prefilling.drafting.get("/slots")[1]), "it ends")
        prefilling.compare([*prompt, *random_tokens(30, seed=n_events)], 30)


@pytest.mark.parametrize("schedule", [PREFILLING, MIXED, TIGHT], ids=["windowed prefill", "all modes", "tight"])
def test_slots_and_clients_that_change(tiny_model_factory: Make, schedule: Any) -> None:
    """More conversations than slots, at once and alone, and what a cold start answers in between and after all."""
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    rng = random.Random(5)
    talks = [random_tokens(rng.randrange(100, 300), seed=i) for i in range(4)]
    sizes = (*SIZES, "-ub", "8")
    with serving(path, *sizes, "-kvu", "-np", "2", *DRAFTS) as server, serving(path, *sizes, "-np", "1") as plain:
        n_drafted = 0
        for turn in range(8):
            chosen = rng.sample(range(4), rng.randrange(1, 4))
            length = rng.choice([1, 5, 40])
            answers = together([partial(server.complete, talks[i], length) for i in chosen])
            for i, answer in zip(chosen, answers, strict=True):
                assert len(answer["tokens"]) == length
                n_drafted += accepted(answer)[1]
                talks[i] = [*talks[i], *answer["tokens"], *random_tokens(rng.randrange(1, 80), seed=len(talks[i]))]
            prompt = random_tokens(400, seed=50 + turn)
            answer = server.complete(prompt, 40, cache_prompt=False)
            assert_same(answer["tokens"], plain.complete(prompt, 40, cache_prompt=False, n_probs=2))
            assert accepted(answer)[1] > 0
        assert n_drafted > 0


def test_each_request_drafts_with_its_own_adapters(tiny_model_factory: Make, tmp_path: Path) -> None:
    path = tiny_model_factory(schedule=MIXED, n_ctx_train=8192)
    adapters = [write_adapter(tmp_path / f"{seed}.gguf", tiny_weights(TinyShape()), seed=seed) for seed in (1, 2)]
    options = (*SIZES, "--lora", ",".join(map(str, adapters)))
    prompt = random_tokens(300, seed=4)
    scales = ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    chosen = [[{"id": i, "scale": scale} for i, scale in enumerate(pair)] for pair in scales]
    with serving(path, *options, "-np", "4", *DRAFTS) as drafting, serving(path, *options, "-np", "1") as plain:
        both = Pair(drafting, plain)
        ask = partial(both.compare, prompt, 60, cache_prompt=False)
        alone = [ask(lora=lora)[0] for lora in chosen]
        # other adapters share no pass, so each request drafts, between passes with those of the others
        bodies = [partial(drafting.complete, prompt, 60, cache_prompt=False, lora=lora) for lora in chosen]
        for answer, reference in zip(together(bodies), alone, strict=True):
            if answer["tokens"] == reference["tokens"]:
                assert accepted(answer)[0] > 0.8 * accepted(reference)[0]
    assert len({tuple(answer["tokens"]) for answer in alone}) == len(alone)


def test_several_answers_to_one_prompt(prefilling: Pair) -> None:
    body = {"prompt": random_tokens(400, seed=3), "max_tokens": 20, "temperature": 0, "cache_prompt": False}
    [one] = prefilling.plain.post("/v1/completions", body)[1]["choices"]
    status, two = prefilling.drafting.post("/v1/completions", body | {"n": 2})
    assert status == 200
    assert [choice["text"] for choice in two["choices"]] == [one["text"]] * 2


def test_the_context_may_shift(tiny_model_factory: Make) -> None:
    path = tiny_model_factory(schedule=PREFILLING, n_ctx_train=8192)
    options = ("-c", "512", "-np", "1", "-b", "64", "-ub", "32", "--context-shift", "--no-cache")
    with serving(path, *options, *DRAFTS) as drafting, serving(path, *options) as plain:
        answer, _ = Pair(drafting, plain).compare(random_tokens(300, seed=5), 600, n_keep=4)
        assert answer["truncated"]
        assert accepted(answer)[0] > 0


@pytest.mark.parametrize("schedule", [None, PREFILLING, MIXED], ids=["no schedule", "windowed prefill", "all modes"])
def test_states_do_not_know_of_drafts(tiny_model_factory: Make, tmp_path: Path, schedule: Any) -> None:
    """Saved slots and prompts on disk go from a server that drafts to one that does not, and back."""
    path = tiny_model_factory(schedule=schedule, n_ctx_train=8192)
    options = ("-c", "8192", "-b", "64", "-ub", "32", "-np", "1", "--slot-save-path", str(tmp_path))
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    prompt = random_tokens(1200, seed=6)
    answers = []
    for index, drafts in enumerate((DRAFTS, (), DRAFTS)):
        with serving(path, *options, *drafts, **home) as server:
            if index:
                assert server.post("/slots/0?action=restore", {"filename": "s.bin"})[0] == 200
            answer = server.complete([*prompt, *random_tokens(20, seed=index)], 30, n_probs=2)
            assert (accepted(answer)[1] > 0) == bool(drafts)
            assert answer["timings"]["cache_n"] == (1200 if index else 0)
            # back to the prompt alone, which all of them continue
            server.complete(prompt, 0)
            assert server.post("/slots/0?action=save", {"filename": "s.bin"})[0] == 200
            wait_until(lambda: list((tmp_path / "swaa-local" / "states").glob("*.prefix")) != [], "a state is written")
            answers.append(answer)
    with serving(path, *options, *DRAFTS, **home) as server:
        answer = server.complete([*prompt, *random_tokens(20, seed=1)], 30)
        assert answer["timings"]["cache_n"] > 1000
        assert accepted(answer)[0] > 0
        assert_same(answer["tokens"], answers[1])


def test_ngrams_go_first_and_the_window_where_they_have_nothing(tiny_model_factory: Make) -> None:
    path = tiny_model_factory(schedule=PREFILLING, n_ctx_train=8192)
    options = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", *DRAFTS)
    with serving(path, *SIZES, "-np", "1", *options) as drafting, serving(path, *SIZES, "-np", "1") as plain:
        answer, _ = Pair(drafting, plain).compare(random_tokens(30, seed=5) * 20, 80)
        assert accepted(answer)[0] > 0


REFUSED = {
    "images": (("--mmproj", "{model}", "-fit", "off"), "leave out --mmproj"),
    "a draft that no batch holds": (("--spec-window-n-max", "64"), "lower --spec-window-n-max"),
    "no window": (("--spec-window-size", "0"), "window size must be at least 1"),
}


@pytest.mark.parametrize("why", list(REFUSED))
def test_what_cannot_work_is_refused_at_start(tiny_model: Path, why: str) -> None:
    options, said = REFUSED[why]
    words = [word.format(model=tiny_model) for word in options]
    assert said in fails("serve", tiny_model, "--port", "0", "-t", "1", *SIZES, *DRAFTS, *words)


def test_a_model_that_cannot_draft_is_refused_by_name(tmp_path: Path) -> None:
    weights, keys = FOREIGN["llama4"]()
    path = write_tiny_gguf(tmp_path / "llama4.gguf", file_arch="llama4", weights=weights, extra=keys)
    assert "llama4" in fails("serve", path, "--port", "0", "-t", "1", *SIZES, *DRAFTS)


@pytest.mark.skipif(GPU_LAYERS > 0, reason="this build has a GPU")
def test_on_a_cpu_it_says_that_drafts_rarely_pay(prefilling: Pair) -> None:
    assert "rarely pay" in prefilling.drafting.log
    assert "rarely pay" not in prefilling.plain.log


def test_help_tells_of_drafts() -> None:
    assert "--draft-window" in succeeds("serve", "--help")
    of_server = succeeds("serve", "--server-help")
    assert "--spec-window-size" in of_server
    assert "--spec-window-n-max" in of_server
    assert "window" in of_server.partition("--spec-type")[2].splitlines()[0]
