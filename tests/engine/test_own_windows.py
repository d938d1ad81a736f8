"""Models with sliding windows of their own, against numpy: the schedule acts on their other layers alone.

`test_parity_own` compares families of models with transformers; here are the caches: what they hold, drop and refuse.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cpp import llama_model_n_swa

from swaa_local import Llama, SWAAConfig
from swaa_local.engine.prefixes import cells_key, identity_of
from swaa_local.errors import ScheduleError
from swaa_local.schedule.model_layers import LayerKind
from tests.support.engine import EngineContext, EngineError, EngineModel, assert_close
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel
from tests.support.tiny import ALWAYS, FULL, PREFILL, TinyShape, random_tokens, with_own_windows

pytestmark = pytest.mark.usefixtures("engine")

EXACT, F16 = 1e-3, 2e-2
OWN = 20
HAS_WINDOW = (True, False, True, False)
WINDOWS = (OWN, 0, OWN, 0)
SHAPE = TinyShape(arch="qwen3moe", n_expert_used=TinyShape.n_expert)  # or a GPU's rounding chooses others at a tie
MODEL = with_own_windows(OWN, HAS_WINDOW) | {"n_expert_used": SHAPE.n_expert_used}
WINDOW, SINKS, N_UBATCH = 32, 4, 32
RING = 256  # cells of a ring of either kind: pad(32 + 4 + 32, 256), pad(20 + 32, 256)
CELL_BYTES = 2 * SHAPE.n_head_kv * SHAPE.head_dim * 2  # K and V of one layer, f16
SCHEDULES = {
    "FA decode": Sched(WINDOW, SINKS, (FULL, PREFILL, FULL, PREFILL), WINDOWS),
    "FA decode beside full": Sched(WINDOW, SINKS, (FULL, PREFILL, FULL, FULL), WINDOWS),
    "ring": Sched(WINDOW, SINKS, (FULL, ALWAYS, FULL, ALWAYS), WINDOWS),
    "ring beside FA decode": Sched(WINDOW, SINKS, (FULL, PREFILL, FULL, ALWAYS), WINDOWS),
    "narrower than the model's own": Sched(12, 2, (FULL, PREFILL, FULL, ALWAYS), WINDOWS),
}
NONE = Sched(1, 0, (FULL,) * 4, WINDOWS)
TOKENS = random_tokens(900)


@pytest.fixture
def new_context(tiny_model_factory):
    """`new_context(schedule or None, draft=(window, sinks), **EngineContext's keywords)`, exact by default."""
    path = tiny_model_factory(**MODEL)
    with ExitStack() as stack:

        def make(schedule: Sched | None, draft: tuple[int, int] | None = None, **kwargs: Any) -> EngineContext:
            model = stack.enter_context(EngineModel(path, schedule))
            if draft:
                model.set_draft(*draft)
            defaults = {"n_ctx": 2048, "n_batch": 256, "n_ubatch": N_UBATCH, "flash": "off", "kv": "F32"}
            return stack.enter_context(model.context(**{**defaults, "swa_full": False, **kwargs}))

        yield make


def reference(schedule: Sched | None) -> NumpyModel:
    return NumpyModel(schedule or NONE, shape=SHAPE)


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize(("flash", "kv", "tolerance"), [("off", "F32", EXACT), ("on", "F16", F16)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_long_after_the_rings_have_wrapped(new_context, name, flash, kv, tolerance, swa_full):
    ctx = new_context(SCHEDULES[name], flash=flash, kv=kv, swa_full=swa_full)
    want = reference(SCHEDULES[name]).feed(TOKENS, decode=np.arange(900) >= 860)
    assert_close(ctx.run(TOKENS, 860), want, tolerance)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_prefill_beside_decode(new_context, name, unified):
    """One sequence decodes while two prefill, in the same calls."""
    ctx = new_context(SCHEDULES[name], n_seq_max=3, unified=unified, n_ctx=3 * 1024)
    references = [reference(SCHEDULES[name]) for _ in range(3)]
    ctx.set_prompt_end(0, 300)
    assert_close(ctx.feed(TOKENS[:300], seq=0), references[0].feed(TOKENS[:300]), EXACT)
    texts = [random_tokens(400, seed=seq) for seq in range(3)]
    for seq in (1, 2):
        ctx.set_prompt_end(seq, 1000)
    for step in range(0, 390, 39):
        batch = [(texts[0][step // 39], 300 + step // 39, 0)]
        batch += [(texts[seq][step + i], step + i, seq) for i in range(39) for seq in (1, 2)]
        got = ctx.decode(batch)
        owner = np.array([seq for _, _, seq in batch])
        want = references[0].feed(texts[0][step // 39 : step // 39 + 1], decode=True)
        assert_close(got[owner == 0], want, EXACT, (step, "decoding"))
        for seq in (1, 2):
            want = references[seq].feed(texts[seq][step : step + 39])
            assert_close(got[owner == seq], want, EXACT, (step, seq))


@pytest.mark.parametrize("n_ubatch", [N_UBATCH, 512])
@pytest.mark.parametrize("swa_full", [False, True])
def test_prefill_reads_windows_alone(new_context, swa_full, n_ubatch):
    """The model's own too, whose cells are gathered as those of the schedule are; decode reads the whole text."""
    schedule = SCHEDULES["FA decode beside full"]
    sizes = {"n_ctx": 4096, "n_batch": 512, "n_ubatch": n_ubatch}
    tokens = random_tokens(2600)
    with new_context(schedule, flash="on", kv="F16", swa_full=swa_full, record=True, **sizes) as ctx:
        ctx.set_prompt_end(0, 2560)
        ctx.feed(tokens[:2048])
        ctx.attention.clear()
        ctx.feed(tokens[2048:2560])
        prefill = [max(op.n_kv for op in ctx.attention if op.layer == layer) for layer in range(4)]
        ctx.attention.clear()
        ctx.feed(tokens[2560:2600], chunk=1)
        decode = [max(op.n_kv for op in ctx.attention if op.layer == layer) for layer in range(4)]

    def padded(n: int) -> int:
        return -(-n // 256) * 256

    assert prefill[0] == prefill[2] == padded(OWN - 1 + n_ubatch)
    assert prefill[1] == padded(SINKS + WINDOW - 1 + n_ubatch)
    assert prefill[3] >= 2560
    assert decode[1] >= 2600
    assert decode[3] >= 2600
    held = 4096 if swa_full else padded(OWN + n_ubatch)
    assert decode[0] == decode[2] <= held


@pytest.mark.parametrize("swa_full", [False, True])
def test_memory(new_context, swa_full):
    """Windows of the model's own and of the schedule have rings; all cells where they are asked for."""
    own = 2048 if swa_full else RING
    for name, others in (("FA decode", 2 * 2048), ("ring", 2 * RING), ("ring beside FA decode", 2048 + RING)):
        ctx = new_context(SCHEDULES[name], kv="F16", swa_full=swa_full)
        assert ctx.kv_bytes() == (others + 2 * own) * CELL_BYTES
        assert ctx.has_ring() == (ALWAYS in SCHEDULES[name].layer_modes or not swa_full)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seq", [0, -1])
def test_removing_a_tail(new_context, name, seq):
    """As far as the windows that are left are held; further back it is refused, and nothing is lost by asking."""
    ctx, ref = new_context(SCHEDULES[name]), reference(SCHEDULES[name])
    ctx.feed(TOKENS[:700])
    ref.feed(TOKENS[:700])
    for p0 in (10, 300, 700 - RING):
        assert not ctx.rm(seq, p0, -1)
        assert ctx.pos_max() == 699
    assert ctx.rm(seq, 690, -1)
    ref.remove(690, 700)
    more = random_tokens(60, seed=2)
    assert_close(ctx.feed(more), ref.feed(more), EXACT)
    assert ctx.rm(seq, 0, -1)
    assert_close(ctx.feed(TOKENS[:300]), reference(SCHEDULES[name]).feed(TOKENS[:300]), EXACT)


def test_with_all_cells_any_tail_can_be_removed(new_context):
    ctx, ref = new_context(SCHEDULES["FA decode"], swa_full=True), reference(SCHEDULES["FA decode"])
    ctx.feed(TOKENS[:700])
    ref.feed(TOKENS[:700])
    assert (ctx.pos_min(), ctx.pos_max()) == (0, 699)
    assert ctx.rm(0, 100, -1)
    ref.remove(100, 700)
    assert_close(ctx.feed(TOKENS[200:400]), ref.feed(TOKENS[200:400]), EXACT)


def test_context_shift_needs_all_cells(new_context):
    keep, discard = 8, 200
    assert not new_context(SCHEDULES["FA decode"]).can_shift()
    assert not new_context(SCHEDULES["ring"], swa_full=True).can_shift()
    ctx, ref = new_context(SCHEDULES["FA decode"], swa_full=True), reference(SCHEDULES["FA decode"])
    assert ctx.can_shift()
    ctx.feed(TOKENS[:400])
    ref.feed(TOKENS[:400])
    assert ctx.rm(0, keep, keep + discard)
    ctx.shift(0, keep + discard, -1, -discard)
    ref.remove(keep, keep + discard)
    ref.shift(keep + discard, -discard)
    assert_close(ctx.feed(TOKENS[500:700]), ref.feed(TOKENS[500:700]), EXACT)


@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_states(new_context, name, swa_full, seq):
    source = new_context(SCHEDULES[name], swa_full=swa_full)
    ref = reference(SCHEDULES[name])
    source.feed(TOKENS)
    ref.feed(TOKENS)
    copy = new_context(SCHEDULES[name], swa_full=swa_full)
    assert copy.load_state(source.state(seq), seq=seq)
    assert copy.pos_max() == 899
    if seq == 0:  # it brings what the next token sees
        assert not copy.rm(0, 300, -1)
    more = random_tokens(80, seed=7)
    assert_close(copy.feed(more), ref.feed(more), EXACT, "prefill")
    assert_close(copy.feed(more[:1]), ref.feed(more[:1], decode=True), EXACT, "decode")


def test_states_of_another_schedule_are_refused(new_context):
    for here, there in ((SCHEDULES["FA decode"], None), (None, SCHEDULES["ring"]), (*list(SCHEDULES.values())[:2],)):
        source, target = new_context(here), new_context(there)
        source.feed(TOKENS[:100])
        with pytest.raises(EngineError, match=r"(?i)schedule|swaa"):
            target.load_state(source.state())
        target.clear()
        assert_close(target.feed(TOKENS[:300]), reference(there).feed(TOKENS[:300]), EXACT)


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("name", [*SCHEDULES, None])
def test_drafts_see_the_windows_that_there_are(new_context, name, swa_full):
    """Those of the drafts in layers that keep the whole text, else the ring's or the model's own."""
    schedule = SCHEDULES[name] if name else None
    modes = (schedule or NONE).layer_modes
    # The reference knows one window beside the model's own.
    draft = (schedule.window, schedule.sinks) if schedule and ALWAYS in modes else (16, 2)
    drafting = Sched(*draft, (FULL, PREFILL, FULL, ALWAYS if ALWAYS in modes else PREFILL), WINDOWS)
    ctx = new_context(schedule, draft=draft, swa_full=swa_full)
    ref = reference(schedule)
    ctx.set_prompt_end(0, 300)
    assert_close(ctx.feed(TOKENS[:300]), ref.feed(TOKENS[:300]), EXACT)
    at = 300
    for n, n_right in ((1, 1), (6, 6), (9, 3), (16, 0)):
        tokens = TOKENS[at : at + n]
        says = ref.copy()
        says.schedule = drafting
        ctx.set_draft_start(0, at)
        assert_close(ctx.feed(tokens, chunk=1), says.feed(tokens), EXACT, ("draft", n))
        ctx.set_draft_start(0, -1)
        assert ctx.rm(0, at, -1)
        assert_close(ctx.feed(tokens), ref.copy().feed(tokens, decode=True), EXACT, ("check", n))
        assert ctx.rm(0, at + n_right, -1)
        if n_right:
            ref.feed(tokens[:n_right], decode=True)
        at += n_right


@pytest.mark.parametrize("flash", ["on", "off"])
def test_no_buffer_grows_and_graphs_are_reused(new_context, flash):
    ctx = new_context(SCHEDULES["ring beside FA decode"], flash=flash, kv="F16", n_batch=N_UBATCH)
    ctx.set_prompt_end(0, 640)
    ctx.feed(TOKENS[:640])
    assert ctx.n_reused() >= 10
    before = ctx.n_reused()
    ctx.feed(TOKENS[640:700], chunk=1)
    assert ctx.n_reused() - before >= 50


def test_what_the_layers_are(tiny_model_factory):
    with EngineModel(tiny_model_factory(**MODEL)) as model:
        assert [model.layer(layer) for layer in range(-1, 5)] == [-1, OWN, 0, OWN, 0, -1]
    with EngineModel(tiny_model_factory()) as model:
        assert [model.layer(layer) for layer in range(4)] == [0] * 4


def test_n_swa_is_the_widest_window_that_drops(tiny_model_factory):
    """Servers ask it how far back they can go."""
    path = tiny_model_factory(**MODEL)
    for name, want in (("FA decode", OWN), ("ring", WINDOW), ("narrower than the model's own", OWN)):
        with EngineModel(path, SCHEDULES[name]) as model:
            assert llama_model_n_swa(model.ptr) == want


@pytest.mark.parametrize("mode", [PREFILL, ALWAYS])
def test_a_mode_for_a_layer_with_a_window_of_its_own_is_refused(tiny_model_factory, mode):
    """By name, from the file and through the C interface; the schedule stays as it was."""
    said = rf"swaa.layer_modes\[2\] = {mode}, but layer 2 has a window of its own \({OWN} tokens\) and cannot slide"
    bad = Sched(WINDOW, SINKS, (FULL, PREFILL, mode, FULL))
    with EngineModel(tiny_model_factory(**MODEL)) as model:
        model.set_schedule(SCHEDULES["ring"])
        with pytest.raises(EngineError, match=said):
            model.set_schedule(bad)
        assert model.get_schedule() == SCHEDULES["ring"]._replace(own=())
    with pytest.raises(EngineError, match=said):
        EngineModel(tiny_model_factory(**MODEL, schedule=bad))


def test_where_every_layer_has_a_window_of_its_own_none_can_slide(tiny_model_factory):
    path = tiny_model_factory(**with_own_windows(OWN, (True,) * 4))
    with EngineModel(path) as model:
        with pytest.raises(EngineError, match=rf"'mellum' has a window of its own \({OWN} tokens\) in every"):
            model.set_draft(16, 2)
    with pytest.raises(ScheduleError, match=rf"no layer of this model can slide: own window \({OWN} tokens\)"):
        Llama(str(path), swaa=SWAAConfig(WINDOW), n_ctx=256)


# The library on top


def test_a_config_leaves_windows_of_the_model_alone(tiny_model_factory):
    path = tiny_model_factory(**MODEL)
    llm = Llama(str(path), swaa=SWAAConfig(WINDOW, keep_first=SINKS, force_fa_decode=True), n_ctx=1024, n_threads=1)
    try:
        assert llm.schedule is not None
        assert llm.schedule.layer_modes == SCHEDULES["FA decode"].layer_modes
        assert llm.model_layers.kinds == (LayerKind.OWN_WINDOW, LayerKind.SLIDES) * 2
        assert llm.swaa == SWAAConfig(WINDOW, keep_first=SINKS, force_fa_decode=True)
        with pytest.raises(ScheduleError, match="force_fa_decode lists layer 2: layer 2 has a window of its own"):
            llm.set_schedule(SWAAConfig(WINDOW, force_fa_decode=[2]))
    finally:
        llm.close()


@pytest.mark.parametrize("swaa", [False, SWAAConfig(WINDOW, keep_first=SINKS, force_fa_decode=True)])
@pytest.mark.parametrize("swa_full", [None, False, True])
def test_prefixes_are_reused_where_they_are_whole(tiny_model_factory, swaa, swa_full):
    """Whether or not the windows still hold what a prefix needs, the answer is that of a cold prompt."""
    path = tiny_model_factory(**MODEL)
    options = {"n_ctx": 2048, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
    texts = [TOKENS[:600], TOKENS[:590], TOKENS[:100] + TOKENS[300:500], TOKENS[:120]]

    def answer(llm: Llama, text: list[int]) -> list[int]:
        return list(islice(llm.generate(text, temp=0.0), 8))

    warm = Llama(str(path), swaa=swaa, flash_attn=False, swa_full=swa_full, **options)
    try:
        for text in texts:
            cold = Llama(str(path), swaa=swaa, flash_attn=False, swa_full=swa_full, **options)
            want = answer(cold, text)
            cold.close()
            assert answer(warm, text) == want
    finally:
        warm.close()


@pytest.mark.parametrize("sampling", [{"temp": 0.0}, {"temp": 0.8, "top_k": 40}])
@pytest.mark.parametrize("modes", ["none", "FA decode", "ring beside FA decode"])
def test_drafts_change_no_token(tiny_model_factory, modes, sampling):
    path = tiny_model_factory(**MODEL)
    schedules: dict[str, Any] = {
        "none": False,
        "FA decode": SWAAConfig(WINDOW, keep_first=SINKS, force_fa_decode=True),
        "ring beside FA decode": SWAAConfig(WINDOW, keep_first=SINKS, force_fa_decode=[1]),
    }
    sizes = {"n_ctx": 2048, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "draft_window": 64}
    llm = Llama(str(path), swaa=schedules[modes], flash_attn=False, type_k=0, type_v=0, **sizes)
    try:

        def say(speculate: bool) -> list[int]:
            llm.reset()
            llm.set_seed(3)
            return list(islice(llm.generate(TOKENS[:400], speculate=speculate, **sampling), 60))

        plain = say(False)
        assert say(True) == plain
        assert llm.last_run is not None
        assert llm.last_run.accepted_tokens > 0
    finally:
        llm.close()


def test_states_can_be_cut_where_all_cells_are_kept_and_are_told_apart(tiny_model_factory):
    """Without a schedule llama-cpp-python keeps them; `swa_full=False` drops them."""
    path = tiny_model_factory(**MODEL)
    keys = {}
    for swa_full in (None, True, False):
        given = {} if swa_full is None else {"swa_full": swa_full}
        llm = Llama(str(path), swaa=False, n_ctx=512, n_threads=1, **given)
        assert llm.serves_whole == (swa_full is False)
        keys[swa_full] = cells_key(llm, identity_of(llm))
        llm.close()
    assert keys[None] == keys[True] != keys[False]
