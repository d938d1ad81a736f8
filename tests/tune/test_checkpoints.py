"""Fine-tunes of checkpoints, whole, in this process: from each kind of attention to an adapter that the engine runs.

The converter turns the rows of q and k of some families and splits what others have fused; the engine's NLL with the
adapter shows that both ends mean the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")
pytest.importorskip("peft", reason="PEFT is not installed, so nothing is tuned with PyTorch")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so transformers' models cannot be made")

import torch

from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.tune.request import TuneError, TuneRequest
from swaa_local.tune.run import tune
from swaa_local.tune.watch import Watch
from tests.support.tiny_hf import convert_all, write_checkpoint

pytestmark = pytest.mark.usefixtures("engine")

KINDS = ("llama", "phi3", "qwen3-moe")
WORDS = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "quietly", "forge", "boxes")


class Notes(Watch):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    # By number: a model that is called phi3 is given Phi-3's special tokens by the engine, which this one has not.
    made = {kind: (write_checkpoint(root / str(i), kind), root / f"{i}.gguf") for i, kind in enumerate(KINDS)}
    convert_all(dict(made.values()))
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [{"prompt": " ".join(rng.choice(WORDS, 40)), "answer": "seven wizards"} for _ in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FA_DECODE: dict[str, Any] = {"fa_decode": True, "tail": 12}
WINDOWS: dict[str, Any] = {"sinks": 4}


@pytest.mark.parametrize(("kind", "schedule"), [("llama", WINDOWS), ("phi3", FA_DECODE), ("qwen3-moe", FA_DECODE)])
def test_from_a_checkpoint_to_the_engine(models, data, tmp_path, kind, schedule):
    checkpoint, gguf = models[kind]
    watch = Notes()
    result = tune(
        TuneRequest(
            model=str(checkpoint),
            output=tmp_path / "a.gguf",
            data=data,
            schedule=ScheduleOptions(window=24, **schedule),
            steps=6,
            length=512,
            rank=4,
            alpha=16,
            targets="q,k,v,o",
            learning_rate=5e-3,
            device="cpu",
            gguf=gguf,
        ),
        watch,
    )
    assert any("has no chat template, so ChatML is used" in note for note in watch.notes)
    assert not any("not measured" in note for note in watch.notes), watch.notes
    pytorch, engine = result.nlls[:2], result.nlls[2:]
    for mine, theirs in zip(pytorch, engine, strict=True):
        assert mine.after < 0.9 * mine.before
        assert (mine.before, mine.after) == pytest.approx((theirs.before, theirs.after), rel=0.01)


def test_another_model_s_gguf_is_an_error_before_the_work(models, data, tmp_path):
    request = TuneRequest(
        str(models["llama"][0]), tmp_path / "a.gguf", data, schedule=ScheduleOptions(window=24), gguf=models["phi3"][1]
    )
    with pytest.raises(TuneError, match=f"{models['phi3'][1]} is not made of"):
        tune(request)
    assert list(tmp_path.iterdir()) == []
