"""Phases by position, and several sequences side by side: each exact, whatever it shares a batch with."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.engine import assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

EXACT = 1e-3
FA_DECODE = Sched(24, 4, (PREFILL, FULL, PREFILL, PREFILL))
ALL_MODES = Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS))
SCHEDULES = {"FA decode": FA_DECODE, "all modes": ALL_MODES, "ring": Sched(24, 4, (ALWAYS,) * 4)}
TOKENS = random_tokens(260)


def test_automatic_phase_is_by_tokens_per_call(new_context):
    """A sequence's only token in a call is decoded, several are prefilled, wherever they stand."""
    ctx, ref = new_context(ALL_MODES), NumpyModel(ALL_MODES)
    for i, n in [(0, 100), (100, 1), (101, 1), (102, 50), (152, 1), (153, 2), (155, 1)]:
        assert_close(ctx.feed(TOKENS[i : i + n]), ref.feed(TOKENS[i : i + n], decode=n == 1), EXACT, (i, n))


def test_automatic_phase_looks_at_the_whole_call_not_the_ubatch(new_context):
    """65 tokens in ubatches of 32 leave an ubatch of one token, which is prefilled like the others."""
    ctx = new_context(ALL_MODES, n_ubatch=32)
    assert_close(ctx.feed(TOKENS[:65]), forward(TOKENS[:65], ALL_MODES), EXACT)


def test_a_prompt_end_makes_single_tokens_prefill(new_context):
    """Chunks of one token before the prompt end are prefilled, several tokens from it on in one call are decoded."""
    ctx = new_context(ALL_MODES)
    ctx.set_prompt_end(0, 150)
    got = [ctx.feed(TOKENS[:100]), ctx.feed(TOKENS[100:150], chunk=1), ctx.feed(TOKENS[150:200])]
    assert_close(np.concatenate(got), forward(TOKENS[:200], ALL_MODES, 150), EXACT)


@pytest.mark.parametrize("end", [0, 1, 97, 128, 199, 200])
def test_a_prompt_end_inside_a_call(new_context, end):
    """The batch is split where the phase changes."""
    ctx = new_context(ALL_MODES, n_ubatch=64)
    ctx.set_prompt_end(0, end)
    assert_close(ctx.feed(TOKENS[:200]), forward(TOKENS[:200], ALL_MODES, end), EXACT)


def test_a_later_turn_is_prefilled_again(new_context):
    """Prompt, answer, next prompt, next answer: keys and values already there are not recomputed."""
    ctx, ref = new_context(ALL_MODES), NumpyModel(ALL_MODES)
    got, want, at = [], [], 0
    for n_prompt, n_answer in ((90, 20), (40, 30), (1, 10)):
        ctx.set_prompt_end(0, at + n_prompt)
        got += [ctx.feed(TOKENS[at : at + n_prompt])]
        got += [ctx.feed(TOKENS[at + n_prompt : at + n_prompt + n_answer], chunk=1)]
        want += [ref.feed(TOKENS[at : at + n_prompt])]
        want += [ref.feed(TOKENS[at + n_prompt : at + n_prompt + n_answer], decode=True)]
        at += n_prompt + n_answer
    assert_close(np.concatenate(got), np.concatenate(want), EXACT)


def test_minus_one_makes_the_phase_automatic_again(new_context):
    ctx = new_context(ALL_MODES)
    ctx.set_prompt_end(0, 1000)
    got = [ctx.feed(TOKENS[:100])]
    ctx.set_prompt_end(0, -1)
    got += [ctx.feed(TOKENS[100:110], chunk=1)]
    assert_close(np.concatenate(got), forward(TOKENS[:110], ALL_MODES, 100), EXACT)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("flash", "kv", "tolerance"), [("off", "F32", EXACT), ("on", "F16", 1e-2)])
def test_prefill_beside_decode(new_context, name, unified, flash, kv, tolerance):
    """Sequence 0 decodes while 1 and 2 prefill in the same calls; every logit of each is its own reference's."""
    schedule = SCHEDULES[name]
    ctx = new_context(schedule, n_seq_max=3, unified=unified, n_ctx=3 * 1024, flash=flash, kv=kv)
    tokens = [random_tokens(n, seed=s) for s, n in ((1, 120), (2, 200), (3, 150))]
    ends = [100, 200, 110]
    got: list[list[np.ndarray]] = [[], [], []]
    for seq, end in enumerate(ends):
        ctx.set_prompt_end(seq, end)
    at = [100, 0, 0]
    got[0].append(ctx.feed(tokens[0][:100], seq=0))
    while any(a < len(t) for a, t in zip(at, tokens, strict=True)):
        step = [1, 37, 37 if at[2] < 74 else 36 if at[2] < 110 else 1]
        entries, owner = [], []
        for offset in range(max(step)):  # interleaved, as a server may send them
            for seq in (1, 0, 2):
                if offset < step[seq] and at[seq] + offset < len(tokens[seq]):
                    entries.append((tokens[seq][at[seq] + offset], at[seq] + offset, seq))
                    owner.append(seq)
        logits = ctx.decode(entries)
        for seq in range(3):
            got[seq].append(logits[np.array(owner) == seq])
            at[seq] = min(at[seq] + step[seq], len(tokens[seq]))
    for seq in range(3):
        assert_close(np.concatenate(got[seq]), forward(tokens[seq], schedule, ends[seq]), tolerance, f"sequence {seq}")


def test_automatic_phase_is_per_sequence(new_context):
    """In one call, the sequence with one token decodes and the other prefills."""
    ctx = new_context(ALL_MODES, n_seq_max=2, unified=True)
    refs = [NumpyModel(ALL_MODES), NumpyModel(ALL_MODES)]
    assert_close(ctx.feed(TOKENS[:100], seq=0), refs[0].feed(TOKENS[:100]), EXACT)
    other = random_tokens(60, seed=9)
    logits = ctx.decode([(t, i, 1) for i, t in enumerate(other)] + [(TOKENS[100], 100, 0)])
    assert_close(logits[-1:], refs[0].feed(TOKENS[100:101], decode=True), EXACT, "decoding")
    assert_close(logits[:-1], refs[1].feed(other), EXACT, "prefilling")


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_copied_sequences_go_their_own_ways(new_context, name, unified):
    """A copied prompt is continued differently by each; `keep` drops all but one; freed cells are used again."""
    schedule = SCHEDULES[name]
    ctx = new_context(schedule, n_seq_max=4, unified=unified, n_ctx=4 * 512)
    refs = [NumpyModel(schedule) for _ in range(3)]
    prompt = TOKENS[:200]
    got = ctx.feed(prompt, seq=0)
    for seq in (1, 2):
        ctx.cp(0, seq)
        assert ctx.pos_max(seq) == 199
    assert_close(got, refs[0].feed(prompt), EXACT)
    for ref in refs[1:]:
        ref.feed(prompt)
    tails = [random_tokens(60, seed=20 + s) for s in range(3)]
    for i in range(0, 60, 20):
        for seq in range(3):
            part = tails[seq][i : i + 20]
            assert_close(ctx.feed(part, seq=seq), refs[seq].feed(part), EXACT, f"sequence {seq}")
    if unified:
        ctx.keep(1)
    else:  # upstream's seq_keep looks at the stream of the kept sequence alone
        assert ctx.rm(0, -1, -1)
        assert ctx.rm(2, -1, -1)
    assert [ctx.pos_max(s) for s in range(3)] == [-1, 259, -1]
    more = random_tokens(50, seed=30)
    assert_close(ctx.feed(more, seq=1), refs[1].feed(more), EXACT)
    assert_close(ctx.feed(prompt, seq=2), forward(prompt, schedule), EXACT)


def test_tokens_of_several_sequences(new_context):
    """A prompt fed once for two sequences at a time (unified)."""
    ctx = new_context(ALL_MODES, n_seq_max=2, unified=True)
    refs = [NumpyModel(ALL_MODES), NumpyModel(ALL_MODES)]
    logits = ctx.decode([(t, i, (0, 1)) for i, t in enumerate(TOKENS[:90])])
    for seq, ref in enumerate(refs):
        assert_close(logits, ref.feed(TOKENS[:90]), EXACT)
        tail = random_tokens(30, seed=40 + seq)
        assert_close(ctx.feed(tail, seq=seq), ref.feed(tail), EXACT, f"sequence {seq}")


@pytest.mark.parametrize("unified", [True, False])
def test_rings_of_many_sequences_over_ten_lengths(new_context, unified):
    """Four sequences wrap their ring(s) in turns; none evicts another's window or sinks."""
    schedule = SCHEDULES["ring"]
    ctx = new_context(schedule, n_seq_max=4, unified=unified, n_ctx=4 * 1024)
    refs = [NumpyModel(schedule) for _ in range(4)]
    for step in range(8):
        for seq in range(4):
            part = random_tokens(70 + 13 * seq, seed=100 + 10 * step + seq)
            assert_close(ctx.feed(part, seq=seq), refs[seq].feed(part), EXACT, f"step {step}, sequence {seq}")


def test_an_idle_sequence_keeps_its_window(new_context):
    """One sequence waits while another goes twenty times round the unified ring."""
    schedule = SCHEDULES["ring"]
    ctx = new_context(schedule, n_seq_max=2, unified=True, n_ctx=8192)
    waiting, busy = NumpyModel(schedule), NumpyModel(schedule)
    assert_close(ctx.feed(TOKENS[:150], seq=0), waiting.feed(TOKENS[:150]), EXACT)
    for step in range(10):
        part = random_tokens(250, seed=step)
        assert_close(ctx.feed(part, seq=1), busy.feed(part), EXACT, f"busy, step {step}")
    assert_close(ctx.feed(TOKENS[150:200], seq=0), waiting.feed(TOKENS[150:200]), EXACT, "waiting")


@pytest.mark.parametrize("name", SCHEDULES)
def test_swapping_a_tail(new_context, name):
    """Prefix reuse as a server does it: drop the last tokens, put others, several times."""
    schedule = SCHEDULES[name]
    ctx, ref = new_context(schedule), NumpyModel(schedule)
    assert_close(ctx.feed(TOKENS[:120]), ref.feed(TOKENS[:120]), EXACT)
    for i in range(4):
        end = ctx.pos_max() + 1
        assert ctx.rm(0, end - 15, -1)
        ref.remove(end - 15, end)
        part = random_tokens(40, seed=50 + i)
        assert_close(ctx.feed(part), ref.feed(part), EXACT, f"turn {i}")
