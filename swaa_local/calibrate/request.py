"""What is asked of a calibration, and what must be true before anything is measured. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swaa_local.calibrate.haystack import Haystack
from swaa_local.calibrate.measure import Bench
from swaa_local.calibrate.prompts import ROOM_TO_ANSWER
from swaa_local.calibrate.questions import OwnQuestions, divide, read_questions
from swaa_local.calibrate.results import CalibrateError
from swaa_local.calibrate.watch import Watch
from swaa_local.engine.context_length import beyond_training, gpu_layers
from swaa_local.engine.memory import check_fits, header_cost
from swaa_local.engine.options import EngineOptions
from swaa_local.files.fingerprint import fingerprint
from swaa_local.model_file.model_info import ModelInfo
from swaa_local.schedule.config import Schedule, default_n_ubatch


@dataclass(frozen=True)
class CalibrateRequest:
    """What to calibrate.

    log: the file of all trials; it is continued if it exists. length: of prompts with their answers, in tokens; None:
    16384, or the model's context if that is shorter, or what the questions need. windows: to choose from, in tokens;
    None: a 16th, an eighth and a quarter of the length. keep: share of full attention's quality. memory: prefer the
    smallest cache. budget_s: of time, all in all. command: how the user spelled all this, for the report.
    """

    model: Path
    log: Path
    data: Sequence[str] = ()
    questions: Path | None = None
    length: int | None = None
    budget_s: float = 900.0
    windows: Sequence[int] | None = None
    keep: float = 0.98
    memory: bool = False
    seed: int = 0
    engine: EngineOptions = field(default_factory=EngineOptions)
    command: str = ""


def plan(
    request: CalibrateRequest, info: ModelInfo, haystack: Haystack, watch: Watch
) -> tuple[int, tuple[int, ...], OwnQuestions | None]:
    """Length, windows, and the user's questions divided. Raises `CalibrateError` for what does not go together."""
    found = read_questions(request.questions) if request.questions is not None else None
    with closing(Bench(request.model, None, request.engine)) as bench:
        if found is None:
            length = request.length or min(16384, info.n_ctx_train or 16384)
        else:
            needed = max(bench.count_prompt(text) for text, _ in found) + 2 * ROOM_TO_ANSWER
            needed += max(bench.count(ask.question) for _, asks in found for ask in asks)
            length = request.length or needed
            if needed > length:
                raise CalibrateError(
                    f"a question of {request.questions} needs {needed} tokens but --length is {length}; pass --length "
                    f"{needed} or shorten its text"
                )
        if not request.engine.scales_rope and (said := beyond_training(length, info.n_ctx_train)):
            watch.note(said)
        windows = tuple(sorted(set(request.windows or [max(1, length // part) for part in (16, 8, 4)])))
        if windows[-1] > length // 2:
            raise CalibrateError(
                f"a window of {windows[-1]} tokens shows more than half of a prompt of {length}, so little lies beyond "
                f"it; pass --length {4 * windows[-1]} or a smaller --window"
            )
        if haystack.units and (n := sum(bench.count(unit) for unit in haystack.units)) < length:
            raise CalibrateError(
                f"the documents have {n} tokens but a prompt takes {length}; give {length / n:.1f} times as much text, "
                f"or pass --length {max(1, n // 256 * 256)}"
            )
        own = divide(found, request.seed, length, windows[-1], bench.count) if found is not None else None
    return length, windows, own


def check_memory(request: CalibrateRequest, info: ModelInfo, length: int) -> None:
    """Before anything is made. Raises `ContextTooLarge`."""
    engine, full = request.engine, Schedule.full(info.layers)
    cost = header_cost(
        info,
        full,
        n_ubatch=engine.n_ubatch or default_n_ubatch(full, gpu=False),
        type_k=engine.type_k or "f16",
        type_v=engine.type_v or "f16",
        n_gpu_layers=gpu_layers(engine.n_gpu_layers, workers=bool(engine.rpc_servers), verbose=engine.verbose),
    )
    check_fits(cost, length)


def config(request: CalibrateRequest, length: int, windows: Sequence[int]) -> dict[str, Any]:
    """What the trials depend on. The budget and what is to be kept only decide which are made."""
    import llama_cpp

    return request.engine.for_log() | {
        "model": request.model.name,
        "model_sha256": fingerprint(request.model),
        "length": length,
        "windows": list(windows),
        "data": list(request.data),
        "questions": None if request.questions is None else str(request.questions),
        "seed": request.seed,
        "engine": llama_cpp.__version__,
    }


def default_log(model: Path) -> Path:
    """Where the trials go where the user does not say: in the current directory, named after the model."""
    return Path(f"{model.stem}.calibrate.jsonl")
