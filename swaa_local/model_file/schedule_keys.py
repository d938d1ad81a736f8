"""The schedule in a GGUF's metadata: its keys, read and encoded (docs/architecture.md).

Reads headers only; the engine has the last word on a file."""

from __future__ import annotations

import os
from collections.abc import Callable

from swaa_local.errors import GGUFError
from swaa_local.model_file.check import describe_value
from swaa_local.model_file.header import GGUFFile, KeyValue, ValueType, encode_i32_array, encode_text, encode_u32
from swaa_local.model_file.model_info import model_info_of
from swaa_local.model_file.split import open_gguf
from swaa_local.schedule.choice import StoredSchedule
from swaa_local.schedule.config import MAX_TOKENS, LayerMode, Schedule
from swaa_local.schedule.model_layers import ModelLayers

KEY_PREFIX = "swaa."


KEY_VERSION = "swaa.version"


KEY_WINDOW = "swaa.window"


KEY_SINKS = "swaa.sinks"


KEY_LAYER_MODES = "swaa.layer_modes"
KEY_TAIL = "swaa.tail"
"""Optional; 0 where it is missing."""
KEY_CALIBRATION = "swaa.calibration"
"""Optional: what the schedule was found with, one line of JSON."""


SCHEDULE_VERSION = 1


def read_schedule(path: str | os.PathLike[str]) -> Schedule | None:
    """The schedule that a GGUF stores, or None.

    Raises `GGUFError` naming key and value for an unknown version, a missing key, a wrong type, W = 0, a mode above 2,
    one that a layer cannot have, or a number of modes that is not the model's number of layers.
    """
    with open_gguf(path) as file:
        return schedule_of(file)


def read_stored(path: str | os.PathLike[str]) -> StoredSchedule:
    """The schedule that a GGUF stores, and what it was found with. Raises `GGUFError`."""
    with open_gguf(path) as file:
        return stored_of(file)


def stored_of(file: GGUFFile) -> StoredSchedule:
    """`read_stored` for an open file."""
    return StoredSchedule(schedule_of(file), calibration_of(file))


def has_schedule_keys(file: GGUFFile) -> bool:
    """True if any `swaa.*` key is there, well-formed or not."""
    return any(key.startswith(KEY_PREFIX) for key in file.keys)


def schedule_of(file: GGUFFile) -> Schedule | None:
    """`read_schedule` for an open file."""
    return schedule_entries(file, lambda: model_info_of(file).layers) if has_schedule_keys(file) else None


def schedule_entries(file: GGUFFile, layers_of_model: Callable[[], ModelLayers] | None = None) -> Schedule:
    """The schedule as the keys say it, of a model or, without its layers, of an adapter; errors as of
    `read_schedule`."""

    def fail(what: str) -> GGUFError:
        return GGUFError(f"{file.path}: {what}; write the schedule again with swaa-local convert")

    def entry(key: str) -> KeyValue:
        if key not in file.keys:
            raise fail(f"key {key} is missing, though the file has other {KEY_PREFIX}* keys")
        return file.keys[key]

    def u32(key: str) -> int:
        found = entry(key)
        if found.type is not ValueType.U32:
            raise fail(f"{key} is {describe_value(file, found)}, expected a u32")
        return int(file.get(key))

    version = u32(KEY_VERSION)
    if version != SCHEDULE_VERSION:
        raise GGUFError(
            f"{file.path}: {KEY_VERSION} is {version}, but this program reads version {SCHEDULE_VERSION}; "
            "update swaa-local or write the schedule again with swaa-local convert"
        )
    window, sinks = u32(KEY_WINDOW), u32(KEY_SINKS)
    if not 1 <= window <= MAX_TOKENS:
        raise fail(f"{KEY_WINDOW} is {window}, expected 1 to {MAX_TOKENS}")
    if sinks > MAX_TOKENS:
        raise fail(f"{KEY_SINKS} is {sinks}, expected 0 to {MAX_TOKENS}")
    tail = u32(KEY_TAIL) if KEY_TAIL in file.keys else 0
    if tail > MAX_TOKENS:
        raise fail(f"{KEY_TAIL} is {tail}, expected 0 to {MAX_TOKENS}")

    found = entry(KEY_LAYER_MODES)
    if found.type is not ValueType.ARRAY or found.item_type is not ValueType.I32:
        raise fail(f"{KEY_LAYER_MODES} is {describe_value(file, found)}, expected an array of i32")
    model = layers_of_model() if layers_of_model else ModelLayers.of(found.n_items)
    if found.n_items != model.n_layer:
        raise fail(f"{KEY_LAYER_MODES} has {found.n_items} entries, but the model has {model.n_layer} layers")
    if not model.n_layer:
        raise fail(f"{KEY_LAYER_MODES} is empty")
    modes = []
    for layer, mode in enumerate(file.get(KEY_LAYER_MODES)):
        if not LayerMode.FULL <= mode <= LayerMode.ALWAYS:
            raise fail(
                f"{KEY_LAYER_MODES}[{layer}] is {mode}, expected 0 (full), 1 (window in prefill) or 2 (window always)"
            )
        modes.append(LayerMode(mode))
    if reason := model.refusal(modes):
        raise fail(f"{KEY_LAYER_MODES} has {reason}")
    return Schedule(window, sinks, tuple(modes), tail, model)


def calibration_of(file: GGUFFile) -> str | None:
    """What an open file's schedule was found with; None if it was not calibrated. Raises `GGUFError` for no text."""
    found = file.keys.get(KEY_CALIBRATION)
    if found is None:
        return None
    if found.type is not ValueType.STRING:
        raise GGUFError(f"{file.path}: {KEY_CALIBRATION} is {describe_value(file, found)}, expected a string")
    return str(file.get(KEY_CALIBRATION))


def encode_schedule(schedule: Schedule, calibration: str | None = None) -> list[bytes]:
    """The metadata entries, encoded; a tail and a calibration only where there is one."""
    entries = [
        encode_u32(KEY_VERSION, SCHEDULE_VERSION),
        encode_u32(KEY_WINDOW, schedule.window),
        encode_u32(KEY_SINKS, schedule.sinks),
        encode_i32_array(KEY_LAYER_MODES, [int(mode) for mode in schedule.layer_modes]),
    ]
    if schedule.tail:
        entries.append(encode_u32(KEY_TAIL, schedule.tail))
    if calibration is not None:
        entries.append(encode_text(KEY_CALIBRATION, calibration))
    return entries
