"""`bench`, `eval` and `calibrate` on models where some layers cannot slide: hybrids, and models with windows of their
own. Schedules are for the other layers alone, and what is said of them counts and names no more than these.

The models are random and answer nothing, so calibrate asks questions of the user's, of which the measure is what full
attention answers.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from typing import Any

import pytest

from swaa_local.model_file.schedule_keys import read_schedule
from tests.support.program import fails, run, succeeds
from tests.support.tiny import ALWAYS, FULL, PREFILL, with_own_windows, write_tiny_gguf
from tests.support.tiny_hybrid import ATTENDING, write_tiny_hybrid

pytestmark = pytest.mark.usefixtures("engine")

OWN = (16, [True, False, True, False, False, True, False])
"""Tokens of the window, and which layers have it."""


@dataclass(frozen=True)
class Model:
    """others: what is said of the layers that cannot slide."""

    path: Path
    sliding: tuple[int, ...]
    n_layer: int
    others: str

    @property
    def can(self) -> str:
        return f"Layers that can slide: {len(self.sliding)} of {self.n_layer}: "

    def modes(self, mode: int, full: tuple[int, ...] = ()) -> list[int]:
        return [mode if i in self.sliding and i not in full else FULL for i in range(self.n_layer)]


def _from_transformers(folder: Path, kind: str) -> Model:
    """Made by transformers and converted by upstream's converter."""
    for module in ("torch", "transformers", "sentencepiece"):
        pytest.importorskip(module, reason=f"{module} is not installed, so no model of this family is made")
    from tests.support.tiny_hf import convert_all, write_checkpoint
    from tests.support.tiny_hf_hybrid import HYBRIDS, write_hybrid

    if kind in HYBRIDS:
        checkpoint = write_hybrid(folder / "hf", kind)
        sliding, n_layer, others = HYBRIDS[kind].attending, HYBRIDS[kind].n_layer, "recurrent"
    else:
        checkpoint = write_checkpoint(folder / "hf", kind)
        types = json.loads((checkpoint / "config.json").read_text())["layer_types"]
        sliding = tuple(i for i, each in enumerate(types) if each == "full_attention")
        n_layer, others = len(types), "own window (14 tokens)"
    convert_all({checkpoint: folder / "m.gguf"})
    return Model(folder / "m.gguf", sliding, n_layer, others)


@pytest.fixture(scope="module", params=["lfm2", "mellum", "qwen3-next", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("other")
    if request.param == "lfm2":
        return Model(write_tiny_hybrid(folder / "m.gguf"), ATTENDING, 7, "recurrent")
    if request.param == "mellum":
        path = write_tiny_gguf(folder / "m.gguf", **with_own_windows(*OWN))
        return Model(path, tuple(i for i, has in enumerate(OWN[1]) if not has), 7, "own window (16 tokens)")
    return _from_transformers(folder, request.param)


def test_bench_gives_windows_to_layers_that_can_slide(model, tmp_path):
    variants = {"full": model.modes(FULL), "w32 k4 fadec": model.modes(PREFILL)}
    variants["w32 k4 0::2"] = model.modes(ALWAYS, model.sliding[::2])
    arguments = ("-p", 300, "-n", 4, "-r", 1, "-t", 1, "-ub", 64, "--variants", ",".join(variants))
    rows = json.loads(succeeds("bench", model.path, *arguments, "-o", "json"))["results"]
    of_schedules = [row for row in rows if row["variant"] in variants]
    assert {row["variant"]: row["layer_modes"] for row in of_schedules} == variants
    for row in of_schedules:  # what inspect works out for the file, bench measured
        file = tmp_path / "m.gguf"
        if row["variant"] != "full":
            options = ("--window", 32, "--sinks", 4, *(["--fa-decode"] if "fadec" in row["variant"] else []))
            full = "0::2" if "0::2" in row["variant"] else ""
            succeeds("convert", model.path, "-o", file, "--force", *options, "--full-layers", full)
        shown = json.loads(
            succeeds(
                "inspect", file if file.exists() else model.path, "-c", row["n_ctx"], "-ub", row["n_ubatch"], "--json"
            )
        )
        cost = shown["scheduled"] or shown["full"]
        assert row["kv_bytes"] == cost["kv_bytes"] + cost["state_bytes"], row["variant"]
    table = succeeds("bench", model.path, *arguments)
    assert model.can in table
    assert f"others: {model.others}, which stay as they are." in table


def test_eval_compares_schedules_of_layers_that_can_slide(model, tmp_path):
    """A window that is wider than the text changes nothing, and a narrow one does, in these layers alone."""
    variants = {"full": model.modes(FULL), "w2048 k4 fadec": model.modes(PREFILL), "w24 k4": model.modes(ALWAYS)}
    variants["w24 k4 0::2"] = model.modes(ALWAYS, model.sliding[::2])
    command = ("eval", model.path, *split("-n 1 --length 700 -t 1 --max-tokens 12"))
    command += ("--variants", ",".join(variants), "--results", tmp_path / "r.jsonl")
    table = succeeds(*command)
    assert f"others: {model.others}, which stay as they are." in table
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    answers: dict[str, list[str]] = {name: [] for name in variants}
    for row in rows:
        if row["kind"] == "answer":
            answers[row["variant"]].append(row["answer"])
    assert {row["name"]: row["layer_modes"] for row in rows if row["kind"] == "variant"} == variants
    assert len(answers["full"]) == 2
    assert answers["full"] == answers["w2048 k4 fadec"]
    if any(answers["full"]):  # it may say tokens that have no text
        assert answers["full"] != answers["w24 k4"] != answers["w24 k4 0::2"]
    assert succeeds(*command) == table  # from the log


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow"]
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    lines = []
    for _ in range(4):
        text = " ".join(rng.choice(words) for _ in range(120))
        lines += [json.dumps({"text": text, "question": f"What of {rng.choice(words)} {i}?"}) for i in range(3)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.timeout(400)
@pytest.mark.parametrize("model", ["lfm2", "mellum"], indirect=True)
def test_calibrate_searches_among_layers_that_can_slide(model, questions, tmp_path):
    pytest.importorskip("matplotlib")
    fixed = split("-t 1 --length 1024 --window 32 --keep 0.01 --seed 3 --log log.jsonl --report report --json")

    def calibrated(*arguments: Any) -> dict[str, Any]:
        done = run("calibrate", model.path, *fixed, "--questions", questions, *arguments, cwd=tmp_path)
        assert done.returncode in (0, 1), done.stderr  # random answers may not be kept
        assert "Traceback" not in done.stderr
        found: dict[str, Any] = json.loads((tmp_path / "report" / "calibration.json").read_text())
        return found

    found = calibrated("-o", "out.gguf", "--budget", "60s")
    sliding, others = set(model.sliding), set(range(model.n_layer)) - set(model.sliding)
    tried = [
        row["schedule"]
        for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        if "schedule" in row
    ]
    assert len(tried) > 8
    assert all(schedule["layer_modes"][layer] == FULL for schedule in tried for layer in others)
    assert {gain["layer"] for gain in found["gains"]} == sliding
    checked = [check["schedule"]["layer_modes"] for check in found["checks"]]
    for start in (0, 1):  # every second layer of those that can slide
        assert model.modes(PREFILL, model.sliding[start::2]) in checked
    page = (tmp_path / "report" / "README.md").read_text()
    assert model.can in page
    assert f"others: {model.others}, which stay as they are." in page
    stored = read_schedule(tmp_path / "out.gguf")
    assert stored is not None
    assert [int(mode) for mode in stored.layer_modes] == found["chosen"]["layer_modes"]
    # The same command goes on from its log, and means the same layers by it.
    again = calibrated("-o", "out.gguf", "--budget", "90s", "--force")
    names = {json.dumps(each["schedule"]): each["name"] for each in found["candidates"]}
    assert len(names) > 4
    for each in again["candidates"]:
        assert names.get(json.dumps(each["schedule"]), each["name"]) == each["name"]


def test_drafts_are_refused_before_anything_is_measured(tmp_path):
    path = write_tiny_hybrid(tmp_path / "m.gguf")
    for window in ((), ("--draft-window", "0")):
        said = fails("bench", path, *split("-p 300 -n 4 -r 1 -t 1"), *window, "--variants", "full,full spec2")
        assert "'full spec2' drafts, but the model has recurrent layers" in said
        assert "leave spec out" in said
