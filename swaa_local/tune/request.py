"""What a fine-tune is asked for, as plain data, and the error for what cannot be done. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swaa_local.errors import SWAAError
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.text.extras import install

Device = Literal["auto", "cuda", "cpu", "mps"]
AttentionKind = Literal["flash", "sdpa"]
Attention = AttentionKind | Literal["auto"]
NEEDED = ("torch", "transformers", "peft", "accelerate")
EXTRA = install("tune")


class TuneError(SWAAError):
    """A fine-tune that cannot be made as asked; the message says what to do."""


@dataclass(frozen=True)
class TuneRequest:
    """What to tune, on what, and how.

    model: a checkpoint's folder or hub id, or a GGUF. output: the adapter's GGUF; PEFT's folder and, while it is made,
    checkpoints are beside it. data, distill: JSON lines; a text or a folder of texts. One of them at least. length:
    tokens of a training row at most. prompts: how many are made of the texts. skip_long: leave out what is longer.
    held_out: examples that are not trained on but measured; None: a tenth, 2 to 16. accumulate: rows of one step.
    full_share: of the rows, which are trained under full attention. gguf: another file of the model, to measure in the
    engine with it. think: as the model's template takes it. command: as the user typed it, for the metadata.
    """

    model: str
    output: Path
    data: Path | None = None
    distill: Path | None = None
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    steps: int = 300
    length: int = 8192
    prompts: int = 64
    skip_long: bool = False
    held_out: int | None = None
    rank: int = 16
    alpha: float = 128.0
    targets: str = "q,k,v"
    learning_rate: float = 1e-4
    accumulate: int = 1
    full_share: float = 0.0
    device: Device = "auto"
    attention: Attention = "auto"
    seed: int = 0
    think: bool | None = None
    gguf: Path | None = None
    plot: Path | None = None
    resume: bool = False
    force: bool = False
    command: str = ""

    @property
    def peft(self) -> Path:
        """The adapter as PEFT writes it."""
        return self.output.with_suffix(".peft")

    @property
    def checkpoints(self) -> Path:
        """Where a run that was stopped goes on from."""
        return self.output.with_suffix(".checkpoints")


def require_extra() -> None:
    """`TuneError` with the remedy if PyTorch or another need of it is missing."""
    import importlib.util

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join({"torch": "PyTorch", "peft": "PEFT"}.get(name, name) for name in missing)
        raise TuneError(f"tune needs {names}: run {EXTRA}")
