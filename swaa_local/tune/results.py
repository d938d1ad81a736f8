"""What came of a fine-tune, as plain data: imports no PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from swaa_local.schedule.config import Schedule


@dataclass(frozen=True)
class Nll:
    """Mean negative log-likelihood of the held-out answers' tokens, in one way to run the model."""

    where: str
    """`PyTorch`, or the name of the GGUF that the engine ran."""
    schedule: str
    before: float
    after: float
    """With the adapter."""


@dataclass(frozen=True)
class Step:
    """One step of training. tokens: without padding. seconds: since the step before it. Both are 0 for the steps that a
    run which goes on took over."""

    number: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TuneResult:
    """nlls: under full attention and the schedule. n_examples, n_rows: trained on. peak_bytes: of the GPU's memory."""

    schedule: Schedule
    base: str
    nlls: tuple[Nll, ...]
    steps: tuple[Step, ...]
    n_examples: int
    n_rows: int
    n_held_out: int
    n_trained: int
    """Parameters."""
    train_s: float
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the steps."""
        return asdict(self) | {"schedule": self.schedule.as_dict(), "steps": len(self.steps)}
