"""Random programs of sequence operations, every logit against a numpy model per sequence."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from engine import EngineContext, assert_close
from masks import Sched
from reference_numpy import NumpyModel
from tiny import ALWAYS, TinyShape, random_tokens

N_LAYER = 2
N_SEQ = 4
N_CTX = 700  # positions of a sequence
SHAPE = TinyShape(n_layer=N_LAYER)


class Program(NamedTuple):
    schedule: Sched
    unified: bool
    n_batch: int
    n_ubatch: int
    flash: bool


def program(rng: np.random.Generator) -> Program:
    modes = tuple(int(m) for m in rng.integers(0, 3, N_LAYER))
    window, sinks = int(rng.choice([1, 7, 24, 90])), int(rng.choice([0, 1, 5, 40]))
    n_batch = int(rng.choice([48, 128, 300]))
    n_ubatch = int(rng.choice([5, 16, 48]))
    return Program(Sched(window, sinks, modes), bool(rng.integers(2)), n_batch, n_ubatch, bool(rng.integers(2)))


def batch_step(rng: np.random.Generator, ctx: EngineContext, refs: list[NumpyModel], tolerance: float) -> str:
    """One llama_decode call with tokens of some sequences, interleaved, phases automatic or by a prompt end."""
    plan: list[tuple[int, list[int], np.ndarray]] = []
    room = ctx.n_batch
    for seq in rng.permutation(N_SEQ)[: rng.integers(1, N_SEQ + 1)]:
        start = refs[seq].next_position
        n = min(int(rng.choice([1, 1, 2, 17, 40, 120])), room, N_CTX - start)
        if n <= 0:
            continue
        room -= n
        if rng.integers(2):
            end = start + int(rng.integers(0, n + 1))
            ctx.set_prompt_end(int(seq), end)
            phase = np.arange(start, start + n) >= end
        else:
            ctx.set_prompt_end(int(seq), -1)
            phase = np.full(n, n == 1)
        plan.append((int(seq), random_tokens(n, seed=int(rng.integers(1 << 30))), phase))
    queues = [[(token, refs[seq].next_position + i, seq) for i, token in enumerate(tokens)] for seq, tokens, _ in plan]
    entries = []
    while any(queues):
        queue = queues[rng.choice([i for i, q in enumerate(queues) if q])]
        take = int(rng.integers(1, len(queue) + 1))
        entries += queue[:take]
        del queue[:take]
    if not entries:
        return "nothing"
    logits = ctx.decode(entries)
    owner = np.array([seq for *_, seq in entries])
    for seq, tokens, phase in plan:
        assert_close(logits[owner == seq], refs[seq].feed(tokens, decode=phase), tolerance, f"sequence {seq}")
    return "decode " + ", ".join(f"{len(tokens)} of {seq}" for seq, tokens, _ in plan)


def memory_step(
    rng: np.random.Generator, ctx: EngineContext, refs: list[NumpyModel], *, rings: bool, copying: bool
) -> str:
    """One operation on the memory, on the context and on the references.

    copying: a copy between streams waits for the next decode; upstream saves a state without it.
    """
    seq, other = (int(s) for s in rng.permutation(N_SEQ)[:2])
    n = refs[seq].next_position
    operation = rng.choice(["tail", "tail", "copy", "clear sequence"] + ["restore"] * (not copying))
    if operation == "tail" and n:
        p0 = max(0, n - int(rng.integers(1, 60)))
        if ctx.rm(seq, p0, -1):
            refs[seq].remove(p0, n)
        else:
            assert rings, "only a ring may refuse"
            assert ctx.pos_max(seq) == n - 1
    elif operation == "copy" and n:
        ctx.rm(other, -1, -1)
        ctx.cp(seq, other)
        refs[other] = refs[seq].copy()
    elif operation == "clear sequence":
        assert ctx.rm(seq, -1, -1)
        refs[seq].remove(0, n)
    elif operation == "restore" and n:
        state = ctx.state(seq)
        assert ctx.rm(other, -1, -1)
        ctx.load_state(state, seq=other)
        refs[other] = refs[seq].copy()
    return f"{operation} {seq} {other}"


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(load_model, seed):
    rng = np.random.default_rng(seed)
    p = program(rng)
    refs = [NumpyModel(p.schedule, shape=SHAPE) for _ in range(N_SEQ)]
    done: list[str] = []
    with load_model(p.schedule, n_layer=N_LAYER).context(
        n_ctx=N_SEQ * 768,
        n_batch=p.n_batch,
        n_ubatch=p.n_ubatch,
        n_seq_max=N_SEQ,
        unified=p.unified,
        flash="on" if p.flash else "off",
        kv="F16" if p.flash else "F32",
    ) as ctx:
        for _ in range(25):
            try:
                if rng.integers(4):
                    done.append(batch_step(rng, ctx, refs, 1e-2 if p.flash else 1e-3))
                else:
                    since_decode = itertools.takewhile(lambda step: not step.startswith("decode"), reversed(done))
                    copying = not p.unified and any(step.startswith("copy") for step in since_decode)
                    rings = ALWAYS in p.schedule.layer_modes
                    done.append(memory_step(rng, ctx, refs, rings=rings, copying=copying))
                for seq, ref in enumerate(refs):
                    assert ctx.pos_max(seq) == ref.next_position - 1
            except Exception as error:
                raise AssertionError(f"{p}\nafter {done}") from error
