"""Drafted tokens: a window of their own in every layer that keeps the whole text, exact, and gone without a trace."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.engine import GPU_LAYERS, EngineError, EngineModel, assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens

EXACT = 1e-3
TOKENS = random_tokens(420)
PROMPT = 300

FA_DECODE = Sched(24, 4, (PREFILL, FULL, PREFILL, PREFILL))
WITH_RING = Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS))
SCHEDULES = {"no schedule": None, "FA decode": FA_DECODE, "with a ring": WITH_RING}
DRAFTS = {"no schedule": (40, 6), "FA decode": (16, 0), "with a ring": (24, 4)}


@pytest.fixture
def model(tiny_model):
    with EngineModel(tiny_model) as made:
        yield made


def new_context(model: EngineModel, name: str, **kwargs):
    if (schedule := SCHEDULES[name]) is not None:
        model.set_schedule(schedule)
    model.set_draft(*DRAFTS[name])
    exact = {"flash": "off", "kv": "F32", "n_ctx": 1024, "n_batch": 256, "n_ubatch": 64}
    return model.context(**{**exact, **kwargs})


def drafted(reference: NumpyModel, name: str, tokens: list[int]) -> np.ndarray:
    """What the reference says to them if every layer that keeps the whole text sees the window of the drafts."""
    reference = reference.copy()
    modes = reference.schedule.layer_modes
    reference.schedule = Sched(*DRAFTS[name], tuple(ALWAYS if mode == ALWAYS else PREFILL for mode in modes))
    return reference.feed(tokens, decode=False)


@pytest.mark.parametrize("flash", ["off", "on"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_draft_and_what_follows_are_exact(model, name, flash):
    """Prompt, draft, the same tokens checked at once, another draft, a rejected one, and an answer."""
    schedule = SCHEDULES[name]
    tolerance = EXACT if flash == "off" else 0.02
    with new_context(model, name, flash=flash, kv="F32" if flash == "off" else "F16") as ctx:
        reference = NumpyModel(schedule)
        ctx.set_prompt_end(0, PROMPT)
        assert_close(ctx.feed(TOKENS[:PROMPT]), reference.feed(TOKENS[:PROMPT]), tolerance, "prompt")
        at = PROMPT
        for n, n_right in ((1, 1), (5, 5), (7, 2), (16, 0), (3, 3)):
            ctx.set_draft_start(0, at)
            tokens = TOKENS[at : at + n]
            assert_close(ctx.feed(tokens, chunk=1), drafted(reference, name, tokens), tolerance, ("draft", n))
            ctx.set_draft_start(0, -1)
            assert ctx.rm(0, at, -1)
            checked = reference.copy().feed(tokens, decode=True)
            assert_close(ctx.feed(tokens), checked, tolerance, ("check", n))
            assert ctx.rm(0, at + n_right, -1)
            if n_right:
                reference.feed(tokens[:n_right], decode=True)
            at += n_right
        rest = TOKENS[at:]
        assert_close(ctx.feed(rest, chunk=1), reference.feed(rest, decode=True), tolerance, "answer")


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_draft_nothing_changes(model, name):
    with new_context(model, name) as ctx:
        assert_close(ctx.run(TOKENS, PROMPT), forward(TOKENS, SCHEDULES[name], PROMPT), EXACT)


def test_a_draft_reads_no_more_than_its_window(model):
    """In every layer, also in those that are full; and the pass that checks it reads all.

    On the CPU it reads what the mask shows, where it is, and copies nothing; elsewhere it reads what was gathered.
    """
    with new_context(model, "FA decode", flash="on", kv="F16", record_nodes=True) as ctx:
        ctx.set_prompt_end(0, PROMPT)
        ctx.feed(TOKENS[:PROMPT])
        ctx.attention.clear()
        ctx.nodes.clear()
        ctx.set_draft_start(0, PROMPT)
        ctx.feed(TOKENS[PROMPT : PROMPT + 1])
        width = 256 if GPU_LAYERS else 512
        assert {(op.layer, op.n_kv) for op in ctx.attention} == {(layer, width) for layer in range(4)}
        windowed = [node for node in ctx.nodes if "attn_inp_win_mask" in node]
        assert [node.split()[0] for node in windowed] == ["FLASH_ATTN_EXT"] * 4
        copies = [node for node in ctx.nodes if node.startswith("GET_ROWS") and "cache_" in node]
        assert bool(copies) == bool(GPU_LAYERS)
        ctx.set_draft_start(0, -1)
        assert ctx.rm(0, PROMPT, -1)
        ctx.attention.clear()
        ctx.feed(TOKENS[PROMPT : PROMPT + 4])
        assert {(op.layer, op.n_kv) for op in ctx.attention} == {(layer, 512) for layer in range(4)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_graph_is_built_between_the_tokens_of_a_draft(model, name):
    """Nor for the next draft: passes that check have a graph of their own. One is where the cache grows by 256."""
    n = 8
    width = None
    tokens = random_tokens(560)
    with new_context(model, name, flash="on", kv="F16") as ctx:
        ctx.set_prompt_end(0, PROMPT)
        ctx.feed(tokens[:PROMPT])
        for at in range(PROMPT, len(tokens) - n, n // 2):
            ctx.set_draft_start(0, at)
            before = ctx.n_reused()
            ctx.feed(tokens[at : at + n], chunk=1)
            widths = [0 if GPU_LAYERS else (at + i) // 256 for i in range(n)]
            assert ctx.n_reused() - before == sum(a == b for a, b in zip([width, *widths], widths, strict=False)), at
            width = widths[-1]
            ctx.set_draft_start(0, -1)
            assert ctx.rm(0, at, -1)
            ctx.feed(tokens[at : at + n])
            assert ctx.rm(0, at + n // 2, -1)


def test_sequences_draft_by_themselves(model):
    """One drafts, one decodes and one reads its prompt, in one batch."""
    name = "FA decode"
    with new_context(model, name, n_seq_max=3, n_ctx=3 * 512) as ctx:
        references = [NumpyModel(FA_DECODE) for _ in range(3)]
        for seq, reference in enumerate(references):
            ctx.set_prompt_end(seq, 100 if seq < 2 else 200)
            assert_close(ctx.feed(TOKENS[:100], seq=seq), reference.feed(TOKENS[:100]), EXACT)
        ctx.set_draft_start(0, 100)
        batch = [(TOKENS[100], 100, 0), (TOKENS[100], 100, 1), *((TOKENS[100 + i], 100 + i, 2) for i in range(5))]
        got = ctx.decode(batch)
        assert_close(got[:1], drafted(references[0], name, TOKENS[100:101]), EXACT, "draft")
        assert_close(got[1:2], references[1].feed(TOKENS[100:101], decode=True), EXACT, "decode")
        assert_close(got[2:], references[2].feed(TOKENS[100:105]), EXACT, "prefill")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_state_does_not_know_of_drafts(model, name):
    """It is the one of a context that does not draft, and the other way round."""
    states = []
    for draft in (DRAFTS[name], (0, 0)):
        with new_context(model, name) as ctx:
            ctx.run(TOKENS[:PROMPT], PROMPT)
            states.append(ctx.state())
        model.set_draft(*draft)
    with new_context(model, name) as ctx:
        for state in states:
            ctx.load_state(state)
            ctx.set_prompt_end(0, PROMPT)
            want = forward(TOKENS[: PROMPT + 5], SCHEDULES[name], PROMPT)[PROMPT:]
            assert_close(ctx.feed(TOKENS[PROMPT : PROMPT + 5]), want, EXACT)
            ctx.clear()


def test_what_cannot_draft_says_so(model, tiny_model):
    with model.context() as ctx, pytest.raises(EngineError):
        ctx.set_draft_start(0, 1)
    with new_context(model, "FA decode") as ctx:
        with pytest.raises(EngineError, match="seq_id = 1"):
            ctx.set_draft_start(1, 1)
    with pytest.raises(EngineError, match="at most"):
        model.set_draft(2**30 + 1, 0)
