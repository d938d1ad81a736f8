"""Random operations on a context against the numpy reference: what a caller may do with a memory, in any order.

Each seed draws a schedule, a context and a run of operations: batches of one or more sequences with any phases,
removed tails and middles, copies, context shift, saved and loaded states, aborted batches. After each, every logit has
to be the reference's. The engine may refuse what a ring no longer holds, never answer from less than the schedule sees.

More seeds: `SWAA_FUZZ_SEEDS=1000:1200 pytest tests/engine/test_fuzz.py`, and `-s` to see the operations.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from tests.support.engine import EngineContext, EngineError, EngineModel, assert_close, captured_log
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import ALWAYS, FULL, HEAD_DIM, N_VOCAB, PREFILL, TinyShape

N_LAYER = 2
N_OPERATIONS = 40
PARTIAL_ONLY, ON_DEVICE = 1, 2  # LLAMA_STATE_SEQ_FLAGS_*
# K and V type, flash attention, head size, tolerance in sigma. 64: a quantized cache is rotated (Hadamard)
CACHES = [("F32", "off", HEAD_DIM, 1e-3)] * 6 + [("F16", "on", HEAD_DIM, 2e-2)] * 3 + [("F16", "auto", HEAD_DIM, 2e-2)]
CACHES += [("Q8_0", "on", 64, 0.12)]

FOUND_DEFECTS = (38, 65, 76, 85, 112, 116, 126, 132)  # of an engine that passed the other tests
first, _, last = os.environ.get("SWAA_FUZZ_SEEDS", "").partition(":")
SEEDS = range(int(first), int(last)) if last else sorted({*range(12), *FOUND_DEFECTS})

Batch = list[tuple[int, int, tuple[int, ...]]]  # token, position, sequences


@dataclass
class Sequence:
    """What a sequence of the context should hold. `key`: sequences of one key hold the same cells."""

    ref: NumpyModel
    key: object = field(default_factory=object)
    prompt_end: int = -1

    @property
    def n(self) -> int:
        return self.ref.next_position


class Fuzz:
    def __init__(self, seed: int, load_model: Callable[..., EngineModel]) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.kv, flash, head_dim, self.tolerance = CACHES[rng.integers(len(CACHES))]
        self.schedule = Sched(
            window=int(rng.choice([1, 2, 5, 24, 60, 200])),
            sinks=int(rng.choice([0, 0, 3, 10, 80])),
            layer_modes=tuple(int(m) for m in rng.choice([FULL, PREFILL, ALWAYS, ALWAYS], N_LAYER)),
        )
        self.has_ring = ALWAYS in self.schedule.layer_modes
        self.n_seq = int(rng.choice([1, 2, 3]))
        self.unified = bool(rng.integers(2))
        self.shape = TinyShape(n_layer=N_LAYER, head_dim=head_dim)
        n_ubatch = int(rng.choice([1, 7, 32, 64, 200], p=[0.04, 0.16, 0.3, 0.3, 0.2]))
        n_ctx = int(rng.choice([256, 512, 1024], p=[0.2, 0.2, 0.6]))
        model = load_model(self.schedule, n_layer=N_LAYER, head_dim=head_dim)
        self.ctx = model.context(
            n_ctx=n_ctx * (1 if self.unified else self.n_seq),
            n_batch=256,
            n_ubatch=n_ubatch,
            flash=flash,
            kv=self.kv,
            n_seq_max=self.n_seq,
            unified=self.unified,
        )
        self.log: list[str] = []
        self.note(f"{self.schedule} n_ctx={n_ctx} n_ubatch={n_ubatch} {flash} {self.kv}")
        self.note(f"n_seq={self.n_seq} unified={self.unified}")
        self.seqs = [self.empty() for _ in range(self.n_seq)]
        self.n_max = n_ctx // (self.n_seq if self.unified else 1)  # tokens of a sequence
        self.states: list[tuple[bytes, list[Sequence]]] = []
        self.abort_after = -1
        self.refused = 0

        @C.ggml_abort_callback
        def abort(_data: Any) -> bool:
            self.abort_after -= self.abort_after > 0
            return self.abort_after == 0

        self._abort = abort
        C.llama_set_abort_callback(self.ctx.ptr, abort, None)

    def empty(self) -> Sequence:
        return Sequence(NumpyModel(self.schedule, shape=self.shape))

    def note(self, text: str) -> None:
        self.log.append(text)
        print("   ", text, flush=True)

    def pick(self) -> int:
        return int(self.rng.integers(self.n_seq))

    def run(self) -> None:
        operations = [
            (self.batch, 12), (self.prompt_end, 3), (self.remove_tail, 3), (self.remove_middle, 1),
            (self.remove_all, 1), (self.copy, 2), (self.copy_part, 2), (self.keep, 0.3), (self.shift, 3),
            (self.aborted_batch, 1), (self.save, 1), (self.load, 1), (self.move_sequence, 1), (self.rewind, 1),
        ]  # fmt: skip
        weights = np.array([w for _, w in operations], float)
        for i in self.rng.choice(len(operations), N_OPERATIONS, p=weights / weights.sum()):
            operations[i][0]()
            self.check_positions()
        for seq in range(self.n_seq):
            self.feed([seq], 3)

    def check_positions(self) -> None:
        for i, s in enumerate(self.seqs):
            assert self.ctx.pos_max(i) == s.n - 1, f"sequence {i}"

    # batches

    def entries(self) -> Batch:
        """A batch: some sequences, in turns or one after the other; equal ones may share their tokens."""
        chosen = self.rng.permutation(self.n_seq)[: self.rng.integers(1, self.n_seq + 1)]
        groups: list[tuple[int, ...]] = []
        for i in map(int, chosen):
            same = [g for g in groups if self.seqs[g[0]].key is self.seqs[i].key]
            if same and self.unified and self.rng.random() < 0.8:
                groups[groups.index(same[0])] += (i,)
            else:
                groups.append((i,))
        sizes = [int(self.rng.choice([1, 2, 9, 33, 70, 150])) for _ in groups]
        queues = []
        for group, size in zip(groups, sizes, strict=True):
            start = self.seqs[group[0]].n
            size = min(size, self.n_max - start, 256 // len(groups))
            queues.append([(int(self.rng.integers(6, N_VOCAB)), start + j, group) for j in range(size)])
        out: Batch = []
        in_turns = self.rng.integers(2)
        while queues := [q for q in queues if q]:
            q = queues[self.rng.integers(len(queues)) if in_turns else 0]
            out.append(q.pop(0))
        return out

    def expected(self, entries: Batch, n_tokens: dict[int, int] | None = None) -> np.ndarray:
        """Feed the reference; logits in the order of the batch. n_tokens: of each sequence in the whole batch."""
        n_of = n_tokens or {s: sum(s in group for _, _, group in entries) for s in range(self.n_seq)}

        def decodes(pos: int, group: tuple[int, ...]) -> bool:
            return all(pos >= e if (e := self.seqs[s].prompt_end) >= 0 else n_of[s] == 1 for s in group)

        want = np.empty((len(entries), N_VOCAB))
        for group in {g for _, _, g in entries}:
            rows = [i for i, (_, _, g) in enumerate(entries) if g == group]
            phases = [decodes(entries[i][1], group) for i in rows]
            key = object()
            for s in group:
                want[rows] = self.seqs[s].ref.feed([entries[i][0] for i in rows], decode=phases)
                self.seqs[s].key = key
        return want

    def batch(self) -> None:
        if entries := self.entries():
            self.note(f"batch {[(s, self.seqs[s].n, sum(s in g for _, _, g in entries)) for s in range(self.n_seq)]}")
            got = self.ctx.decode(entries)
            assert_close(got, self.expected(entries), self.tolerance)

    def feed(self, seqs: list[int], n: int) -> None:
        for s in seqs:
            n = min(n, self.n_max - self.seqs[s].n)
            if n <= 0:
                continue
            self.note(f"feed {s} {n}")
            entries: Batch = [(int(self.rng.integers(6, N_VOCAB)), self.seqs[s].n + j, (s,)) for j in range(n)]
            got = self.ctx.decode(entries)
            assert_close(got, self.expected(entries), self.tolerance, f"sequence {s}")

    def aborted_batch(self) -> None:
        """What was computed before stays and is right, the rest is gone."""
        entries = [e for e in self.entries() if len(e[2]) == 1]
        if not entries:
            return
        self.abort_after = int(self.rng.integers(1, 200))
        n_tokens = {s: sum(s in group for _, _, group in entries) for s in range(self.n_seq)}
        self.note(f"batch {n_tokens}, abort after {self.abort_after} nodes")
        try:
            got = self.ctx.decode(entries)
        except EngineError as error:
            if "llama_decode: 2\n" not in str(error):
                raise
            held = [self.ctx.pos_max(s) for s in range(self.n_seq)]
            self.note(f"aborted, {held}")
            before = [s.n - 1 for s in self.seqs]
            last = {g[0]: pos for _, pos, g in entries}
            assert all(before[s] <= held[s] <= last.get(s, before[s]) for s in range(self.n_seq))
            self.expected([e for e in entries if e[1] <= held[e[2][0]]], n_tokens)
        else:
            assert_close(got, self.expected(entries), self.tolerance)
        finally:
            self.abort_after = -1

    def prompt_end(self) -> None:
        s = self.pick()
        n = self.seqs[s].n
        end = int(self.rng.choice([-1, 0, n, n + 1, n + 20, max(0, n - 10), 1 << 30]))
        self.note(f"prompt end {s}: {end}")
        self.ctx.set_prompt_end(s, end)
        self.seqs[s].prompt_end = end

    # memory

    def removed(self, seq: int, p0: int, p1: int) -> bool:
        """llama_memory_seq_rm and the same of the reference; only a ring may refuse."""
        ok = self.ctx.rm(seq, p0, p1)
        self.note(f"remove {seq} {p0} {p1}: {ok}")
        assert ok or self.has_ring
        self.refused += not ok
        for s in range(self.n_seq) if seq < 0 else [seq]:
            if ok:
                if max(0, p0) < self.seqs[s].prompt_end < p1 < self.seqs[s].n:
                    self.seqs[s].prompt_end = max(0, p0)  # an end that falls into a hole is where the hole begins
                self.seqs[s].ref.remove(max(0, p0), p1 if p1 >= 0 else 1 << 30)
                if seq >= 0:
                    self.seqs[s].key = object()
        return ok

    def remove_tail(self) -> None:
        s = self.pick()
        n = self.seqs[s].n
        p0 = max(0, n - int(self.rng.choice([0, 1, 2, 15, 40, 120])))
        self.removed(s if self.rng.random() < 0.8 else -1, p0, int(self.rng.choice([-1, n, n + 5])))

    def remove_middle(self) -> None:
        s = self.pick()
        n = self.seqs[s].n
        if n > 4:
            p0 = int(self.rng.integers(0, n - 2))
            self.removed(s, p0, int(self.rng.integers(p0, n)))

    def remove_all(self) -> None:
        s = self.pick()
        if self.rng.integers(2):
            assert self.removed(s, int(self.rng.choice([-1, 0])), -1)
        else:
            self.note("clear")
            self.ctx.clear()
            for held in self.seqs:
                held.ref, held.key = self.empty().ref, object()

    def copy(self) -> None:
        a, b = self.pick(), self.pick()
        if a != b and 0 < self.seqs[a].n < self.n_max:
            assert self.removed(b, -1, -1)
            self.note(f"copy {a} {b}")
            self.ctx.cp(a, b)
            src = self.seqs[a]
            self.seqs[b] = Sequence(src.ref.copy(), src.key, src.prompt_end)
            if self.unified:
                self.batch()  # while they are equal, they may share tokens
            else:
                self.feed([b], 1)  # upstream copies the cells only now, and a state before would lack them

    def copy_part(self) -> None:
        """A ring may no longer hold the end of the part: then the copy must not be continued as if it did."""
        a, b = self.pick(), self.pick()
        n = self.seqs[a].n
        if a == b or not n or not self.unified:
            return
        assert self.removed(b, -1, -1)
        p1 = int(self.rng.integers(1, n + 1))
        self.note(f"copy {a} {b} up to {p1}")
        self.ctx.cp(a, b, 0, p1)
        ref = self.seqs[a].ref.copy()
        ref.remove(p1, 1 << 30)
        held = self.ctx.pos_max(b)
        self.seqs[b] = Sequence(ref, object(), self.seqs[a].prompt_end)
        if self.seqs[b].n == 0:
            self.ctx.rm(b, -1, -1)
            self.seqs[b] = self.empty()
            self.ctx.set_prompt_end(b, -1)
            return
        if held != self.seqs[b].n - 1:
            self.note(f"holds up to {held}")
            assert self.has_ring
        try:
            self.feed([b], 3)
        except EngineError:
            assert self.has_ring
            self.note("refused")
            self.refused += 1
            # whoever takes the memory's word for what it holds has to be right, too
            held = self.ctx.pos_max(b)
            self.seqs[b].ref.remove(held + 1, 1 << 30)
            if held >= 0 and self.seqs[b].n == held + 1:
                try:
                    self.feed([b], 3)
                except EngineError:
                    self.note("refused again")
                else:
                    return
            assert self.ctx.rm(b, -1, -1)
            self.seqs[b] = self.empty()
            self.ctx.set_prompt_end(b, -1)

    def keep(self) -> None:
        if self.unified:
            s = self.pick()
            self.note(f"keep {s}")
            self.ctx.keep(s)
            for other in range(self.n_seq):
                if other != s:
                    self.seqs[other].ref, self.seqs[other].key = self.empty().ref, object()

    def shift(self) -> None:
        """Context shift: remove a part and close the gap. Cells that sequences share would be moved for all."""
        s = self.pick()
        n = self.seqs[s].n
        if self.has_ring:
            assert not self.ctx.can_shift()
            return
        alone = all(other is self.seqs[s] or other.n == 0 for other in self.seqs)
        whole = len(self.seqs[s].ref.positions) == n
        if n < 10 or not whole or (self.unified and not alone):
            return
        p0 = int(self.rng.integers(0, n - 4))
        p1 = int(self.rng.integers(p0 + 1, n - 1))
        assert self.removed(s, p0, p1)
        self.note(f"shift {s} {p1} {n} by {p0 - p1}")
        end = self.seqs[s].prompt_end
        self.ctx.shift(s, p1, n if self.rng.integers(2) else -1, p0 - p1)
        self.seqs[s].ref.shift(p1, p0 - p1)
        if end >= 0:
            self.seqs[s].prompt_end = end - (p1 - p0) if end >= p1 else min(end, p0)
        self.feed([s], 1)  # upstream shifts the keys only now, and a state before would lack it

    # state

    def save(self) -> None:
        self.note("save")
        self.states.append((self.ctx.state(), [Sequence(s.ref.copy(), s.key) for s in self.seqs]))

    def load(self) -> None:
        """Prompt ends are the context's and not in the state."""
        if self.states:
            data, seqs = self.states[self.rng.integers(len(self.states))]
            self.note("load")
            self.ctx.load_state(data)
            ends = [s.prompt_end for s in self.seqs]
            self.seqs = [Sequence(s.ref.copy(), s.key, end) for s, end in zip(seqs, ends, strict=True)]

    def move_sequence(self) -> None:
        a, b = self.pick(), self.pick()
        if self.seqs[a].n:
            self.note(f"save {a}, load as {b}")
            self.ctx.load_state(self.ctx.state(a), b)
            self.seqs[b] = Sequence(self.seqs[a].ref.copy(), object(), self.seqs[b].prompt_end)

    def rewind(self) -> None:
        """A server's checkpoint: save what depends on the position, go on, come back."""
        s = self.pick()
        at = self.seqs[s].n
        if not at:
            return
        flags = int(self.rng.choice([0, PARTIAL_ONLY, ON_DEVICE, PARTIAL_ONLY | ON_DEVICE]))
        if self.kv == "Q8_0":  # upstream's states on the device take bytes for elements and lose 31 of 32 blocks
            flags &= ~ON_DEVICE
        self.note(f"checkpoint of {s} at {at}, flags {flags}")
        ref = self.seqs[s].ref.copy()
        size = C.llama_state_seq_get_size_ext(self.ctx.ptr, s, flags)
        data = (ctypes.c_uint8 * size)()
        assert C.llama_state_seq_get_data_ext(self.ctx.ptr, data, size, s, flags) == size
        n = int(self.rng.choice([0, 1, 30, 100]))
        if n and at + n < self.n_max:
            self.feed([s], n)
        with captured_log() as log:
            assert C.llama_state_seq_set_data_ext(self.ctx.ptr, data, size, s, flags), "".join(log)
        assert self.ctx.rm(s, at, -1)
        self.seqs[s].ref, self.seqs[s].key = ref, object()


@pytest.mark.parametrize("seed", SEEDS)
def test_random_operations(load_model, seed):
    with np.errstate(all="raise"):
        fuzz = Fuzz(seed, load_model)
        ctx: EngineContext = fuzz.ctx
        with ctx:
            try:
                fuzz.run()
            except (AssertionError, EngineError) as error:
                error.add_note("\n".join([f"seed {seed}:", *fuzz.log]))
                raise
