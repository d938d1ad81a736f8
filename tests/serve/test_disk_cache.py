"""Prompts that were read before a restart are not read again, for plain clients, and answers stay the same."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import write_adapter
from tests.support.program import SCHEDULE_OPTIONS, succeeds
from tests.support.serving import Running, serving, wait_until
from tests.support.tiny import TinyShape, random_tokens, tiny_weights

DOCUMENT = "".join(chr(97 + token % 26) if token % 7 else " " for token in random_tokens(1500))


def ask(server: Running, question: str, document: str = DOCUMENT) -> tuple[str, int]:
    """The answer of a plain chat completion, and the tokens that were not read again."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{document}\n\n{question}"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def states(home: Path) -> list[Path]:
    return sorted((home / "swaa-local" / "states").glob("*.prefix"))


@pytest.mark.parametrize("name", SCHEDULE_OPTIONS)
def test_a_text_is_read_once_for_all_runs_of_a_server(tiny_model, tmp_path, name):
    options = [*SCHEDULE_OPTIONS[name], "-c", "4096", "-np", "1", "-ub", "128"]
    with serving(tiny_model, *options, "--no-cache", XDG_CACHE_HOME=str(tmp_path)) as server:
        cold, _ = ask(server, "And what then, in the end?")
    assert states(tmp_path) == []
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        assert ask(server, "Who?")[1] == 0
        wait_until(lambda: len(states(tmp_path)) == 1, "a state is written")
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        warm, cached = ask(server, "And what then, in the end?")
    assert warm == cold
    assert cached > 1200
    assert states(tmp_path)[0].stat().st_mode & 0o777 == 0o600
    assert "1 state, " in succeeds("cache", "list", XDG_CACHE_HOME=str(tmp_path))


def test_a_text_is_kept_also_behind_short_requests(tiny_model, tmp_path):
    """They leave the beginning of every prompt, the template's, in a slot, read as their tail."""
    options = ["--window", "64", "--sinks", "4", "--fa-decode", "--tail", "64", "-c", "4096", "-np", "1", "-ub", "128"]
    with serving(tiny_model, *options, "--no-cache", XDG_CACHE_HOME=str(tmp_path)) as server:
        cold, _ = ask(server, "Who?")
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        ask(server, "Hello", document="")
        answer, cached = ask(server, "Who?")
        assert (answer, cached < 20) == (cold, True)
        wait_until(lambda: len(states(tmp_path)) == 1, "a state is written")
        ask(server, "Hello", document="")
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        assert ask(server, "Who?")[1] > 1200


def test_states_that_are_torn_or_of_other_models_are_read_again(tiny_model, tiny_model_factory, tmp_path):
    options = ["-c", "4096", "-np", "1"]
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        cold, _ = ask(server, "Who?")
        wait_until(lambda: len(states(tmp_path)) == 1, "a state is written")
    for damage in (lambda data: data[:-9], lambda data: data[:-9] + b"012345678", lambda _data: b"SWAAKV"):
        [state] = states(tmp_path)
        state.write_bytes(damage(state.read_bytes()))
        with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
            assert ask(server, "Who?") == (cold, 0)
            assert server.log.count("a cached state is not used") == 1
            wait_until(lambda: len(states(tmp_path)) == 1, "a state is written again")
    with serving(tiny_model_factory(seed=5), *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        assert ask(server, "Who?")[1] == 0
    with serving(tiny_model, *options, "--window", "100", XDG_CACHE_HOME=str(tmp_path)) as server:
        assert ask(server, "Who?")[1] == 0


def test_a_server_that_is_killed_leaves_whole_states_or_none(tiny_model, tmp_path):
    options = ["-c", "4096", "-np", "1"]
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        cold, _ = ask(server, "Who?")
        server.stop(signal.SIGKILL)
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        answer, _ = ask(server, "Who?")
        assert answer == cold
        assert "not used" not in server.log


def test_states_are_of_the_scales_that_adapters_had_at_the_start(tiny_model, tmp_path):
    """/lora-adapters changes them for all requests; then a slot may hold cells of either."""
    adapter = write_adapter(tmp_path / "a.gguf", tiny_weights(TinyShape()), seed=1)
    options, prompt = ["-c", "4096", "-np", "1", "--lora", adapter], random_tokens(700)
    with serving(tiny_model, *options, "--no-cache", XDG_CACHE_HOME=str(tmp_path)) as server:
        expected = server.complete(prompt)["tokens"]
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        assert server.post("/lora-adapters", [{"id": 0, "scale": 0.0}])[0] == 200
        assert server.complete(prompt)["tokens"] != expected
        assert server.post("/lora-adapters", [{"id": 0, "scale": 1.0}])[0] == 200
        server.complete(prompt + random_tokens(400, seed=2))
        assert server.log.count("are not kept on disk") == 1
    assert states(tmp_path) == []
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        assert server.complete(prompt)["tokens"] == expected


def test_a_directory_that_cannot_be_written_is_noted(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with serving(tiny_model, "-c", "4096", "-np", "1", XDG_CACHE_HOME=str(tmp_path / "file")) as server:
        assert ask(server, "Who?")[1] == 0
        assert server.log.count("is not kept") == 1


def test_a_state_serves_a_shorter_prompt_as_a_slot_in_memory_does(tiny_model, tmp_path):
    """Its tail was a part of the longer one, and is not read again: docs/cache.md says so."""
    options = ["-c", "4096", "-np", "1", "--window", "64", "--sinks", "4", "--fa-decode", "--tail", "48"]
    longer = random_tokens(900)
    shorter = longer[:700]
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        server.complete(longer)
        in_memory = server.complete(shorter)
        wait_until(lambda: len(states(tmp_path)) == 1, "a state is written")
    with serving(tiny_model, *options, XDG_CACHE_HOME=str(tmp_path)) as server:
        from_disk = server.complete(shorter)
    assert from_disk["timings"]["cache_n"] == in_memory["timings"]["cache_n"] == len(shorter) - 1
    assert from_disk["tokens"] == in_memory["tokens"]
