"""The contract of PyTorch's attention for sequences of different lengths, without its kernel, which needs a GPU.

Masks are aligned at the last query and the last key. The backward pass is handed output and sum, and trusts them, as
flash attention's does: they may be those of more keys than the call has.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from swaa_local.tune.varlen import Call


class PlainKernel:
    """Sequence after sequence, in plain PyTorch."""

    def __init__(self) -> None:
        self.pairs = 0
        """Of queries and keys that were in one sequence."""

    def _sequences(self, call: Call) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        queries, keys = call.cu_q.tolist(), call.cu_k.tolist()
        for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
            n_q, n_k = q1 - q0, k1 - k0
            assert 0 < n_q <= call.max_q
            assert 0 < n_k <= call.max_k
            left, right = call.window
            ahead = torch.arange(n_k)[None] - (torch.arange(n_q)[:, None] + n_k - n_q)
            seen = torch.ones(n_q, n_k, dtype=torch.bool)
            if left >= 0:
                seen &= ahead >= -left
            if right >= 0:
                seen &= ahead <= right
            self.pairs += int(seen.sum())
            yield slice(q0, q1), slice(k0, k1), seen

    @staticmethod
    def _scores(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float | None) -> torch.Tensor:
        scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
        return scores.masked_fill(~seen, -torch.inf)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, scale: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
        group = query.shape[1] // key.shape[1]
        for q, k, seen in self._sequences(call):
            keys, values = (x[k].double().repeat_interleave(group, 1) for x in (key, value))
            scores = self._scores(query[q].double(), keys, seen, scale)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
            lse[:, q] = scores.logsumexp(-1).float()
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        group = query.shape[1] // key.shape[1]
        for q, k, seen in self._sequences(call):
            keys, values = (x[k].double().repeat_interleave(group, 1) for x in (key, value))
            queries, given = query[q].double(), grad[q].double()
            chances = (self._scores(queries, keys, seen, scale) - lse[:, q, None]).exp()
            spread = torch.einsum("qhd,khd->hqk", given, values) - (given * out[q]).sum(-1).T[..., None]
            spread = chances * spread * (scale or query.shape[-1] ** -0.5)
            shares = (
                torch.einsum("hqk,khd->qhd", spread, keys),
                torch.einsum("hqk,qhd->khd", spread, queries).unflatten(1, (-1, group)).sum(2),
                torch.einsum("hqk,qhd->khd", chances, given).unflatten(1, (-1, group)).sum(2),
            )
            for total, share, places in zip(grads, shares, (q, k, k), strict=True):
                total[places] = share.to(total.dtype)
        return grads
