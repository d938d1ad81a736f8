"""What a conversation's model was run with, so that it can be run so again: plain data.

Knows what was asked for and what differs; how a model is opened, `opening` knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from swaa_local.chat.settings import Settings
from swaa_local.engine.options import ROPE_SCALES, ROPE_SCALINGS
from swaa_local.errors import ScheduleError
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.cost import KV_TYPES
from swaa_local.schedule.text import in_one_line

_CHOSEN_ELSEWHERE = "system"  # a setting that is a part of the conversation itself


@dataclass(frozen=True)
class Setup:
    """What was asked for; None where nothing was. Counts are tokens.

    model_id, lora_id: fingerprints of the files, "" where they could not be read. schedule: the model's while it is not
    turned off; None if it has none. full: it is turned off. settings: those that somebody chose.
    """

    model_id: str = ""
    lora: str | None = None
    lora_scale: float = 1.0
    lora_id: str = ""
    schedule: Schedule | None = None
    full: bool = False
    n_ctx: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    flash_attn: bool | None = None
    type_k: str | None = None
    type_v: str | None = None
    rope_scaling: str | None = None
    rope_scale: float | None = None
    yarn_orig_ctx: int | None = None
    settings: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return data | {
            "schedule": self.schedule.as_dict() if self.schedule else None,
            "settings": dict(self.settings or {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setup:
        """The other way. Raises ValueError and TypeError for what `as_dict` does not write."""
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        default = cls()
        for name, value in known.items():
            kinds = _KINDS.get(name, (type(getattr(default, name)),))
            if name != "schedule" and type(value) not in kinds:
                raise TypeError(f"{name} is {value!r}")
            if value is not None and value not in _CHOICES.get(name, (value,)):
                raise ValueError(f"{name} is {value!r}")
            if name == "rope_scale" and value is not None and not ROPE_SCALES[0] <= value <= ROPE_SCALES[1]:
                raise ValueError(f"{name} is {value!r}")
        if (schedule := known.get("schedule")) is not None:
            try:
                known["schedule"] = Schedule(**schedule)
            except ScheduleError as error:
                raise ValueError(str(error)) from None
        return cls(**known | {"settings": _settings(known.get("settings") or {})})

    def differences(self, before: Setup) -> list[str]:
        """What is another thing than before, each in a few words; settings, which /set shows, are left out."""
        told = []
        if before.model_id and self.model_id != before.model_id:
            told.append("the model's file has changed")
        if self._adapter != before._adapter:
            told.append(f"{self._adapter} (before: {before._adapter})")
        elif before.lora_id and self.lora_id != before.lora_id:
            told.append("the LoRA adapter's file has changed")
        now, then = self._active, before._active
        if now != then:
            told.append(f"schedule {in_one_line(now)} (before: {in_one_line(then)})")
        for name, words in _IN_WORDS.items():
            value, old = getattr(self, name), getattr(before, name)
            if value != old:
                told.append(f"{words} {_shown(value)} (before: {_shown(old)})")
        return told

    @property
    def _adapter(self) -> str:
        if self.lora is None:
            return "no LoRA adapter"
        return f"LoRA adapter {self.lora}" + (f" scaled by {self.lora_scale:g}" if self.lora_scale != 1 else "")

    @property
    def _active(self) -> Schedule | None:
        return None if self.full or self.schedule is None or self.schedule.is_full else self.schedule


_TEXT, _NUMBER = (str, type(None)), (int, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "lora": _TEXT,
    "lora_scale": (int, float),
    "flash_attn": (bool, type(None)),
    "type_k": _TEXT,
    "type_v": _TEXT,
    "rope_scaling": _TEXT,
    "rope_scale": (int, float, type(None)),
    "settings": (dict, type(None)),
    **dict.fromkeys(("n_ctx", "n_batch", "n_ubatch", "yarn_orig_ctx"), _NUMBER),
}
_CHOICES = {"type_k": KV_TYPES, "type_v": KV_TYPES, "rope_scaling": ROPE_SCALINGS}
_IN_WORDS = {
    "n_ctx": "context",
    "n_batch": "n_batch",
    "n_ubatch": "n_ubatch",
    "flash_attn": "flash attention",
    "type_k": "type of cached keys",
    "type_v": "type of cached values",
    "rope_scaling": "RoPE scaling",
    "rope_scale": "RoPE scale",
    "yarn_orig_ctx": "YaRN's trained context",
}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "as by default" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def chosen_settings(settings: Settings, chosen: Iterable[str]) -> dict[str, Any]:
    """Of these settings, those with the chosen names that are kept with the setup."""
    return {name: getattr(settings, name) for name in sorted(chosen) if name != _CHOSEN_ELSEWHERE}


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    default = Settings()
    for name, value in data.items():
        known = getattr(default, name, None) if name != _CHOSEN_ELSEWHERE else ""
        kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(type(known), (bool, type(None)))
        if name not in asdict(default) or type(value) not in kinds:
            raise ValueError(f"the setting {name} is {value!r}")
    return dict(data)
