"""The engine's logits against the numpy reference: every mode, batch split and attention path, at every position."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from tests.support.engine import GPU_LAYERS, GPU_TOLERANCE, assert_close, worst_ratio
from tests.support.masks import Sched
from tests.support.reference_numpy import NumpyModel, forward
from tests.support.tiny import ALWAYS, ARCHES, FULL, PREFILL, TinyShape, random_tokens

TOKENS = random_tokens(330)
PROMPT = 301

EXACT = 1e-3  # of sigma: flash attention off, F32 cache
F16 = 1e-2

SCHEDULES = {
    "full": Sched(24, 4, (FULL,) * 4),
    "naive window": Sched(24, 0, (ALWAYS,) * 4),
    "window with sinks": Sched(24, 4, (ALWAYS,) * 4),
    "FA decode": Sched(24, 4, (PREFILL,) * 4),
    "FA decode without sinks": Sched(24, 0, (PREFILL,) * 4),
    "FA decode, interleaved": Sched(24, 4, (PREFILL, FULL, PREFILL, FULL)),
    "ring, interleaved": Sched(24, 4, (FULL, ALWAYS, FULL, ALWAYS)),
    "all modes": Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS)),
    "no full layer, mixed": Sched(24, 4, (PREFILL, ALWAYS, ALWAYS, PREFILL)),
    "window of 1": Sched(1, 4, (PREFILL, ALWAYS, FULL, PREFILL)),
    "window above the ubatch": Sched(100, 8, (PREFILL, ALWAYS, PREFILL, ALWAYS)),
    "more sinks than window": Sched(10, 40, (ALWAYS, PREFILL, PREFILL, ALWAYS)),
}
SPLITS = [(512, 512), (128, 64), (32, 32), (64, 16), (7, 7)]


@functools.cache
def reference(name: str) -> np.ndarray:
    return forward(TOKENS, SCHEDULES[name], PROMPT)


def test_references_are_far_apart():
    """Any two schedules differ by far more than the tolerance, so a wrong mask cannot pass for the right one."""
    for a, b in itertools.combinations(SCHEDULES, 2):
        assert worst_ratio(reference(a), reference(b)) > 20 * F16, (a, b)


@pytest.mark.parametrize(("n_batch", "n_ubatch"), SPLITS, ids=lambda n: str(n))
@pytest.mark.parametrize("name", SCHEDULES)
def test_logits(load_model, name, n_batch, n_ubatch):
    model = load_model(SCHEDULES[name])
    for flash, kv, tolerance in (("off", "F32", EXACT), ("off", "F16", F16), ("on", "F16", F16)):
        with model.context(n_batch=n_batch, n_ubatch=n_ubatch, flash=flash, kv=kv) as ctx:
            assert_close(ctx.run(TOKENS, PROMPT), reference(name), tolerance, (flash, kv))


@pytest.mark.parametrize("kv", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_quantized_cache(load_model, name, kv):
    """In root mean square, of the size of the error that a quantized cache gives full attention.

    A narrow window averages over fewer values than full attention, so it keeps up to three times as much of it. Every
    other schedule's reference is further from the logits than their own.
    """

    def run(schedule_name: str) -> np.ndarray:
        with load_model(SCHEDULES[schedule_name]).context(n_batch=128, n_ubatch=32, flash="on", kv=kv) as ctx:
            return ctx.run(TOKENS, PROMPT)

    def rms_error(got: np.ndarray, schedule_name: str) -> float:
        return float(np.sqrt(((got - reference(schedule_name)) ** 2).mean()))

    got = run(name)
    assert 0 < rms_error(got, name) < 3 * rms_error(run("full"), "full")
    assert all(rms_error(got, name) < rms_error(got, other) / 1.5 for other in SCHEDULES if other != name)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", ["all modes", "FA decode, interleaved", "window with sinks"])
def test_architectures(load_model, arch, name):
    want = forward(TOKENS, SCHEDULES[name], PROMPT, shape=TinyShape(arch=arch))
    for flash, kv, tolerance in (("off", "F32", EXACT), ("on", "F16", F16)):
        with load_model(SCHEDULES[name], arch=arch).context(n_batch=64, n_ubatch=16, flash=flash, kv=kv) as ctx:
            assert_close(ctx.run(TOKENS, PROMPT), want, tolerance, flash)


@pytest.mark.parametrize("n_head_kv", [3, 7, 16, 32])
def test_rows_of_the_cache_of_every_width(load_model, n_head_kv):
    """A cell's keys are gathered as one row, of as many elements as all its heads have: 192 to 2048, and in F32 too."""
    dims = {"n_layer": 2, "n_head": n_head_kv, "n_head_kv": n_head_kv, "head_dim": 64}
    schedule = Sched(24, 4, (PREFILL, ALWAYS))
    want = forward(TOKENS, schedule, PROMPT, shape=TinyShape(**dims))
    assert worst_ratio(want, forward(TOKENS, Sched(24, 4, (FULL, FULL)), PROMPT, shape=TinyShape(**dims))) > 20 * F16
    for kv in ("F16", "F32"):
        with load_model(schedule, **dims).context(n_batch=64, n_ubatch=64, flash="on", kv=kv) as ctx:
            assert_close(ctx.run(TOKENS, PROMPT), want, F16, kv)


def test_flash_attention_auto(load_model):
    """`auto` settles for the flash path and gives the same logits as `on`, on the CPU to the bit."""
    model = load_model(SCHEDULES["all modes"])
    with model.context(flash="auto", n_ubatch=64) as auto, model.context(flash="on", n_ubatch=64) as on:
        got, want = auto.run(TOKENS, PROMPT), on.run(TOKENS, PROMPT)
    assert_close(got, want, GPU_TOLERANCE) if GPU_LAYERS else np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["full", "FA decode", "all modes"])
@pytest.mark.parametrize("params", [{"rope_freq_base": 500.0}, {"rope_freq_scale": 0.25}], ids=["base", "scale"])
def test_rope_set_at_run_time(load_model, name, params):
    """Windowed layers rotate as all others do, also when the context changes RoPE's base or scale."""
    want = NumpyModel(
        SCHEDULES[name], rope_base=params.get("rope_freq_base"), rope_scale=params.get("rope_freq_scale", 1.0)
    ).feed(TOKENS, decode=np.arange(len(TOKENS)) >= PROMPT)
    assert worst_ratio(want, reference(name)) > 20 * F16
    with load_model(SCHEDULES[name]).context(flash="off", kv="F32", n_ubatch=64, **params) as ctx:
        assert_close(ctx.run(TOKENS, PROMPT), want, EXACT)
