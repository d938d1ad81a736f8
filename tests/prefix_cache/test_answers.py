"""An answer is the same with the cache and without, whatever happens to the cache. Greedy, through the real program."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.prefix_cache.store import PrefixCache
from tests.support.program import SCHEDULE_OPTIONS, environment, succeeds
from tests.support.tiny import random_tokens, with_own_windows, write_tiny_gguf
from tests.support.tiny_hybrid import write_tiny_hybrid

SCHEDULES = {
    "full attention": False,
    "FA decode with a tail": SWAAConfig(32, 4, True, prompt_tail=8),
    "FA decode": SWAAConfig(32, 4, True, [1]),
    "rings": SWAAConfig(32, 4),
    "rings beside FA decode and full": SWAAConfig(32, 4, [1], [0]),
}
DOCUMENT = random_tokens(1500)
FIRST, SECOND = random_tokens(40, seed=2), random_tokens(60, seed=3)


@pytest.fixture
def answer(tiny_model, tmp_path):
    """`answer(swaa, prompt, ends, cache=True)`: 24 greedy tokens and the tokens that were not read again."""

    def run(swaa, prompt, ends=(), *, cache: bool = True) -> tuple[list[int], int]:
        llm = Llama(str(tiny_model), swaa=swaa, n_ctx=4096, n_ubatch=256, n_threads=1, n_threads_batch=1)
        notes: list[str] = []
        if cache:
            llm.set_cache(PrefixCache(tmp_path / "states", note=notes.append))
        tokens = []
        for token in llm.generate(prompt, temp=0, document_ends=ends):
            tokens.append(token)
            if len(tokens) == 24:
                break
        assert llm.last_run is not None
        cached = llm.last_run.cached_tokens
        llm.close()
        assert notes == []
        return tokens, cached

    return run


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_question_about_a_text_that_was_read(answer, name):
    swaa = SCHEDULES[name]
    cold = answer(swaa, DOCUMENT + SECOND, [1500], cache=False)
    assert answer(swaa, DOCUMENT + FIRST, [1500])[1] == 0
    assert answer(swaa, DOCUMENT + SECOND, [1500]) == (cold[0], 1500)
    assert answer(swaa, DOCUMENT + SECOND, [1500]) == (cold[0], 1500)


@pytest.mark.parametrize("name", ["full attention", "FA decode", "FA decode with a tail"])
def test_a_text_whose_end_was_edited_keeps_its_beginning(answer, name):
    swaa = SCHEDULES[name]
    answer(swaa, DOCUMENT + FIRST, [1500])
    edited = DOCUMENT[:1300] + random_tokens(400, seed=9)
    cold = answer(swaa, edited + FIRST, [1700], cache=False)
    assert answer(swaa, edited + FIRST, [1700]) == (cold[0], 1280)  # where a part of 256 tokens begins
    assert answer(swaa, edited + SECOND, [1700])[1] == 1700
    assert answer(swaa, DOCUMENT + SECOND, [1500])[1] == 1500  # both are kept


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_conversation_is_kept_without_the_tokens_that_were_read_ahead(tiny_model, tmp_path, name):
    """A text that repeats itself is drafted from what it said before; the answer is left in the middle of a draft."""
    options = {"swaa": SCHEDULES[name], "n_ctx": 4096, "n_ubatch": 256, "n_threads": 1, "n_threads_batch": 1}
    llm = Llama(str(tiny_model), speculate=True, **options)
    llm.set_cache(PrefixCache(tmp_path / "states"))
    said: list[int] = []
    steps = llm.generate(random_tokens(30) * 20, temp=0)
    for token in steps:
        said.append(token)
        if len(said) >= 3 and llm._ahead:
            break
    assert llm._ahead
    held = llm.input_ids[: llm.n_tokens].tolist()
    assert llm.prefixes is not None
    assert llm.prefixes.save_conversation("talk")
    llm.close()
    other = Llama(str(tiny_model), speculate=False, **options)
    other.set_cache(PrefixCache(tmp_path / "states"))
    assert other.prefixes is not None
    assert other.prefixes.load_conversation("talk") == len(held)
    assert other.input_ids[: other.n_tokens].tolist() == held
    assert int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(other.ctx), 0)) == len(held) - 1
    other.close()


OTHERS = {
    "hybrid": write_tiny_hybrid,
    "own windows": lambda path: write_tiny_gguf(path, **with_own_windows(16, [True, False, True, False])),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("swaa", [False, SWAAConfig(32, 4, True)], ids=str)
def test_a_conversation_that_goes_on_otherwise_begins_with_its_document(tmp_path, kind, swaa):
    """What layers have left behind, or seen more of, is not in the conversation's state; it is in the document's."""
    path = OTHERS[kind](tmp_path / "m.gguf")

    def load() -> Llama:
        return Llama(str(path), swaa=swaa, n_ctx=4096, n_ubatch=256, n_threads=1, n_threads_batch=1, speculate=False)

    def say(llm: Llama, prompt: list[int]) -> list[int]:
        return list(islice(llm.generate(prompt, temp=0, document_ends=[1500]), 12))

    llm = load()
    other = [*DOCUMENT, *FIRST[:30], *SECOND]
    cold = say(llm, other)
    llm.reset()
    llm.set_cache(PrefixCache(tmp_path / "states"))
    say(llm, DOCUMENT + FIRST)
    assert llm.prefixes is not None
    assert llm.prefixes.save_conversation("talk")
    llm.close()
    llm = load()
    llm.set_cache(PrefixCache(tmp_path / "states"))
    assert llm.prefixes is not None
    assert llm.prefixes.load_conversation("talk") > len(DOCUMENT + FIRST)
    assert say(llm, other) == cold
    assert llm.last_run is not None
    assert llm.last_run.cached_tokens == 1500
    llm.close()


SYSTEM, HELLO = random_tokens(20, seed=7), random_tokens(6, seed=8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_text_is_kept_also_where_a_short_prompt_began_with_the_same_tokens(answer, tiny_model, tmp_path, name):
    """As every prompt of a chat begins with its system message. The short prompt may be shorter than its tail."""
    swaa, n = SCHEDULES[name], len(SYSTEM + DOCUMENT)
    cold = answer(swaa, SYSTEM + DOCUMENT + FIRST, [n], cache=False)
    llm = Llama(str(tiny_model), swaa=swaa, n_ctx=4096, n_ubatch=256, n_threads=1, n_threads_batch=1)
    llm.set_cache(PrefixCache(tmp_path / "states"))
    list(islice(llm.generate(SYSTEM + HELLO, temp=0, prompt_tail=128), 3))
    assert list(islice(llm.generate(SYSTEM + DOCUMENT + FIRST, temp=0, document_ends=[n]), 24)) == cold[0]
    llm.close()
    assert answer(swaa, SYSTEM + DOCUMENT + FIRST, [n]) == (cold[0], n)


def test_a_conversation_that_goes_on_is_not_read_again(tiny_model, tmp_path):
    options = {"n_ctx": 4096, "n_ubatch": 256, "n_threads": 1, "n_threads_batch": 1}
    llm = Llama(str(tiny_model), swaa=SCHEDULES["FA decode with a tail"], **options)
    llm.set_cache(PrefixCache(tmp_path / "states"))
    said = list(islice(llm.generate(SYSTEM + HELLO, temp=0), 3))
    held = [*SYSTEM, *HELLO, *said[:2]]
    next(llm.generate([*held, *DOCUMENT, *FIRST], temp=0))
    assert llm.last_run is not None
    assert llm.last_run.cached_tokens == len(held)
    llm.close()


@pytest.mark.parametrize("name", ["rings", "rings beside FA decode and full"])
def test_rings_are_taken_up_at_the_end_of_any_document(answer, name):
    swaa, other = SCHEDULES[name], random_tokens(500, seed=4)
    answer(swaa, DOCUMENT[:900] + DOCUMENT[900:] + FIRST, [900, 1500])
    prompt = DOCUMENT[:900] + other + FIRST
    cold = answer(swaa, prompt, [900, 1400], cache=False)
    assert answer(swaa, prompt, [900, 1400]) == (cold[0], 900)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_was_generated_or_read_as_a_tail_serves_nobody_else(answer, name):
    """A prompt that goes on with the answer of before would be read otherwise than that answer was written."""
    swaa = SCHEDULES[name]
    said = answer(swaa, DOCUMENT + FIRST, [1500])[0]
    prompt = DOCUMENT + FIRST + said + SECOND
    cold = answer(swaa, prompt, [1500], cache=False)
    warm = answer(swaa, prompt, [1500])
    assert warm == (cold[0], 1500)


def test_the_tail_of_a_prompt_is_read_even_where_a_longer_one_holds_its_tokens(answer):
    """They were no tail there, and saw a window alone."""
    swaa = SCHEDULES["FA decode with a tail"]
    answer(swaa, DOCUMENT, [])
    prompt = DOCUMENT[:1284]  # its tail of 8 begins before 1280, where a part of 256 tokens would
    cold = answer(swaa, prompt, [], cache=False)
    assert answer(swaa, prompt, []) == (cold[0], 1024)


def test_a_prompt_is_taken_up_where_batches_begin_which_need_not_be_whole_ubatches(tiny_model, tmp_path):
    def cached(n_batch: int) -> int:
        options: dict[str, Any] = {
            "n_ctx": 4096,
            "n_batch": n_batch,
            "n_ubatch": 256,
            "n_threads": 1,
            "n_threads_batch": 1,
        }
        llm = Llama(str(tiny_model), swaa=False, **options)
        llm.set_cache(PrefixCache(tmp_path / "states"))
        parts: list[int] = []
        llm.on_prefill = lambda done, _total: parts.append(llm.n_tokens)
        next(llm.generate(DOCUMENT[:1490] + FIRST, temp=0))
        assert llm.last_run is not None
        found = llm.last_run.cached_tokens
        if not found:
            llm.close()
            llm = Llama(str(tiny_model), swaa=False, **options)
            llm.set_cache(PrefixCache(tmp_path / "states"))
            next(llm.generate(DOCUMENT[:1490] + SECOND, temp=0))
            assert llm.last_run is not None
            found = llm.last_run.cached_tokens
            assert found in parts  # a part of the cold run began there
        llm.close()
        return found

    assert cached(700) == 1400
    assert cached(512) == 1280  # nothing of what was read in batches of 700


def test_the_tail_of_the_schedule_is_no_part_of_the_key_and_all_else_is(answer):
    answer(SWAAConfig(32, 4, True, prompt_tail=8), DOCUMENT + FIRST, [1500])
    assert answer(SWAAConfig(32, 4, True, prompt_tail=3), DOCUMENT + FIRST, [1500])[1] == 1500
    for other in (SWAAConfig(33, 4, True), SWAAConfig(32, 5, True), SWAAConfig(32, 4, True, [0]), False):
        assert answer(other, DOCUMENT + FIRST, [1500])[1] == 0


def test_a_model_that_was_changed_in_place_is_another_one(answer, tiny_model, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_model.read_bytes())

    def cached() -> int:
        llm = Llama(str(copy), n_ctx=4096, n_threads=1, n_threads_batch=1)
        llm.set_cache(PrefixCache(tmp_path / "states"))
        next(llm.generate(DOCUMENT + FIRST, temp=0))
        llm.close()
        assert llm.last_run is not None
        return llm.last_run.cached_tokens

    assert (cached(), cached() > 0) == (0, True)
    data = bytearray(copy.read_bytes())
    data[-1000] ^= 1
    copy.write_bytes(data)
    assert cached() == 0


# Through the command line


@pytest.fixture
def book(tmp_path) -> Path:
    """Some 2000 tokens: the tiny tokenizer makes one of each character."""
    path = tmp_path / "book.txt"
    path.write_text("".join(np.random.default_rng(5).choice(list("abcdefgh ."), 2000)))
    return path


def chat(model: Path, *args: object, home: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "swaa_local",
        "chat",
        str(model),
        "-t",
        "1",
        "-c",
        "4096",
        "--temp",
        "0",
        "-n",
        "16",
    ]
    return subprocess.run(
        [*command, *map(str, args)],
        env=environment(XDG_CACHE_HOME=str(home)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def is_cached(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.returncode == 0, done.stderr
    return " cached)" in done.stderr


@pytest.mark.parametrize("schedule", SCHEDULE_OPTIONS.values(), ids=SCHEDULE_OPTIONS)
def test_a_second_question_reads_the_question_alone(tiny_model, book, tmp_path, schedule):
    def ask(question: str, *more: str) -> subprocess.CompletedProcess[str]:
        return chat(tiny_model, "--file", book, "-p", question, *schedule, *more, home=tmp_path)

    cold = ask("And what then?", "--no-cache")
    assert not is_cached(ask("Who?"))
    warm = ask("And what then?")
    assert is_cached(warm)
    assert warm.stdout == cold.stdout
    listed = succeeds("cache", "list", XDG_CACHE_HOME=str(tmp_path))
    assert tiny_model.name in listed
    assert "1 state, " in listed
    assert succeeds("cache", "clear", XDG_CACHE_HOME=str(tmp_path)).startswith("removed 1 state, ")
    assert not is_cached(ask("Who?", "--cache-size", "0"))
    assert not is_cached(ask("Who?", "--no-cache"))
    assert "0 states" in succeeds("cache", "list", XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.parametrize("name", SCHEDULE_OPTIONS)
def test_a_text_is_prepared_by_reading_it_alone(tiny_model, book, tmp_path, name):
    """`-n 0`: the next question finds all of the text, and has the answer that it has without."""
    schedule = SCHEDULE_OPTIONS[name]
    ask = ["--file", book, "-p", "And what then?", *schedule]
    cold = chat(tiny_model, *ask, "--no-cache", home=tmp_path)
    prepared = chat(tiny_model, "--file", book, "-p", "x", "-n", "0", *schedule, home=tmp_path)
    assert (prepared.stdout, is_cached(prepared)) == ("", False)
    asked = chat(tiny_model, *ask, home=tmp_path)
    assert asked.stdout == cold.stdout
    [(n_prompt, n_cached)] = re.findall(r"prompt ([\d,]+) tokens \(([\d,]+) cached\)", asked.stderr)
    n_behind = int(n_prompt.replace(",", "")) - int(n_cached.replace(",", ""))
    # a character is a token: the question with what the template puts around it, and what is left of the text behind
    # the last whole tail
    assert n_behind < 64
    assert book.stat().st_size < int(n_cached.replace(",", ""))


def test_a_cache_that_cannot_be_used_changes_no_answer(tiny_model, book, tmp_path):
    """A directory that cannot be written, a disk that is full, and a file that is torn: one line each."""
    ask = ["--file", book, "-p", "Who?"]
    good = tmp_path / "good"
    cold = chat(tiny_model, *ask, "--no-cache", home=good)
    (tmp_path / "file").write_text("in the way")
    for done in (
        chat(tiny_model, *ask, home=tmp_path / "file"),
        chat(tiny_model, *ask, home=tmp_path / "full", limit=100_000),
        chat(tiny_model, *ask, "--cache-size", "100K", home=good),
    ):
        assert (done.returncode, done.stdout) == (0, cold.stdout)
        assert done.stderr.count("is not kept") == 1
    assert list(tmp_path.glob("full/swaa-local/states/*")) == []
    chat(tiny_model, *ask, home=good)
    [state] = good.glob("swaa-local/states/*.prefix")
    for damage in (
        lambda data: data[:-5],
        lambda data: data[:-5] + b"abcde",
        lambda _data: b"",
        lambda _data: b"x" * 999,
    ):
        state.write_bytes(damage(state.read_bytes()))
        done = chat(tiny_model, *ask, home=good)
        assert (done.returncode, done.stdout) == (0, cold.stdout)
        assert done.stderr.count("a cached state is not used") == 1
        assert not is_cached(done)
        assert is_cached(chat(tiny_model, *ask, home=good))


def test_two_processes_at_once(tiny_model, book, tmp_path):
    cold = chat(tiny_model, "--file", book, "-p", "Who?", "--no-cache", home=tmp_path)
    command = [sys.executable, "-m", "swaa_local", "chat", str(tiny_model), "-t", "1", "-c", "4096", "--temp", "0"]
    command += ["-n", "16", "--file", str(book), "-p", "Who?"]
    env = environment(XDG_CACHE_HOME=str(tmp_path))
    both = [
        subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=-1) for _ in "ab"
    ]
    for process in both:
        out, error = process.communicate(timeout=240)
        assert (process.returncode, out.decode()) == (0, cold.stdout)
        assert b"not" not in error
    assert is_cached(chat(tiny_model, "--file", book, "-p", "Who?", home=tmp_path))
