"""Attention in parts against attention under a mask: outputs and gradients.

A CPU has no flash attention for sequences of different lengths, so `PlainKernel` stands in there. On a GPU the kernel
itself runs.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")

import torch

from swaa_local import LayerMode, Schedule
from swaa_local.tune import varlen
from tests.support.masks import Sched, layer_masks
from tests.support.plain_varlen import PlainKernel

FULL, PREFILL, ALWAYS = LayerMode
TEXTS = {
    "one text": [(300, 260)],
    "answers only at the end": [(300, 299)],
    "nothing decoded": [(300, 300)],
    "packed": [(150, 120), (7, 7), (69, 0), (90, 61)],
    "shorter than the window": [(20, 10), (24, 24), (25, 25)],
}
SCHEDULES = {
    "sinks": (24, 10),
    "no sinks": (24, 0),
    "more sinks than window": (8, 30),
    "one token": (1, 1),
    "wide": (1000, 4),
}


@pytest.fixture
def plain(monkeypatch) -> PlainKernel:
    kernel = PlainKernel()
    monkeypatch.setattr(varlen, "_forward", kernel.forward)
    monkeypatch.setattr(varlen, "_backward", kernel.backward)
    monkeypatch.setattr(varlen, "_SINK_QUERIES", 50)
    return kernel


def by_definition(query, key, value, texts, schedule, scale=None):
    """Softmax over what each query sees, text after text, in float64."""
    group, out, start = query.shape[1] // key.shape[1], [], 0
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    for n, end in texts:
        here = slice(start, start + n)
        seen = layer_masks(Sched(schedule.window, schedule.sinks, schedule.layer_modes), n, end)[0]
        scores = torch.einsum("qhd,khd->hqk", query[here], key[here]) * (scale or query.shape[-1] ** -0.5)
        chances = scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", chances, value[here]))
        start += n
    return torch.cat(out)


def inputs(n: int, heads: tuple[int, int], head_dim: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """heads: of queries, of keys and values."""
    generator = torch.Generator().manual_seed(n)
    made = [torch.randn(n, n_head, head_dim, generator=generator, dtype=torch.float64) for n_head in (*heads, heads[1])]
    return [x.to(device, dtype).requires_grad_() for x in made]


def differences(texts, mode, schedule, device: str, dtype: torch.dtype, heads=(4, 2), head_dim: int = 8) -> list[float]:
    """Of the output and the three gradients, against the definition, in units of their largest value."""
    n = sum(length for length, _ in texts)
    query, key, value = given = inputs(n, heads, head_dim, device, dtype)
    weights = torch.randn(n, heads[0], head_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = varlen.attention(query, key, value, varlen.calls_of(texts, mode, schedule, device), None)
    assert out.dtype == dtype
    (out.double() * weights.to(device)).sum().backward()
    query, key, value = exact = [x.detach().double().cpu().requires_grad_() for x in given]
    wanted = by_definition(query, key, value, texts, schedule)
    (wanted * weights).sum().backward()
    pairs = [(out, wanted), *((mine.grad, theirs.grad) for mine, theirs in zip(given, exact, strict=True))]
    return [float((a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("window", "sinks"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("mode", LayerMode)
def test_parts_give_what_the_definition_gives(plain, texts, window, sinks, mode):
    schedule = Schedule(window, sinks, (mode,))
    assert max(differences(texts, mode, schedule, "cpu", torch.float64)) < 1e-5


@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_share_keys_and_types_are_kept(plain, heads, dtype):
    for texts in TEXTS.values():
        off = differences(texts, PREFILL, Schedule(24, 10, (PREFILL,)), "cpu", dtype, heads, head_dim=16)
        assert max(off) < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_decides_the_type(plain):
    """What is normalized in float32 goes through the kernel as the weights' products do; gradients come back as they
    went in."""
    query, key, value = given = inputs(300, (4, 2), 16, "cpu", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = varlen.attention(
            query, key, value, varlen.calls_of([(300, 260)], PREFILL, Schedule(24, 10, (PREFILL,)), "cpu"), None
        )
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert [x.grad.dtype for x in given if x.grad is not None] == [torch.float32] * 3


def test_what_needs_no_gradient_gets_none(plain):
    query, key, value = inputs(300, (4, 2), 8, "cpu", torch.float32)
    calls = varlen.calls_of([(300, 260)], PREFILL, Schedule(24, 10, (PREFILL,)), "cpu")
    varlen.attention(query, key.detach(), value.detach(), calls, None).sum().backward()
    assert query.grad is not None
    assert (key.grad, value.grad) == (None, None)


@pytest.mark.parametrize("mode", LayerMode)
def test_no_pair_is_computed_twice_or_in_vain(plain, mode):
    n, end, window, sinks = 400, 350, 24, 10
    schedule = Schedule(window, sinks, (mode,))
    with torch.no_grad():
        varlen.attention(
            *inputs(n, (4, 2), 8, "cpu", torch.float64), varlen.calls_of([(n, end)], mode, schedule, "cpu"), None
        )
    assert plain.pairs == layer_masks(Sched(window, sinks, (mode,)), n, end)[0].sum()


def test_padding_and_scale(plain):
    """What belongs to no text is zero, and gets no gradient."""
    query, key, value = given = inputs(100, (4, 2), 8, "cpu", torch.float64)
    calls = varlen.calls_of([(60, 50)], PREFILL, Schedule(16, 4, (PREFILL,)), "cpu")
    out = varlen.attention(*given, calls, 0.7)
    out.sum().backward()
    assert not out[60:].any()
    assert not any(x.grad[60:].any() for x in given)
    assert value.grad[:60].abs().min() > 0
    scaled = varlen.attention(query * 0.7 * 8**0.5, key, value, calls, None)
    torch.testing.assert_close(scaled, out)


def test_windows_make_few_pairs(plain):
    """What makes windowed layers cheaper."""
    counts = []
    for mode in (FULL, ALWAYS):
        plain.pairs = 0
        with torch.no_grad():
            calls = varlen.calls_of([(1600, 1600)], mode, Schedule(64, 4, (mode,)), "cpu")
            varlen.attention(*inputs(1600, (2, 1), 8, "cpu", torch.float32), calls, None)
        counts.append(plain.pairs)
    assert counts[0] == 1600 * 1601 // 2
    assert counts[1] < 1600 * (64 + 4)


def test_pytorchs_operators_take_the_calls():
    """Their arguments and shapes alone: the meta device computes nothing."""
    query, key, value = given = [
        torch.empty(300, n_head, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for n_head in (14, 2, 2)
    ]
    calls = varlen.calls_of([(200, 150), (100, 100)], PREFILL, Schedule(24, 10, (PREFILL,)), "meta")
    assert [call.adds for call in calls] == [False, False, True]
    out = varlen._Attention.apply(query, key, value, calls, None)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    out.sum().backward()
    assert [x.grad.shape for x in given if x.grad is not None] == [x.shape for x in given]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize(("heads", "head_dim"), [((14, 2), 64), ((9, 3), 64), ((16, 8), 128), ((4, 4), 96)])
@pytest.mark.parametrize("texts", [[(5000, 4700)], [(3000, 2900), (900, 900), (2100, 0), (60, 40)]])
@pytest.mark.parametrize("mode", LayerMode)
def test_the_kernel_gives_what_the_definition_gives(texts, mode, heads, head_dim):
    schedule = Schedule(512, 100, (mode,))
    assert max(differences(texts, mode, schedule, "cuda", torch.bfloat16, heads, head_dim)) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize(("window", "sinks"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
def test_the_kernel_takes_parts_of_all_sizes(texts, window, sinks):
    """Of one token too, where PyTorch goes other ways."""
    for mode in (PREFILL, ALWAYS):
        off = differences(texts, mode, Schedule(window, sinks, (mode,)), "cuda", torch.bfloat16, (14, 2), 64)
        assert max(off) < 0.02
