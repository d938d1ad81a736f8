"""How long a context is where the user does not say: the model's own length, or what the memory holds.

Works on llama.cpp's parameter structs. Sizes are in `memory`; `llama` knows the moment, between model and context.
"""

from __future__ import annotations

import warnings
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local import memory
from swaa_local.config import Schedule


class ContextFitWarning(UserWarning):
    """The model's own context does not fit the memory, so a shorter one was made."""


def wanted_gpu_layers(model_params: Any) -> int:
    """Layers that go to the GPU, as far as there are so many; 0 for a build without one."""
    wanted: int = model_params.n_gpu_layers if _c.llama_supports_gpu_offload() else 0
    return (1 << 30) if wanted < 0 else wanted


def fitting_n_ctx(
    model: Any, schedule: Schedule | None, params: Any, model_params: Any, *, n_ubatch: int, logits_all: bool
) -> int:
    """The model's own context in tokens, or with a `ContextFitWarning` the longest that the free memory holds.

    model: llama_cpp's `LlamaModel`. To be called from the setter that upstream's constructor calls: the warning names
    the line that made the `Llama`.
    """
    n_ctx_train: int = model.n_ctx_train()
    n_ctx = memory.longest_n_ctx(
        model.model,
        schedule,
        params,
        n_ubatch=n_ubatch,
        n_gpu_layers=wanted_gpu_layers(model_params),
        logits_all=logits_all,
        mapped=model_params.load_mode != _c.LLAMA_LOAD_MODE_NONE,
    )
    if n_ctx < n_ctx_train:
        warnings.warn(
            f"the model's context of {n_ctx_train} tokens does not fit the free memory; using {n_ctx} "
            "(pass n_ctx to choose)",
            ContextFitWarning,
            stacklevel=5,
        )
    return n_ctx
