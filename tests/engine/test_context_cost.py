"""What a context costs, worked out before it is made."""

from __future__ import annotations

import pytest

from swaa_local.engine.memory import ContextCost
from swaa_local.schedule.config import LayerMode, Schedule


@pytest.mark.parametrize("flash_attn", [True, False])
def test_a_ring_as_wide_as_the_context_costs_what_full_attention_does(flash_attn):
    """A file may give all layers a ring with a window of 2^30: it holds the whole context, and so does its mask."""

    def cost(schedule: Schedule) -> ContextCost:
        dims = (128,) * schedule.n_layer
        return ContextCost(schedule, dims, dims, "f16", "f16", n_head=4, n_ubatch=512, flash_attn=flash_attn)

    n_ctx = 1 << 20
    full, wide = Schedule.full(8), Schedule(1 << 30, 16, (LayerMode.ALWAYS,) * 8)
    assert cost(wide).host(n_ctx) == cost(full).host(n_ctx)
    narrow = Schedule(256, 16, (LayerMode.ALWAYS,) * 8)
    assert cost(narrow).host(n_ctx) < cost(full).host(n_ctx) / 100
    # The mask of a narrow ring is there too: f32 and f16, for each token of an ubatch.
    of_the_mask = 6 * 512 * narrow.ring_cells(n_ctx, n_ubatch=512) * (1 if flash_attn else 0)
    assert cost(narrow).host(n_ctx) >= cost(narrow).kv(n_ctx) + of_the_mask
