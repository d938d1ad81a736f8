"""Rows, their loss and NLL: against transformers' own loss, and against the engine under the same schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")
pytest.importorskip("peft", reason="PEFT is not installed, so nothing is tuned with PyTorch")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so transformers' models cannot be made")

import peft
import torch
import transformers

from swaa_local import LayerMode, Schedule
from swaa_local.tune.engine_nll import engine_nll
from swaa_local.tune.examples import Example
from swaa_local.tune.masks import ATTENTION, Masks
from swaa_local.tune.rows import answer_logits, loss_of, mean_nll, row_tensors
from tests.support.tiny_hf import N_LAYER, checkpoints

pytestmark = pytest.mark.usefixtures("engine")

FULL, PREFILL, ALWAYS = LayerMode
SCHEDULES = {
    "full": Schedule.full(N_LAYER),
    "windows": Schedule(24, 4, (ALWAYS,) * 4),
    "FA decode and tail": Schedule(24, 4, (PREFILL,) * 4, 12),
    "all modes": Schedule(24, 4, (ALWAYS, PREFILL, FULL, PREFILL)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("rows")
    made = checkpoints(root, ["llama"])["llama"]
    return made


@pytest.fixture(scope="module")
def model(checkpoint) -> tuple[Any, Masks]:
    """With an adapter that does nothing yet."""
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint[0], attn_implementation=ATTENTION)
    masks = Masks("sdpa")
    masks.attach(base)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), masks


def examples(*sizes: tuple[int, int], seed: int = 1) -> list[Example]:
    """Of random tokens: of a prompt, and of its answer."""
    rng = np.random.default_rng(seed)
    return [Example(tuple(rng.integers(10, 300, p + a).tolist()), p, "here") for p, a in sizes]


def test_the_loss_is_that_of_transformers_on_the_answers(checkpoint, model):
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint[0])
    packed = examples((90, 7), (60, 12))
    total, n = 0.0, 0
    for example in packed:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[:, : example.n_prompt] = -100
        with torch.inference_mode():
            total += float(plain(tokens, labels=labels).loss) * example.n_answer
        n += example.n_answer
    row = row_tensors(packed)
    with torch.inference_mode():
        loss = loss_of(answer_logits(*model, row, SCHEDULES["full"]), row, None)
    assert float(loss) == pytest.approx(total / n, rel=1e-5)


def test_a_model_has_nothing_to_learn_from_itself(model):
    row = row_tensors([dataclasses.replace(examples((90, 7))[0], teacher=True)])
    with torch.inference_mode():
        full, windowed = (answer_logits(*model, row, SCHEDULES[name]) for name in ("full", "windows"))
        assert float(loss_of(full, row, full)) == pytest.approx(0.0, abs=1e-6)
        loss = float(loss_of(windowed, row, full))
    full, windowed = (each.double().numpy() for each in (full, windowed))
    log_p, log_q = (each - np.log(np.exp(each).sum(1, keepdims=True)) for each in (full, windowed))
    assert loss == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rel=1e-3)
    assert loss > 0.01


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_nll_is_the_engine_s(checkpoint, model, name):
    held_out, schedule = examples((90, 7), (140, 20), (30, 1)), SCHEDULES[name]
    mine = mean_nll(*model, held_out, schedule, "cpu", adapter=False)
    exact: dict[str, Any] = {"flash_attn": False, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
    theirs = engine_nll(checkpoint[1], held_out, None if schedule.is_full else schedule, lora=None, **exact)
    assert mine == pytest.approx(theirs, rel=1e-3)
