"""How long a context is: as the user says, if there is memory for it, and else as the model says or the memory allows.

Works on llama.cpp's parameter structs. Sizes are in `memory`; `llama` knows the moment, between model and context.
"""

from __future__ import annotations

import warnings
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.engine import log as engine_log
from swaa_local.engine import memory, placement
from swaa_local.model_file.model_info import read_model_info
from swaa_local.schedule.config import Schedule


class ContextFitWarning(UserWarning):
    """The model's own context does not fit the memory, so a shorter one was made."""


class TrainedLengthWarning(UserWarning):
    """The context is longer than what the model was trained on; beyond that, answers get worse or meaningless."""


def beyond_training(n_tokens: int, n_ctx_train: int | None) -> str | None:
    """What to tell a user who asks for more tokens than the model was trained on; None if it was trained on as many."""
    if not n_ctx_train or n_tokens <= n_ctx_train:
        return None
    return f"{n_tokens} tokens are more than the {n_ctx_train} that the model was trained on"


def shortened(n_ctx: int, n_ctx_train: int, option: str) -> str:
    """What to tell a user whose memory holds less than the model's own context. option: that chooses another."""
    return (
        f"the model's context of {n_ctx_train} tokens does not fit the free memory; using {n_ctx} "
        f"(pass {option} to choose)"
    )


def has_gpu(verbose: bool = False) -> bool:
    """Whether layers can go to a GPU. llama.cpp looks for its devices when first asked, and logs what it finds."""
    with engine_log.captured(verbose):
        return bool(_c.llama_supports_gpu_offload())


def gpu_layers(n_gpu_layers: int, *, workers: bool = False, verbose: bool = False) -> int:
    """Layers that go to the GPU of those wanted, as far as there are so many; 0 for a build or machine without one.

    workers: whether there are some, to which layers go as well.
    """
    if not (workers or has_gpu(verbose)):
        return 0
    return (1 << 30) if n_gpu_layers < 0 else n_gpu_layers


def choose_n_ctx(
    model: Any,
    n_ctx: int,
    schedule: Schedule | None,
    params: Any,
    model_params: Any,
    *,
    logits_all: bool,
) -> int:
    """Tokens of the context to be made: n_ctx, or for 0 the model's own, or the longest that the free memory holds.

    model: llama_cpp's `LlamaModel`. params: the `llama_context_params` to be, but for n_ctx. Warns with
    `ContextFitWarning` of a shorter context than the model's, and with `TrainedLengthWarning` of a longer one. Raises
    `ContextTooLarge`. To be called from the setter that upstream's constructor calls: the warnings name the line that
    made the `Llama`.
    """
    n_ctx_train: int = model.n_ctx_train()
    if n_ctx:
        check_memory(model, n_ctx, schedule, params, model_params)
        scaled = params.rope_freq_base or params.rope_freq_scale or params.rope_scaling_type > 0
        if not scaled and (said := beyond_training(n_ctx, n_ctx_train)):
            warnings.warn(said, TrainedLengthWarning, stacklevel=5)
        return n_ctx
    used = placement.of_params(model_params)
    n_ctx = memory.longest_n_ctx(
        model.model,
        schedule,
        params,
        n_ubatch=params.n_ubatch,
        n_gpu_layers=gpu_layers(model_params.n_gpu_layers, workers=bool(used)),
        used=used,
        logits_all=logits_all,
        mapped=model_params.load_mode != _c.LLAMA_LOAD_MODE_NONE,
    )
    if n_ctx < n_ctx_train:
        warnings.warn(shortened(n_ctx, n_ctx_train, "n_ctx"), ContextFitWarning, stacklevel=5)
    return n_ctx


def check_memory(model: Any, n_ctx: int, schedule: Schedule | None, params: Any, model_params: Any) -> None:
    """Raise `ContextTooLarge` for a context that the host's memory cannot hold. Arguments as in `choose_n_ctx`.

    Caches that are not plain ones, and take less than it seems, are let through.
    """
    most = memory.most_host_bytes()
    workers = bool(placement.of_params(model_params))
    on_gpu = gpu_layers(model_params.n_gpu_layers, workers=workers) if params.offload_kqv else 0
    cost = memory.context_cost(
        model.model, schedule, params, n_ubatch=params.n_ubatch, n_gpu_layers=on_gpu, logits_all=False
    )
    if most is None or cost.host_kv(n_ctx) <= most:
        return
    # The header tells more of the cache than the engine does, but takes a moment to read.
    info = read_model_info(model.path_model)
    if info.unsupported is None:
        known = {"n_ubatch": params.n_ubatch, "n_gpu_layers": on_gpu, "swa_full": bool(params.swa_full)}
        memory.check_fits(memory.header_cost(info, schedule, type_k=cost.type_k, type_v=cost.type_v, **known), n_ctx)
