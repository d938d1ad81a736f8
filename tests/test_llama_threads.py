"""`Llama` and threads: several may load, one may use an object at a time, and callbacks may only look.

Threads are made to meet with events, never with times.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.engine.guard import Guard
from swaa_local.errors import BusyError, ClosedError, ContextChanged
from tests.support.program import environment
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

TOKENS = random_tokens(300)
KWARGS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
SCHEDULE = ScheduleKeys(window=8, sinks=2, layer_modes=[FULL, PREFILL, ALWAYS, PREFILL])


@pytest.fixture
def llm(tiny_model_factory: Callable[..., Path]) -> Iterator[Llama]:
    llm = Llama(str(tiny_model_factory(schedule=SCHEDULE)), **KWARGS)
    yield llm
    llm.close()


def greedy(llm: Llama, n: int = 8, prompt: list[int] = TOKENS[:60]) -> str:
    llm.reset()
    return llm(prompt, max_tokens=n, temperature=0)["choices"][0]["text"]


def elsewhere(call: Callable[[], Any]) -> Any:
    """What the call returns or raises in another thread, after it has ended."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


# Loading

LOAD_IN_THREADS = """
import sys, threading
from swaa_local import Llama
path, n_threads = sys.argv[1], 3
loaded = threading.Event()
errors, written = [], 0
barrier = threading.Barrier(n_threads)

def load():
    try:
        barrier.wait()
        for _ in range(15):
            Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1).close()
    except BaseException as error:
        errors.append(error)

threads = [threading.Thread(target=load) for _ in range(n_threads)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    print("line", written, flush=True)
    print("line", written, file=sys.stderr, flush=True)
    written += 1
assert not errors, errors
print("end", written, flush=True)
print("end", written, file=sys.stderr, flush=True)
"""


def test_threads_that_load_leave_stdout_and_stderr_alone(tiny_model: Path) -> None:
    """Neither is lost afterwards, nor is what another thread writes meanwhile, nor does llama.cpp write to them."""
    command = [sys.executable, "-c", LOAD_IN_THREADS, str(tiny_model)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        *lines, last = stream.splitlines()
        assert last == f"end {len(lines)}"
        assert lines == [f"line {i}" for i in range(len(lines))]


def test_plain_llama_cpp_loads_in_threads_too(tiny_model: Path) -> None:
    before = [os.fstat(fd) for fd in (1, 2)], sys.stdout, sys.stderr
    barrier = threading.Barrier(3)

    def load() -> None:
        barrier.wait()
        for _ in range(8):
            llama_cpp.Llama(str(tiny_model), n_ctx=256, n_threads=1, verbose=False).close()

    with ThreadPoolExecutor(3) as pool:
        for each in [pool.submit(load) for _ in range(3)]:
            each.result()
    assert ([os.fstat(fd) for fd in (1, 2)], sys.stdout, sys.stderr) == before


def test_redirections_in_threads_end_with_the_last(capfd: pytest.CaptureFixture[str]) -> None:
    """Of llama_cpp's chat handlers: the first that is inside must not take the streams from the second."""
    from llama_cpp._utils import suppress_stdout_stderr

    first, second = suppress_stdout_stderr(disable=False), suppress_stdout_stderr(disable=False)
    stdout = sys.stdout
    first.__enter__()
    elsewhere(second.__enter__)
    first.__exit__()
    print("inside")
    elsewhere(second.__exit__)
    assert sys.stdout is stdout
    print("outside", flush=True)
    assert capfd.readouterr().out == "outside\n"


# One thread at a time


class Paused:
    """Runs a call of `llm` in a thread of its own and holds it where its `on_prefill` is called first."""

    def __init__(self, llm: Llama, call: Callable[[], Any]) -> None:
        self._llm = llm
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reader")
        llm.on_prefill = self._wait
        self._future = self._pool.submit(call)

    def _wait(self, _done: int, _total: int) -> None:
        self._inside.set()
        assert self._go_on.wait(60)

    def __enter__(self) -> Paused:
        assert self._inside.wait(60)
        return self

    def finish(self) -> Any:
        """What the call returned or raised."""
        self._go_on.set()
        return self._future.result(60)

    def __exit__(self, *_exc: object) -> None:
        self._go_on.set()
        self._pool.shutdown()
        self._llm.on_prefill = None


USES: dict[str, Callable[[Llama], Any]] = {
    "completion": lambda llm: llm(TOKENS[:5], max_tokens=1),
    "stream": lambda llm: next(llm(TOKENS[:5], max_tokens=1, stream=True)),
    "chat": lambda llm: llm.create_chat_completion([{"role": "user", "content": "hello"}], max_tokens=1),
    "generate": lambda llm: next(llm.generate(TOKENS[:5])),
    "eval": lambda llm: llm.eval(TOKENS[:5]),
    "sample": lambda llm: llm.sample(),
    "reset": lambda llm: llm.reset(),
    "set_schedule": lambda llm: llm.set_schedule(False),
    "load_state": lambda llm: llm.load_state(STATES[-1]),
    "embed": lambda llm: llm.embed("hello"),
    "create_embedding": lambda llm: llm.create_embedding("hello"),
}
LOOKS: dict[str, Callable[[Llama], Any]] = {
    "save_state": lambda llm: llm.save_state(),
    "kv_bytes": lambda llm: llm.kv_bytes,
    "pooling_type": lambda llm: llm.pooling_type(),
}
READS: dict[str, Callable[[Llama], Any]] = {
    "tokenize": lambda llm: llm.tokenize(b"hello"),
    "detokenize": lambda llm: llm.detokenize(TOKENS[:5]),
    "tokenizer": lambda llm: llm.tokenizer().encode("hello"),
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_embd": lambda llm: llm.n_embd(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "token_eos": lambda llm: llm.token_eos(),
    "metadata": lambda llm: llm.metadata["general.architecture"],
    "swaa": lambda llm: llm.swaa,
    "last_run": lambda llm: llm.last_run,
}
STATES: list[Any] = []


@pytest.mark.parametrize("use", [*USES, *LOOKS])
def test_a_second_thread_is_refused_by_the_name_of_the_first(llm: Llama, use: str) -> None:
    llm.eval(TOKENS[:20])
    STATES.append(llm.save_state())
    with Paused(llm, lambda: greedy(llm)) as running:
        with pytest.raises(BusyError, match="works for the thread 'reader_0'; it serves one call at a time"):
            (USES | LOOKS)[use](llm)
        answer = running.finish()
    assert answer == greedy(llm)


def test_any_thread_may_ask_for_what_never_changes(llm: Llama) -> None:
    quiet = {name: read(llm) for name, read in READS.items() if name != "last_run"}
    with Paused(llm, lambda: greedy(llm)) as running:
        assert {name: read(llm) for name, read in READS.items() if name != "last_run"} == quiet
        running.finish()


def test_threads_may_take_turns(llm: Llama) -> None:
    assert elsewhere(lambda: greedy(llm)) == greedy(llm) == elsewhere(lambda: greedy(llm))


def test_each_token_of_a_stream_may_come_from_another_thread(llm: Llama) -> None:
    """As llama_cpp.server asks for them."""
    stream = llm(TOKENS[:60], max_tokens=8, temperature=0, stream=True)
    text = ""
    while chunk := elsewhere(lambda: next(stream, None)):
        text += chunk["choices"][0]["text"]
    assert text == greedy(llm)


def test_a_lock_around_whole_answers_is_enough(llm: Llama) -> None:
    """Also for streams that are left in the middle, as llama_cpp.server leaves them when the next request comes."""
    lock, want = threading.Lock(), greedy(llm)

    def answer(i: int) -> str:
        with lock:
            chunks = llm(TOKENS[:60], max_tokens=8, temperature=0, stream=True)
            if i % 2:
                next(chunks)
                kept.append(chunks)
                return want
            return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    kept: list[Any] = []
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(12))) == [want] * 12


def test_several_objects_serve_several_threads(tiny_model: Path) -> None:
    models = [Llama(str(tiny_model), **KWARGS) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(greedy, models))) == 1
    for llm in models:
        llm.close()


def test_threads_without_a_lock_get_answers_or_errors_but_never_a_crash(llm: Llama) -> None:
    want = {n: greedy(llm, 4, TOKENS[:n]) for n in (40, 50)}
    barrier = threading.Barrier(4)

    def ask(n: int) -> list[str]:
        barrier.wait()
        got = []
        for _ in range(10):
            with suppress(BusyError):
                got.append(llm(TOKENS[:n], max_tokens=4, temperature=0)["choices"][0]["text"])
        return got

    with ThreadPoolExecutor(4) as pool:
        for n, answers in zip((40, 50, 40, 50), list(pool.map(ask, (40, 50, 40, 50))), strict=True):
            assert set(answers) <= {want[n]}
    assert greedy(llm, 4, TOKENS[:40]) == want[40]


# Generators that something comes between


@pytest.mark.parametrize(
    "between",
    [
        lambda llm: llm.eval(TOKENS[100:120]),
        lambda llm: llm.reset(),
        lambda llm: llm(TOKENS[200:230], max_tokens=40),
        lambda llm: llm.set_schedule(SWAAConfig(16)),
        lambda llm: elsewhere(lambda: llm(TOKENS[200:290], max_tokens=2)),
    ],
)
def test_a_generator_does_not_go_on_from_another_text(llm: Llama, between: Callable[[Llama], Any]) -> None:
    for stream in (llm.generate(TOKENS[:60], temp=0.0), llm(TOKENS[:60], max_tokens=9, stream=True)):
        next(stream), next(stream)
        between(llm)
        with pytest.raises(ContextChanged, match="another call has changed"):
            next(stream)


def test_a_generator_goes_on_from_a_restored_state(llm: Llama) -> None:
    want = [token for token, _ in zip(llm.generate(TOKENS[:60], temp=0.0), range(8), strict=False)]
    llm.reset()
    stream = llm.generate(TOKENS[:60], temp=0.0)
    got = [next(stream) for _ in range(4)]
    state = llm.save_state()
    llm(TOKENS[200:250], max_tokens=4)
    llm.load_state(state)
    assert got + [next(stream) for _ in range(4)] == want


# Callbacks


def in_callback(llm: Llama, kind: str, use: Callable[[Llama], Any], **kwargs: Any) -> list[Any]:
    """Generate, and use the object once in a callback of this kind. Returns what that gave; raises what it raised."""
    seen: list[Any] = []

    def once() -> None:
        if not seen:
            seen.append(None)
            seen[0] = use(llm)

    def process(_ids: Any, scores: Any) -> Any:
        once()
        return scores

    def stop(_ids: Any, _logits: Any) -> bool:
        once()
        return False

    if kind == "on_prefill":
        llm.on_prefill = lambda done, total: once()
    elif kind == "logits_processor":
        kwargs["logits_processor"] = llama_cpp.LogitsProcessorList([process])
    else:
        kwargs["stopping_criteria"] = llama_cpp.StoppingCriteriaList([stop])
    try:
        llm(TOKENS[:60], max_tokens=8, temperature=0, **kwargs)
    finally:
        llm.on_prefill = None
    return seen


KINDS = ["on_prefill", "logits_processor", "stopping_criteria"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_a_callback_cannot_change_what_the_call_works_on(llm: Llama, kind: str, use: str) -> None:
    want = greedy(llm)
    STATES.append(llm.save_state())
    schedule = llm.schedule
    llm.reset()
    with pytest.raises(BusyError, match="a callback of it"):
        in_callback(llm, kind, USES[use])
    assert llm.schedule == schedule
    assert greedy(llm) == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", [*LOOKS, *READS])
def test_a_callback_may_look(llm: Llama, kind: str, use: str) -> None:
    llm.reset()
    assert len(in_callback(llm, kind, (LOOKS | READS)[use])) == 1


def test_a_state_saved_while_a_prompt_is_read_is_that_of_what_was_read(llm: Llama) -> None:
    states: list[Any] = []
    llm.on_prefill = lambda done, total: states.append(llm.save_state()) if done == 64 else None
    llm.eval(TOKENS[:200])
    llm.on_prefill = None
    llm.load_state(states[0])
    assert llm.input_ids[: llm.n_tokens].tolist() == TOKENS[:64]


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
def test_what_a_logits_processor_raises_is_raised(llm: Llama, error: BaseException) -> None:
    """ctypes would print it and go on with the scores that there were."""

    def fail(_llm: Llama) -> None:
        raise error

    with pytest.raises(type(error)):
        in_callback(llm, "logits_processor", fail)
    assert greedy(llm) == greedy(llm)


# Closing from another thread


def test_closing_from_another_thread_ends_the_call_and_frees_when_it_has_ended(llm: Llama) -> None:
    with Paused(llm, lambda: greedy(llm)) as running:
        llm.close()
        with pytest.raises(ClosedError):
            llm.tokenize(b"hello")
        with pytest.raises(ClosedError):
            running.finish()
    assert llm.__dict__["_model"].model is None


def test_closing_while_threads_tokenize(tiny_model: Path) -> None:
    for _ in range(5):
        llm = Llama(str(tiny_model), **KWARGS)
        barrier = threading.Barrier(4)

        def tokenize(llm: Llama = llm, barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            for i in range(100_000):
                try:
                    llm.tokenize(b"a text that takes a while " * 50)
                except ClosedError:
                    return i
            raise AssertionError("it was never closed")

        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(tokenize) for _ in range(3)]
            barrier.wait()
            llm.close()
            for future in futures:
                future.result()


# The guard itself


def test_a_call_that_was_cut_off_does_not_hold_the_object() -> None:
    """Ctrl-C between two instructions of `with` leaves a call that never ends."""
    guard, freed = Guard(), []

    def cut_off() -> None:
        guard.step().__enter__()

    cut_off()
    with guard.step():  # of this thread
        pass
    elsewhere(cut_off)  # of a thread that has ended
    with guard.work():
        elsewhere(guard.read().__enter__)
        with pytest.raises(BusyError):
            elsewhere(cut_off)
    cut_off()
    guard.close(lambda: freed.append(True))
    assert freed == [True]


def test_a_finalizer_may_close_at_any_time() -> None:
    guard, freed = Guard(), []
    with guard.read():
        guard.close(lambda: freed.append(True))
        assert not freed
        guard.close(lambda: freed.append(True))
    assert freed == [True]
    with pytest.raises(ClosedError), guard.read():
        pass
