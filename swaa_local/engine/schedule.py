"""The schedule of a loaded model, in the engine: read it, replace it. Models are `llama_model_p`.

What a schedule is, `schedule.config` knows; when it may be changed, `llama`.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any, TypeAlias

from llama_cpp import llama_cpp as _c

from swaa_local.engine import log as engine_log
from swaa_local.engine import model_meta, native
from swaa_local.errors import ScheduleError
from swaa_local.model_file.layer_kinds import kv_of
from swaa_local.schedule.config import Schedule, SWAAConfig
from swaa_local.schedule.model_layers import LayerKind, ModelLayers

ScheduleArgument: TypeAlias = SWAAConfig | Schedule | bool | None
"""None: the file's schedule; False: full attention; True is refused."""


def check_schedule_argument(swaa: object) -> None:
    """Raise `ScheduleError` for what is no `ScheduleArgument`."""
    if swaa is not None and swaa is not False and not isinstance(swaa, (SWAAConfig, Schedule)):
        raise ScheduleError(f"swaa must be None, False or an SWAAConfig, not {swaa!r}")


_DRAFT_SINKS = 32


def apply_draft(model: Any, n_seen: int, *, verbose: bool) -> None:
    """Let contexts that are made from now on draft with n_seen tokens, some of them sinks; 0: not at all.

    Raises `ScheduleError` with the engine's reason.
    """
    sinks = min(_DRAFT_SINKS, n_seen // 8)
    with engine_log.captured(verbose) as log:
        code = native.llama_model_swaa_set_draft(model, n_seen - sinks, sinks)
    if code != 0:
        raise ScheduleError(log.reason or f"the engine cannot draft with {n_seen} tokens (code {code})")


def get_layers(model: Any) -> ModelLayers:
    """Which layers of the model can slide, and which read another one's KV cache."""
    told = [native.llama_model_swaa_layer(model, layer) for layer in range(max(1, _c.llama_model_n_layer(model)))]
    others = {-2: LayerKind.RECURRENT, -3: LayerKind.NO_ATTENTION}
    kinds = tuple(LayerKind.OWN_WINDOW if each > 0 else others.get(each, LayerKind.SLIDES) for each in told)
    arch = model_meta.text(model, "general.architecture") or ""
    has_window = [kind is LayerKind.OWN_WINDOW for kind in kinds]
    return ModelLayers(
        kinds, max(0, *told), kv_of(arch, has_window, lambda name: model_meta.number(model, f"{arch}.{name}"))
    )


def get_schedule(model: Any) -> Schedule | None:
    """The model's schedule; None for full attention."""
    n_layer = _c.llama_model_n_layer(model)
    window, sinks, modes = ctypes.c_uint32(), ctypes.c_uint32(), (ctypes.c_uint8 * max(1, n_layer))()
    if not native.llama_model_swaa_get(model, ctypes.byref(window), ctypes.byref(sinks), modes, n_layer):
        return None
    tail = int(native.llama_model_swaa_tail(model))
    schedule = Schedule(window.value, sinks.value, tuple(modes), tail, get_layers(model))
    return None if schedule.is_full else schedule


def resolve_schedule(model: Any, wanted: ScheduleArgument, of_file: Schedule | None) -> Schedule:
    """What is wanted, for this model's layers. Raises `ScheduleError`."""
    if wanted is None and of_file is not None:
        return of_file
    layers = get_layers(model)
    if isinstance(wanted, SWAAConfig):
        return wanted.schedule(layers)
    if isinstance(wanted, Schedule):
        return replace(wanted, model=layers)
    return Schedule.full(layers)


def apply_schedule(model: Any, wanted: ScheduleArgument, of_file: Schedule | None, *, verbose: bool) -> Schedule | None:
    """Make the model's schedule what is wanted, and return it. Contexts that exist keep theirs.

    Raises `ScheduleError` with the engine's reason, or if the schedule does not fit the number of layers.
    """
    wanted = resolve_schedule(model, wanted, of_file)
    if wanted != (get_schedule(model) or Schedule.full(wanted.model)):
        modes = (ctypes.c_uint8 * wanted.n_layer)(*wanted.layer_modes)
        with engine_log.captured(verbose) as log:
            code = native.llama_model_swaa_set(model, wanted.window, wanted.sinks, modes, wanted.n_layer)
            if code == 0 and not wanted.is_full:
                code = native.llama_model_swaa_set_tail(model, wanted.tail)
        if code != 0:
            raise ScheduleError(log.reason or f"the engine refused the schedule (code {code})")
    return get_schedule(model)
