"""What a context is estimated to cost, against the buffers that llama.cpp then has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C

from swaa_local.engine.memory import context_cost, header_cost
from swaa_local.engine.schedule import get_layers
from swaa_local.inspect.run import inspect_gguf
from swaa_local.model_file.model_info import read_model_info
from swaa_local.schedule.config import LayerMode, Schedule
from tests.support.engine import EngineModel
from tests.support.masks import Sched

N_CTX, N_UBATCH = 2048, 64
SEQUENCES: list[dict[str, Any]] = [{}, {"n_seq_max": 3}, {"n_seq_max": 3, "unified": True}]


def check_costs(path: Path, schedules: dict[str, Sched | None], *, apart: bool = True) -> None:
    """By the header and by the loaded model, for one sequence and several; `inspect` for one.

    apart: whether the model's sequences can have caches of their own.
    """
    info = read_model_info(path)
    for name, sched in schedules.items():
        with EngineModel(path, sched) as model:
            wanted = sched and Schedule(
                sched.window, sched.sinks, tuple(map(LayerMode, sched.layer_modes)), model=get_layers(model.ptr)
            )
            for sequences in SEQUENCES if apart else [SEQUENCES[0], SEQUENCES[2]]:
                has = _has(model, **sequences)
                by_header = header_cost(info, wanted, n_ubatch=N_UBATCH, **sequences)
                assert by_header.kv(N_CTX) == has, (name, sequences)
                if not sequences:
                    params = C.llama_context_default_params()
                    params.swa_full = False
                    by_model = context_cost(
                        model.ptr, wanted, params, n_ubatch=N_UBATCH, n_gpu_layers=0, logits_all=False
                    )
                    assert by_model.kv(N_CTX) == has, name
    full = inspect_gguf(path, n_ctx=N_CTX, n_ubatch=N_UBATCH).full
    assert full is not None
    with EngineModel(path) as model:
        model.set_schedule(Sched(1, 0, (0,) * info.n_layer))
        assert full.kv_bytes + full.state_bytes == _has(model)


def _has(model: EngineModel, **sequences: Any) -> int:
    with model.context(n_ctx=N_CTX, n_ubatch=N_UBATCH, swa_full=False, **sequences) as context:
        return context.kv_bytes()
