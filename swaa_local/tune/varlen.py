"""A schedule's attention as a few calls of flash attention for sequences of different lengths. What is hidden is free.

What a query sees is a union of parts that kernels know: all before it, a window, some first tokens. A part is a call,
and the parts of a query are put together by the logarithms of their sums, as flash attention puts its blocks together.
The backward pass of a call then gives that part's share of the gradient, if it is handed the whole output and sum: the
probabilities are those of the whole (as in Ring Attention, arXiv 2310.01889).

Relies on the two operators under PyTorch's `varlen_attn`, which take fewer heads of keys than of queries, give and are
given the logarithms of sums, and align masks at the last query and the last key. Knows nothing of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from swaa_local.schedule.config import LayerMode, Schedule

Texts: TypeAlias = Sequence[tuple[int, int]]
"""Of a row, one behind the other: how many tokens each has, and how many come before its first decoded one."""
_SINK_QUERIES = 2048
"""Queries of a sequence that sees the sinks alone: the backward pass takes a sequence's queries one after the other,
and sequences at once."""
_CAUSAL, _ALL = (-1, 0), (-1, -1)


@dataclass(frozen=True)
class Span:
    """Places in a row, from and to, of queries that see some keys."""

    queries: tuple[int, int]
    keys: tuple[int, int]


@dataclass(frozen=True)
class Call:
    """Sequences for one call of the kernel. queries, keys: their places, one sequence behind the other; cu_q, cu_k:
    (n_sequence + 1,) where each begins; max_q, max_k: the longest; window: tokens to the left and right of a query,
    -1 for no bound; adds: whether these queries have seen the keys of a call before."""

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    window: tuple[int, int]
    adds: bool


def n_windowed(mode: LayerMode, n_tokens: int, prompt_end: int) -> int:
    """How many of a text's queries see a window in a layer of this mode; those behind them see all before them."""
    return {LayerMode.FULL: 0, LayerMode.PREFILL: prompt_end, LayerMode.ALWAYS: n_tokens}[mode]


def calls_of(texts: Texts, mode: LayerMode, schedule: Schedule, device: Any) -> tuple[Call, ...]:
    """What a layer of this mode takes for a row of these texts."""
    causal: list[Span] = []
    windowed: list[Span] = []
    sinks: list[Span] = []
    start = 0
    for length, prompt_end in texts:
        slides = n_windowed(mode, length, prompt_end)
        if slides <= schedule.window:  # nothing is out of sight yet
            slides = 0
        else:
            first = min(schedule.sinks, slides)
            causal.append(Span((start, start + first), (start, start + first)))
            windowed.append(Span((start + first, start + slides), (start + first, start + slides)))
            sinks += [
                Span((start + i, start + min(i + _SINK_QUERIES, slides)), (start, start + first))
                for i in range(first, slides, _SINK_QUERIES)
            ]
        causal.append(Span((start + slides, start + length), (start, start + length)))
        start += length
    made = (
        _call(causal, _CAUSAL, device),
        _call(windowed, (schedule.window - 1, 0), device),
        _call(sinks, _ALL, device, adds=True),
    )
    return tuple(call for call in made if call is not None)


def _n(places: tuple[int, int]) -> int:
    return places[1] - places[0]


def _call(sequences: list[Span], window: tuple[int, int], device: Any, *, adds: bool = False) -> Call | None:
    some = [s for s in sequences if _n(s.queries) and _n(s.keys)]
    if not some:
        return None
    queries, keys = [s.queries for s in some], [s.keys for s in some]
    return Call(
        _places(queries, device),
        _places(keys, device),
        _starts(queries, device),
        _starts(keys, device),
        max(map(_n, queries)),
        max(map(_n, keys)),
        window,
        adds,
    )


def _places(ranges: list[tuple[int, int]], device: Any) -> slice | torch.Tensor:
    if all(one[1] == other[0] for one, other in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(*one, device=device) for one in ranges])


def _starts(ranges: list[tuple[int, int]], device: Any) -> torch.Tensor:
    lengths = torch.tensor([0, *map(_n, ranges)], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, calls: tuple[Call, ...], scale: float | None
) -> torch.Tensor:
    """(n, n_head, head_dim), of queries of that shape; key, value: (n, n_head_kv, head_dim). What no call has is 0."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    out: torch.Tensor = _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), calls, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: tuple[Call, ...],
        scale: float | None,
    ) -> torch.Tensor:
        out = torch.zeros_like(query)
        lse = query.new_full((query.shape[1], len(query)), -torch.inf, dtype=torch.float32)
        for call in calls:
            part, part_lse = _forward(query[call.queries], key[call.keys], value[call.keys], call, scale)
            if call.adds:
                before = lse[:, call.queries]
                share = (part_lse - before).sigmoid().T[..., None]
                part = out[call.queries].float().lerp(part.float(), share).to(out.dtype)
                part_lse = before.logaddexp(part_lse)
            out[call.queries] = part
            lse[:, call.queries] = part_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        of_query, of_keys = torch.zeros_like(query), [torch.zeros_like(x, dtype=torch.float32) for x in (key, value)]
        for call in ctx.calls:
            share, *shares = _backward(
                grad[call.queries],
                query[call.queries],
                key[call.keys],
                value[call.keys],
                out[call.queries],
                lse[:, call.queries],
                call,
                ctx.scale,
            )
            of_query[call.queries] = of_query[call.queries] + share if call.adds else share
            for total, share in zip(of_keys, shares, strict=True):
                if isinstance(call.keys, slice):
                    total[call.keys] += share
                else:  # several sequences may have the same keys
                    total.index_add_(0, call.keys, share.float())
        return of_query, *(total.to(key.dtype) for total in of_keys), None, None


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the logarithm of the sum (n_head, n_query) in float32."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        0.0,  # dropout
        call.window == _CAUSAL,
        False,  # nothing for debugging
        scale=scale,
        window_size_left=call.window[0],
        window_size_right=call.window[1],
    )
    return out, lse


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What this call's keys add to the gradients, given output and sum of all calls."""
    shares: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        query,
        key,
        value,
        out,
        lse.contiguous(),
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        0.0,
        call.window == _CAUSAL,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # the state of a dropout that is not
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=call.window[0],
        window_size_right=call.window[1],
    )
    return shares
