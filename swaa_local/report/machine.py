"""What something was measured on and with. Plain data; `engine.machine` finds it out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """cpu: its model's name. gpus: the names of llama.cpp's GPU devices. system_info: llama.cpp's line on the features
    that it was built with. engine: version of llama-cpp-python. time: UTC, ISO 8601."""

    cpu: str
    gpus: tuple[str, ...]
    system: str
    system_info: str
    engine: str
    version: str
    time: str

    def where(self, *, on_gpu: bool) -> str:
        """The device's name."""
        return ", ".join(self.gpus) if self.gpus and on_gpu else self.cpu
