"""A schedule's keys for gguf-py's writer, in the child processes where upstream's converters run."""

from __future__ import annotations

from typing import Any

from swaa_local.model_file import schedule_keys as keys


def add_schedule(writer: Any, schedule: dict[str, Any]) -> None:
    """Add the keys. schedule: as of `Schedule.as_dict`."""
    import gguf

    writer.add_uint32(keys.KEY_VERSION, keys.SCHEDULE_VERSION)
    writer.add_uint32(keys.KEY_WINDOW, schedule["window"])
    writer.add_uint32(keys.KEY_SINKS, schedule["sinks"])
    if schedule["tail"]:
        writer.add_uint32(keys.KEY_TAIL, schedule["tail"])
    modes = schedule["layer_modes"]
    writer.add_key_value(keys.KEY_LAYER_MODES, modes, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
