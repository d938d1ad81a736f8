"""PyTorch under a schedule's masks against the engine under the same schedule, and masks against their definition.

Models are those of the parity grid. The masks' oracle is `tests.support.masks`, written from the definition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so transformers' models cannot be made")

import torch
import transformers

from swaa_local import LayerMode, Llama, Schedule
from swaa_local.tune import varlen
from swaa_local.tune.masks import ATTENTION, Masks, prompt_end
from swaa_local.tune.request import AttentionKind
from tests.support.engine import worst_ratio
from tests.support.masks import Sched, layer_masks
from tests.support.plain_varlen import PlainKernel
from tests.support.tiny_hf import KINDS, N_LAYER, checkpoints

pytestmark = pytest.mark.usefixtures("engine")

FULL, PREFILL, ALWAYS = LayerMode
N_TOKENS, PROMPT = 300, 272
SCHEDULES = {
    "full": Schedule.full(N_LAYER),
    "window and sinks": Schedule(24, 4, (ALWAYS,) * 4),
    "FA decode, sinks, tail": Schedule(24, 10, (PREFILL,) * 4, 40),
    "full layers, FA decode": Schedule(24, 4, (FULL, PREFILL, FULL, PREFILL)),
    "all modes, tail": Schedule(30, 4, (ALWAYS, PREFILL, FULL, PREFILL), 5),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and GGUF of each family."""
    torch.set_num_threads(1)
    return checkpoints(tmp_path_factory.mktemp("tune"), KINDS)


def load(checkpoint: Path, kind: AttentionKind = "sdpa") -> tuple[Any, Masks]:
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=ATTENTION).eval()
    masks = Masks(kind)
    masks.attach(model)
    return model, masks


def tokens_for(model: Any) -> list[int]:
    return np.random.default_rng(3).integers(10, model.config.vocab_size, N_TOKENS).tolist()


def logits(model: Any, tokens: list[int], positions: Any = None) -> np.ndarray:
    with torch.inference_mode():
        positions = None if positions is None else positions[None]
        return model(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[0].numpy()


def engine_logits(gguf: Path, tokens: list[int], schedule: Schedule) -> np.ndarray:
    exact: dict[str, Any] = {"flash_attn": False, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
    swaa = False if schedule.is_full else schedule
    llm = Llama(str(gguf), swaa=swaa, n_ctx=512, n_ubatch=32, logits_all=True, **exact)
    llm.eval(tokens[:PROMPT])
    for token in tokens[PROMPT:]:
        llm.eval([token], decode=True)
    scores = llm.scores[: len(tokens)].copy()
    llm.close()
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_and_the_engine_mean_the_same(models, kind):
    checkpoint, gguf = models[kind]
    model, masks = load(checkpoint)
    tokens = tokens_for(model)
    found = {}
    for name, schedule in SCHEDULES.items():
        masks.set([(N_TOKENS, prompt_end(PROMPT, schedule))], schedule)
        found[name] = logits(model, tokens)
        assert worst_ratio(found[name], engine_logits(gguf, tokens, schedule)) < 1e-3, name
    for name in SCHEDULES:
        assert all(worst_ratio(found[name], found[other]) > 0.1 for other in SCHEDULES if other != name)


def by_definition(schedule: Schedule, n: int, prompt_end: int) -> list[np.ndarray]:
    return layer_masks(Sched(schedule.window, schedule.sinks, schedule.layer_modes), n, prompt_end)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_masks_are_those_of_the_definition(schedule):
    """Texts in a row, packed: each as if it were alone."""
    lengths = [(150, 120), (37, 37), (69, 0)]
    masks, total = Masks("sdpa"), sum(n for n, _ in lengths)
    masks.set(lengths, schedule)
    for layer in range(N_LAYER):
        want = np.zeros((total, total), dtype=bool)
        start = 0
        for n, end in lengths:
            want[start : start + n, start : start + n] = by_definition(schedule, n, end)[layer]
            start += n
        np.testing.assert_array_equal(masks.of_layer(layer)[0, 0].numpy(), want)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_packed_texts_do_not_see_each_other(models, kind):
    model, masks = load(models[kind][0])
    schedule, tokens = SCHEDULES["FA decode, sinks, tail"], tokens_for(model)
    cut = 130
    masks.set([(cut, 90), (N_TOKENS - cut, 60)], schedule)
    packed = logits(model, tokens, torch.cat([torch.arange(cut), torch.arange(N_TOKENS - cut)]))
    for part, end in ((slice(0, cut), 90), (slice(cut, N_TOKENS), 60)):
        alone = tokens[part]
        masks.set([(len(alone), end)], schedule)
        assert worst_ratio(packed[part], logits(model, alone)) < 1e-4


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    """Flash attention has a stand-in."""
    kernel = PlainKernel()
    monkeypatch.setattr(varlen, "_forward", kernel.forward)
    monkeypatch.setattr(varlen, "_backward", kernel.backward)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("kind", ["qwen3", "llama, no GQA", "granite"])
def test_all_kinds_of_attention_give_the_same(models, kind):
    n = 256
    for schedule in SCHEDULES.values():
        found = []
        for attention in ("sdpa", "flash"):
            model, masks = load(models[kind][0], attention)
            masks.set([(n - 100, n - 130), (100, 60)], schedule)
            found.append(logits(model, tokens_for(model)[:n]))
        assert worst_ratio(*found) < 1e-4


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_checkpointed_gradients_are_those_of_the_same_masks(models, attention):
    """The backward pass runs the layers again."""
    grads = []
    for checkpointing in (False, True):
        model, masks = load(models["qwen3"][0], attention if checkpointing else "sdpa")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        masks.set([(200, 160)], SCHEDULES["all modes, tail"])
        model(torch.tensor([tokens_for(model)[:200]]), use_cache=False).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_nothing_is_dropped_out(models, attention):
    """Some configs have attention_dropout from pretraining; flash attention in parts has none."""
    config = transformers.AutoConfig.from_pretrained(models["granite"][0], attention_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    masks = Masks(attention)
    masks.attach(model)
    masks.set([(128, 100)], SCHEDULES["all modes, tail"])
    found = [logits(mode, tokens_for(model)[:128]) for mode in (model.eval(), model.train())]
    np.testing.assert_array_equal(*found)
