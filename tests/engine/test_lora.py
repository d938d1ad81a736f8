"""LoRA adapters under a schedule, against weights with the adapter merged in."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from tests.support.adapters import merged, write_adapter
from tests.support.engine import EngineContext, assert_close, worst_ratio
from tests.support.masks import Sched
from tests.support.reference_numpy import forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, TinyShape, random_tokens, tiny_weights

SCHEDULE = Sched(24, 4, (ALWAYS, FULL, PREFILL, PREFILL))
TOKENS = random_tokens(200)
SCALE = 0.25


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter file and the model's weights with it merged at SCALE."""
    weights = tiny_weights(TinyShape())
    path = write_adapter(tmp_path_factory.mktemp("lora") / "adapter.gguf", weights)
    return path, merged(weights, scale=SCALE)


def attach(ctx: EngineContext, adapter: int | None) -> None:
    adapters = (C.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(SCALE)
    assert C.llama_set_adapters_lora(ctx.ptr, adapters, 1 if adapter else 0, scales) == 0


def test_adapter_with_a_schedule(load_model, adapter):
    path, weights = adapter
    plain, adapted = forward(TOKENS, SCHEDULE, 180), forward(TOKENS, SCHEDULE, 180, weights=weights)
    assert worst_ratio(plain, adapted) > 0.2
    model = load_model(SCHEDULE)
    lora = C.llama_adapter_lora_init(model.ptr, str(path).encode())
    assert lora
    with model.context(flash="off", kv="F32", n_ubatch=32) as ctx:
        attach(ctx, lora)
        assert_close(ctx.run(TOKENS, 180), adapted, 1e-3, "attached")
        ctx.clear()
        attach(ctx, None)
        assert_close(ctx.run(TOKENS, 180), plain, 1e-3, "detached")
    with model.context(flash="on", n_ubatch=32) as ctx:
        attach(ctx, lora)
        assert_close(ctx.run(TOKENS, 180), adapted, 1e-2, "flash attention")
    C.llama_adapter_lora_free(lora)
