"""What a user asked for as a schedule, before the model is known: a preset, settings, none, or nothing at all.

A list of layers such as `1::2` has no meaning before the model's depth is known, so a command gets `ScheduleOptions`
and asks for `config(layers)`. Knows nothing of the command line that fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from swaa_local.errors import ScheduleError
from swaa_local.schedule.config import Schedule, SWAAConfig
from swaa_local.schedule.layers import parse_layers
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.schedule.presets import Preset


@dataclass(frozen=True)
class StoredSchedule:
    """What a model's file stores. calibration: what the schedule was found with; None if nobody measured it."""

    schedule: Schedule | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class ScheduleOptions:
    """What the user said of the schedule; None where they said nothing. auto: the one that was calibrated."""

    preset: Preset | None = None
    auto: bool = False
    window: int | None = None
    sinks: int | None = None
    full_layers: str | None = None
    fa_decode: bool | None = None
    fa_decode_layers: str | None = None
    clip_layers: bool = False
    tail: int | None = None
    no_swaa: bool = False

    @property
    def given(self) -> bool:
        """True if the user asked for a schedule, or for another tail of the file's."""
        return self.has_window or self.tail is not None

    @property
    def has_window(self) -> bool:
        """True if the user asked for a schedule of their own."""
        return self.preset is not None or self.auto or self.window is not None

    def config(
        self, model: ModelLayers | int, read_stored: Callable[[], StoredSchedule] = StoredSchedule
    ) -> SWAAConfig | Literal[False] | None:
        """The schedule for a model of these layers; False for --no-swaa, None if nothing was said.

        read_stored: gives what the model's file stores; asked only if its tail alone is replaced, or for `auto`. Given
        options replace the preset's. Raises `ScheduleError`.
        """
        if self.no_swaa:
            return False
        if not self.has_window:
            if self.tail is None:
                return None
            stored = read_stored().schedule
            if stored is None:
                raise ScheduleError(
                    "the file has no schedule for --tail to change; add --window TOKENS or --preset NAME"
                )
            return self._checked(replace(stored.config(), prompt_tail=self.tail))

        def layers(text: str) -> tuple[int, ...]:
            return parse_layers(text, model, clip_layers=self.clip_layers)

        window, sinks, full, decode = self.window, self.sinks, self.full_layers, self.fa_decode
        base = SWAAConfig()
        if self.auto:
            base = _calibrated(read_stored())
        elif self.preset is not None:
            # Layers named by hand replace the preset's, so its depth no longer matters.
            base = (
                self.preset.config(model, clip_layers=self.clip_layers)
                if full is None
                else SWAAConfig(
                    self.preset.window, self.preset.sinks, self.preset.fa_decode, prompt_tail=self.preset.tail
                )
            )
        chosen = SWAAConfig(
            sliding_window_size=base.sliding_window_size if window is None else window,
            keep_first=base.keep_first if sinks is None else sinks,
            force_fa_decode=(
                layers(self.fa_decode_layers)
                if self.fa_decode_layers is not None
                else base.force_fa_decode
                if decode is None
                else decode
            ),
            non_sliding_layers=base.non_sliding_layers if full is None else layers(full),
            prompt_tail=base.prompt_tail if self.tail is None else self.tail,
        )
        return self._checked(chosen)

    def _checked(self, chosen: SWAAConfig) -> SWAAConfig:
        """The same, without a preset's tail where no layer would have it. Raises `ScheduleError` for one that was asked
        for."""
        if self.tail and not chosen.force_fa_decode:
            raise ScheduleError(
                f"--tail {self.tail} has no effect without FA decode: add --fa-decode, or leave out --tail"
            )
        return chosen if chosen.force_fa_decode else replace(chosen, prompt_tail=0)


def _calibrated(stored: StoredSchedule) -> SWAAConfig:
    if stored.schedule is None or stored.calibration is None:
        has = "has no schedule" if stored.schedule is None else "has a schedule that was not calibrated"
        raise ScheduleError(
            f"--preset auto takes the schedule that was found for a model, and this file {has}; "
            "swaa-local calibrate MODEL -o OUT.gguf finds one and stores it in OUT.gguf"
        )
    return stored.schedule.config()


ScheduleChoice = SWAAConfig | Literal[False] | None
"""A schedule, False to have none, None to keep the source's."""
