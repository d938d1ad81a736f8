"""How replies are made: sampling, limits and thinking. Plain data, with the model's own recommendations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from swaa_local.errors import SWAAError

_INT_MAX = (1 << 31) - 1


class ChatError(SWAAError):
    """Something that the conversation does not allow now; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """How replies are made. Sampling defaults are llama.cpp's; a GGUF may bring its own (`with_defaults_of`).

    max_tokens: of a reply, thinking included; 0: none, the prompt is read; -1: until the context is full. seed: -1
    is a new one each time. think: None leaves it to the model's template. loop_guard: end a reply that repeats itself
    word for word.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    max_tokens: int = -1
    seed: int = -1
    think: bool | None = None
    hide_thinking: bool = False
    loop_guard: bool = True
    system: str = ""

    def __post_init__(self) -> None:
        if self.top_k > _INT_MAX:  # ctypes would take a part of it
            raise ChatError(f"top-k must be at most {_INT_MAX}, not {self.top_k}")

    def with_defaults_of(self, metadata: Mapping[str, str], given: Sequence[str] = ()) -> Settings:
        """The sampling that the model's makers recommend in the GGUF, but for the fields `given` by the user.

        Raises `ChatError` for a recommendation that is no number.
        """
        keys = {"temp": float, "top_k": int, "top_p": float, "min_p": float, "penalty_repeat": float}
        found: dict[str, Any] = {}
        for key, kind in keys.items():
            field = "repeat_penalty" if key == "penalty_repeat" else key
            if field not in given and (value := metadata.get(f"general.sampling.{key}")) is not None:
                try:
                    found[field] = kind(float(value))
                except (ValueError, OverflowError):
                    option = "--" + field.replace("_", "-")
                    raise ChatError(
                        f"the model's general.sampling.{key} is {value!r}, which is no number; pass {option}"
                    ) from None
        return replace(self, **found)


SETTING_NAMES = tuple(field.name for field in fields(Settings))
