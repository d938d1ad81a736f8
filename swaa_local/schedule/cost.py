"""What attention costs: cells of a KV cache, their bytes, and query-key pairs. Arithmetic of one layer;
`config.Schedule` knows a whole model's.
"""

from __future__ import annotations

from swaa_local.errors import ScheduleError, SWAAError

# llama.cpp pads contexts and rings to this number of cells.
CELL_PADDING = 256


# KV cache types by llama.cpp's names: (elements in a block, bytes of a block).
KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
}


def full_cells(n_ctx: int, *, n_seq_max: int = 1, unified: bool = False) -> int:
    """Cells of a full layer's KV cache, per stream (llama-context.cpp pads the context and each sequence's share)."""
    if n_ctx < 1:
        raise ScheduleError(f"a context has at least 1 token, not {n_ctx}")
    cells = pad_cells(n_ctx)
    return cells if unified else pad_cells(cells // n_seq_max)


def kv_bytes(cells: int, n_embd_k: int, n_embd_v: int, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes of one layer's K and V for `cells` cells of n_head_kv * head_dim elements each."""
    return cells * (_row_bytes(n_embd_k, type_k) + _row_bytes(n_embd_v, type_v))


def _row_bytes(n_elements: int, kv_type: str) -> int:
    try:
        block, size = KV_TYPES[kv_type.lower()]
    except KeyError:
        raise SWAAError(f"unknown KV cache type {kv_type!r}; known are {', '.join(KV_TYPES)}") from None
    if n_elements % block:
        raise SWAAError(f"KV cache type {kv_type} needs rows of a multiple of {block} elements, not {n_elements}")
    return n_elements // block * size


def full_pairs(n_tokens: int) -> int:
    """Visible query-key pairs of causal full attention over `n_tokens`."""
    return n_tokens * (n_tokens + 1) // 2


def window_keys(position: int, window: int, sinks: int) -> int:
    """Keys that the query at `position` sees through the window: p0 <= p1 and (p1 - p0 < W or p0 < k)."""
    return min(position + 1, window + min(sinks, max(0, position + 1 - window)))


def window_pairs(n_tokens: int, window: int, sinks: int) -> int:
    """Sum of `window_keys` over positions 0 to n_tokens - 1."""
    inside = min(n_tokens, window)
    outside = n_tokens - inside
    # Past the window a query sees W keys and the sinks that the window has left behind: 1, 2, ... up to k.
    growing = min(outside, sinks)
    return full_pairs(inside) + outside * window + full_pairs(growing) + (outside - growing) * sinks


def pad_cells(cells: int) -> int:
    return -(-cells // CELL_PADDING) * CELL_PADDING
