"""How a fine-tune is watched while it runs, without knowing where that is shown."""

from __future__ import annotations

from swaa_local.report.progress import Reporter
from swaa_local.tune.results import Step


class Watch(Reporter):
    """Notes and steps of work, and the training's own. This one is silent."""

    def training(self, n_steps: int, done: int) -> None:
        """Training begins, or goes on after `done` steps."""

    def trained(self, step: Step, n_steps: int) -> None:
        """A step is done."""

    def end(self) -> None:
        """Training has ended."""


SILENT = Watch()
