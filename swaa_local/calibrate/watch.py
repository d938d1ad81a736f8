"""How a calibration is watched while it runs, without knowing where that is shown."""

from __future__ import annotations

from swaa_local.calibrate.results import Candidate, Scale
from swaa_local.schedule.config import Schedule


class Watch:
    """Takes what happens. This one is silent; the command line's draws on stderr (`terminal`)."""

    def note(self, text: str) -> None:
        """Something that the user should know, in a sentence."""

    def stage(self, what: str) -> None:
        """What is done from now on."""

    def trying(self, schedule: Schedule, what: str) -> None:
        """A schedule is about to be run. what: on what."""

    def on_prefill(self, done: int, total: int) -> None:
        """Tokens of a prompt that are read, as `Llama.on_prefill` tells."""

    def tried(self, schedule: Schedule, scale: Scale, best: Candidate | None, left_s: float) -> None:
        """It was run. best: of the search so far. left_s: of the search's time."""

    def end(self) -> None:
        """Everything is done, or stopped."""


SILENT = Watch()
