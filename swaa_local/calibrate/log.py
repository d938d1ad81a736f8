"""The file of a calibration: every trial and every generated answer, one JSON object a line; a stopped one continues.

Lines have a `kind`: `config` (what all others depend on), `text` (its digest and number of questions), `kinds` (of
questions that the model can answer), `trial` and `answers`. Knows files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swaa_local.calibrate.results import CalibrateError, Generated, Scale, Trial
from swaa_local.files.json_log import JsonLog
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.model_layers import ModelLayers

FORMAT = 1
_REMEDY = "name another file with --log, or remove this one"


class CalibrateLogError(CalibrateError):
    """A log that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Kinds:
    """Kinds of questions that full attention answers. bare: those whose answers it begins by itself. shares: of right
    answers, of all kinds that were tried."""

    kinds: tuple[str, ...]
    bare: tuple[str, ...]
    shares: dict[str, float]


class CalibrateLog(JsonLog):
    """Opens or begins a log, and holds what is in it. Use as a context manager. Raises `CalibrateLogError`.

    layers: of the model that all of it is about. took_before_s: seconds of all trials and answers that were in it when
    it was opened.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], layers: ModelLayers) -> None:
        self._layers = layers
        self.trials: dict[tuple[Schedule, Scale, int], Trial] = {}
        self.answers: dict[tuple[Schedule, int], Generated] = {}
        self.kinds: dict[str, Kinds] = {}
        self._texts: dict[str, str] = {}
        self.took_before_s = 0.0
        super().__init__(
            path,
            config,
            format=FORMAT,
            on_row=self._take,
            what="a log of swaa-local calibrate",
            remedy=_REMEDY,
            error=CalibrateLogError,
        )

    def __enter__(self) -> CalibrateLog:
        return self

    def _take(self, kind: str, row: dict[str, Any]) -> None:
        if kind == "trial":
            trial = Trial(**self._with_schedule(row, "nll", "chance", "right"))
            self.trials[trial.schedule, trial.scale, trial.text] = trial
            self.took_before_s += trial.took_s
        elif kind == "answers":
            generated = Generated(**self._with_schedule(row, "answers", "right"))
            self.answers[generated.schedule, generated.text] = generated
            self.took_before_s += generated.took_s
        elif kind == "kinds":
            at = row.pop("at")
            self.kinds[at] = Kinds(tuple(row["kinds"]), tuple(row["bare"]), dict(row["shares"]))
        elif kind == "text":
            self._texts[row["id"]] = row["digest"]
        else:
            raise KeyError(kind)

    def _with_schedule(self, row: dict[str, Any], *tuples: str) -> dict[str, Any]:
        given = row["schedule"]
        modes = tuple(LayerMode(mode) for mode in given["layer_modes"])
        schedule = Schedule(given["window"], given["sinks"], modes, given["tail"], self._layers)
        return row | {name: tuple(row[name]) for name in tuples} | {"schedule": schedule}

    def add_text(self, id: str, digest: str, n_questions: int) -> None:
        """Note a text. Raises `CalibrateLogError` if the log has another one in its place."""
        known = self._texts.get(id)
        if known is None:
            self._texts[id] = digest
            self.write("text", {"id": id, "digest": digest, "n_questions": n_questions})
        elif known != digest:
            raise CalibrateLogError(
                f"{self.path} has trials on another text {id}: of other documents, questions or another version; "
                f"{_REMEDY}"
            )

    def add_kinds(self, at: str, kinds: Kinds) -> None:
        self.kinds[at] = kinds
        self.write("kinds", {"at": at} | asdict(kinds))

    def add_trial(self, trial: Trial) -> None:
        self.trials[trial.schedule, trial.scale, trial.text] = trial
        self.write("trial", _as_row(trial))

    def add_answers(self, generated: Generated) -> None:
        self.answers[generated.schedule, generated.text] = generated
        self.write("answers", _as_row(generated))


def _as_row(record: Trial | Generated) -> dict[str, Any]:
    return asdict(record) | {"schedule": record.schedule.as_dict()}
