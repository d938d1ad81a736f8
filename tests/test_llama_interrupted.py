"""Whatever ends a generation, wherever: what the context says it holds, its cells, and a saved state agree, and hold no
token that was drafted and not chosen.

Ctrl-C comes at one line after the other of what `Llama` does between the engine's calls: the real signal, sent by a
trace function. Errors come from the engine, the user's callbacks and the sampler.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as C
import numpy as np
import pytest
from llama_cpp import StoppingCriteriaList

import swaa_local.engine
import swaa_local.llama
from swaa_local import Llama, SWAAConfig
from swaa_local.errors import DecodeError
from tests.support.tiny import random_tokens, with_own_windows, write_tiny_gguf
from tests.support.tiny_hybrid import write_tiny_hybrid

PROMPT = random_tokens(40) * 5  # repeats itself, so that something is drafted from the text
OTHER = [*PROMPT[:120], *random_tokens(100, seed=5)]
N_SAID = 14
HOMES = (str(Path(swaa_local.engine.__file__).parent), swaa_local.llama.__file__)
MAKE: dict[str, Callable[[Path], Path]] = {
    "plain": write_tiny_gguf,
    "own windows": lambda path: write_tiny_gguf(path, **with_own_windows(16, [True, False, True, False])),
    "hybrid": write_tiny_hybrid,
}
DRAFTING: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "from the text": ("plain", False, {}),
    "through a window": ("plain", False, {"draft_window": 32}),
    "FA decode": ("plain", SWAAConfig(32, 4, True), {"draft_window": 32}),
    "rings": ("plain", SWAAConfig(32, 4), {"draft_window": 32}),
    "own windows": ("own windows", SWAAConfig(32, 4, True), {"draft_window": 32}),
}
READING: dict[str, tuple[str, Any]] = {
    "full": ("plain", False),
    "rings": ("plain", SWAAConfig(32, 4)),
    "own windows": ("own windows", False),
    "hybrid": ("hybrid", False),
    "hybrid with rings": ("hybrid", SWAAConfig(32, 4)),
}


class CtrlC:
    """Sends SIGINT at the nth line of swaa_local's engine that runs while this is open, and takes the KeyboardInterrupt
    that comes of it; n_lines: that ran."""

    def __init__(self, nth: int) -> None:
        self._nth = nth
        self.n_lines = 0

    @property
    def came(self) -> bool:
        return self.n_lines > self._nth

    def __enter__(self) -> CtrlC:
        sys.settrace(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> bool:
        sys.settrace(None)
        return kind is KeyboardInterrupt and self.came

    def _called(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        # `generate` does nothing but hand over: Python looks for signals in what it calls.
        is_ours = frame.f_code.co_filename.startswith(HOMES) and frame.f_code.co_name != "generate"
        return self._line if is_ours else None

    def _line(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            self.n_lines += 1
            if self.n_lines == self._nth + 1:
                signal.raise_signal(signal.SIGINT)
        return self._line


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Llama]]:
    opened: list[Llama] = []

    def make(kind: str, swaa: Any, **options: Any) -> Llama:
        path = tmp_path / f"{kind}.gguf"
        if not path.exists():
            MAKE[kind](path)
        sizes: dict[str, Any] = {"n_ctx": 1024, "n_ubatch": 64, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1}
        opened.append(Llama(str(path), swaa=swaa, **sizes, **options))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def last_position(llm: Llama) -> int:
    return int(C.llama_memory_seq_pos_max(C.llama_get_memory(llm.ctx), 0))


def check(llm: Llama, other: Llama, texts: list[list[int]]) -> None:
    """other: of the same model; takes the state. texts: of one of them, it is the beginning that the context holds."""
    n = llm.n_tokens
    held = llm.input_ids[:n].tolist()
    assert any(held == text[:n] for text in texts)
    assert last_position(llm) == n - 1
    assert not llm._generating
    state = llm.save_state()
    assert (state.n_tokens, state.input_ids[:n].tolist()) == (n, held)
    other.load_state(state)
    assert (other.n_tokens, last_position(other)) == (n, n - 1)


def answer(llm: Llama, prompt: list[int], n: int = N_SAID) -> list[int]:
    return list(islice(llm.generate(prompt, temp=0.0), n))


def drafting(load: Callable[..., Llama], name: str, n: int = N_SAID) -> tuple[Llama, Llama, list[int]]:
    """A model that drafts so, another of the same, and what it says to the prompt, n tokens. It begins anew."""
    kind, swaa, options = DRAFTING[name]
    llm, other = load(kind, swaa, speculate=True, **options), load(kind, swaa, **options)
    said = answer(llm, PROMPT, n)
    llm.reset()
    return llm, other, said


def interrupt_everywhere(interrupted: Callable[[CtrlC], None], most: int) -> None:
    """At `most` lines, evenly among those that there are."""
    counting = CtrlC(sys.maxsize)
    interrupted(counting)
    assert counting.n_lines > most
    step = counting.n_lines / most
    for i in range(most):
        interrupted(CtrlC(int(i * step)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", DRAFTING)
def test_ctrl_c_between_the_steps_of_a_draft(load, name):
    llm, other, said = drafting(load, name, 40)

    def interrupted(ctrl_c: CtrlC) -> None:
        """In three tokens, with drafts that are in the cells, and at the end."""
        llm.reset()
        steps = llm.generate(PROMPT, temp=0.0)
        found = [next(steps)]
        while not llm._ahead:
            found.append(next(steps))
        with ctrl_c:
            found += list(islice(steps, 3))
            steps.close()
        del steps
        assert found == said[: len(found)]
        check(llm, other, [PROMPT + said])

    interrupt_everywhere(interrupted, 300)
    assert answer(llm, PROMPT, 40) == said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", READING)
def test_ctrl_c_while_a_prompt_is_taken_up_and_read(load, name):
    """The context holds another text, which begins as this one does."""
    kind, swaa = READING[name]
    llm, other = load(kind, swaa, speculate=False), load(kind, swaa)
    said = answer(llm, OTHER, 3)
    before = PROMPT + answer(llm, PROMPT, 3)

    def interrupted(ctrl_c: CtrlC) -> None:
        answer(llm, PROMPT, 3)
        with ctrl_c:
            answer(llm, OTHER, 3)
        check(llm, other, [OTHER + said, before])

    interrupt_everywhere(interrupted, 150)
    assert answer(llm, OTHER, 3) == said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", READING)
def test_ctrl_c_while_a_state_is_taken_or_a_schedule_changed(load, name):
    kind, swaa = READING[name]
    llm = load(kind, swaa, speculate=False)
    answer(llm, OTHER, 3)
    state, whole = llm.save_state(), llm.input_ids[: llm.n_tokens].tolist()

    def interrupted(ctrl_c: CtrlC) -> None:
        answer(llm, PROMPT, 2)
        held = llm.input_ids[: llm.n_tokens].tolist()
        with ctrl_c:
            llm.load_state(state)
            llm.save_state()
            llm.set_schedule(SWAAConfig(48, 4, True))
        n = llm.n_tokens
        assert llm.input_ids[:n].tolist() in (held, whole, [])
        assert last_position(llm) == n - 1 or n == 0
        llm.set_schedule(swaa)

    interrupt_everywhere(interrupted, 100)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", DRAFTING)
@pytest.mark.parametrize("nth", range(12))
def test_an_engine_that_fails_in_the_middle_of_a_draft(load, monkeypatch, name, nth):
    llm, other, said = drafting(load, name)
    steps = llm.generate(PROMPT, temp=0.0)
    found = [next(steps)]
    real, left = C.llama_decode, nth

    def failing(ctx: Any, batch: Any) -> int:
        nonlocal left
        left -= 1
        return int(real(ctx, batch)) if left >= 0 else 1

    monkeypatch.setattr(C, "llama_decode", failing)
    with pytest.raises(DecodeError):
        found.extend(islice(steps, N_SAID))
    monkeypatch.setattr(C, "llama_decode", real)
    assert found == said[: len(found)]
    check(llm, other, [PROMPT + said])
    assert answer(llm, PROMPT) == said


@pytest.mark.parametrize("name", DRAFTING)
@pytest.mark.parametrize("who", ["processor", "criterion"])
def test_a_callback_that_raises_while_drafts_are_there(load, name, who):
    llm, other, said = drafting(load, name, 40)

    def call(tokens: Any, scores: Any) -> Any:
        if llm._ahead and len(tokens) > len(PROMPT) + 2:
            raise Stop
        return np.asarray(scores) if who == "processor" else False

    processors = llama_cpp.LogitsProcessorList([call])
    given: dict[str, Any] = (
        {"logits_processor": processors} if who == "processor" else {"stopping_criteria": StoppingCriteriaList([call])}
    )
    with pytest.raises(Stop):
        list(islice(llm.generate(PROMPT, temp=0.0, **given), 40))
    check(llm, other, [PROMPT + said])


@pytest.mark.parametrize("name", DRAFTING)
def test_a_generation_that_is_left(load, name):
    """At any token: the drafts that are in the cells go with it."""
    llm, other, said = drafting(load, name, 30)
    n_with_drafts = 0
    for n in range(1, 30):
        llm.reset()
        with closing(llm.generate(PROMPT, temp=0.0)) as steps:
            list(islice(steps, n))
            n_with_drafts += bool(llm._ahead)
        check(llm, other, [PROMPT + said])
    assert n_with_drafts
