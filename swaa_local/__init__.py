"""Sliding Window Attention Adaptation for local models, on a patched llama.cpp.

The names below are imported on first use, so that `import swaa_local` is instant and needs no engine: only `Llama`
loads llama-cpp-python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swaa_local.errors import ScheduleError, SWAAError
    from swaa_local.llama import Llama, PromptTooLong
    from swaa_local.model_file.schedule_keys import read_schedule
    from swaa_local.schedule.config import LayerMode, Schedule, SWAAConfig
    from swaa_local.schedule.presets import PRESETS, Preset

__all__ = [
    "PRESETS",
    "LayerMode",
    "Llama",
    "Preset",
    "PromptTooLong",
    "SWAAConfig",
    "SWAAError",
    "Schedule",
    "ScheduleError",
    "read_schedule",
]

_HOME = {
    "PRESETS": "schedule.presets",
    "LayerMode": "schedule.config",
    "Llama": "llama",
    "Preset": "schedule.presets",
    "PromptTooLong": "llama",
    "SWAAConfig": "schedule.config",
    "SWAAError": "errors",
    "Schedule": "schedule.config",
    "ScheduleError": "errors",
    "read_schedule": "model_file.schedule_keys",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] == "llama":
        # first, since it says in a sentence why the engine does not load
        importlib.import_module(f"{__name__}.engine.native")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
