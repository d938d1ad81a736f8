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
from swaa_local.tune.masks import Masks, make_row, why_no_flash
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


def under_mask(query, key, value, mask):
    """PyTorch's own attention, whose masks test_masks.py holds against their definition."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def inputs(n: int, n_head: int, head_dim: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, 2 * n_head, head_dim), (n, n_head, head_dim), (n, n_head, head_dim))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in made]


def differences(texts, mode, schedule, device: str, dtype: torch.dtype, head_dim: int = 8) -> list[float]:
    """Of the output and the three gradients, against float64, in units of their largest value."""
    n = sum(length for length, _ in texts)
    masks = Masks("sdpa")
    masks.set(make_row([*texts, (0, 0)], n), schedule)  # two texts: never None
    given = inputs(n, 2, head_dim, device, dtype)
    query, key, value = exact = [x.detach().double().cpu().requires_grad_() for x in given]
    weights = torch.randn(n, 4, head_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = under_mask(query, key, value, masks.of_layer(0))
    (wanted * weights).sum().backward()
    query, key, value = given
    out = varlen.attention(query, key, value, varlen.calls_of(texts, mode, schedule, device), None)
    (out.double() * weights.to(device)).sum().backward()
    pairs = [(out, wanted), *((mine.grad, theirs.grad) for mine, theirs in zip(given, exact, strict=True))]
    return [float((a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("window", "sinks"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("mode", LayerMode)
def test_parts_give_what_the_mask_gives(plain, texts, window, sinks, mode):
    schedule = Schedule(window, sinks, (mode,))
    assert max(differences(texts, mode, schedule, "cpu", torch.float64)) < 1e-5


@pytest.mark.parametrize("mode", LayerMode)
def test_no_pair_is_computed_twice_or_in_vain(plain, mode):
    n, end, window, sinks = 400, 350, 24, 10
    masks, schedule = Masks("sdpa"), Schedule(window, sinks, (mode,))
    masks.set(make_row([(n, end), (0, 0)], n), schedule)
    with torch.no_grad():
        varlen.attention(
            *inputs(n, 2, 8, "cpu", torch.float64), varlen.calls_of([(n, end)], mode, schedule, "cpu"), None
        )
    assert plain.pairs == int(masks.of_layer(0).sum())


def test_padding_and_scale(plain):
    """What belongs to no text is zero, and gets no gradient."""
    query, key, value = given = inputs(100, 2, 8, "cpu", torch.float64)
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
            varlen.attention(*inputs(1600, 1, 8, "cpu", torch.float32), calls, None)
        counts.append(plain.pairs)
    assert counts[0] == 1600 * 1601 // 2
    assert counts[1] < 1600 * (64 + 4)


@pytest.mark.parametrize(("n_head", "n_head_kv", "head_dim"), [(14, 2, 64), (16, 8, 128), (4, 4, 96)])
def test_a_kernel_that_gives_what_the_mask_gives_is_taken(plain, n_head, n_head_kv, head_dim):
    assert why_no_flash("cpu", n_head, n_head_kv, head_dim) is None


@pytest.mark.parametrize("wrong", ["output", "sum", "gradient"])
def test_a_kernel_that_gives_something_else_is_not_taken(plain, monkeypatch, wrong):
    def forward(*args):
        out, lse = plain.forward(*args)
        return (out * 1.2 if wrong == "output" else out), (lse + 1 if wrong == "sum" else lse)

    def backward(*args):
        return tuple(grad * (1.2 if wrong == "gradient" else 1) for grad in plain.backward(*args))

    monkeypatch.setattr(varlen, "_forward", forward)
    monkeypatch.setattr(varlen, "_backward", backward)
    assert "other results than under a mask" in (why_no_flash("cpu", 4, 2, 64) or "")


def test_a_build_without_the_kernel_says_so():
    """PyTorch's own, on a device that has none."""
    why = why_no_flash("cpu", 4, 2, 64) or ""
    assert "cannot run it: " in why
    assert "_flash_attention_forward" in why


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no GPU here")
@pytest.mark.parametrize("texts", [[(5000, 4700)], [(3000, 2900), (900, 900), (2100, 0), (60, 40)]])
@pytest.mark.parametrize("mode", LayerMode)
def test_the_kernel_gives_what_the_mask_gives(texts, mode):
    schedule = Schedule(512, 100, (mode,))
    assert max(differences(texts, mode, schedule, "cuda", torch.bfloat16, head_dim=64)) < 0.02
