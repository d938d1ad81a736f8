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
import transformers
from tokenizers.processors import TemplateProcessing

from swaa_local.generation.template import CHATML, ChatTemplate
from swaa_local.llama import Llama
from swaa_local.needle.model import bundled_model
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.tune.data import Conversation
from swaa_local.tune.examples import Renderer
from swaa_local.tune.request import TuneError, TuneRequest
from swaa_local.tune.run import tune
from swaa_local.tune.watch import Watch
from tests.support.tiny_hf import checkpoints

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
    return checkpoints(tmp_path_factory.mktemp("checkpoints"), KINDS)


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
        model=str(models["llama"][0]),
        output=tmp_path / "a.gguf",
        data=data,
        schedule=ScheduleOptions(window=24),
        steps=1,
        length=512,
        device="cpu",
        gguf=bundled_model(),
    )
    with pytest.raises(TuneError, match=r"needle\.gguf is not made of "):
        tune(request)
    assert list(tmp_path.iterdir()) == []


MESSAGES = [
    {"role": "user", "content": "seven wizards forge boxes"},
    {"role": "assistant", "content": "quietly"},
    {"role": "user", "content": "over the fox?"},
]
ANSWER = {"role": "assistant", "content": "yes"}


def test_prompts_are_what_chat_reads(models):
    checkpoint, gguf = models["qwen3-moe"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = CHATML
    llm = Llama(str(gguf), vocab_only=True)
    want = tuple(ChatTemplate(llm).prompt(llm, MESSAGES).tokens)
    llm.close()
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id])
    assert renderer.prompt(MESSAGES) == want
    messages = tuple((message["role"], message["content"]) for message in [*MESSAGES, ANSWER])
    example = renderer.example(Conversation(messages, "here"))
    assert example.tokens[: example.n_prompt] == want
    assert tokenizer.decode(example.tokens[example.n_prompt : -1]).startswith("yes")
    assert example.tokens[-1] == tokenizer.eos_token_id


def test_a_model_that_wants_its_first_token_gets_it_once(models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["qwen3-moe"][0])
    tokenizer.chat_template = CHATML
    plain = Renderer(tokenizer, [0]).prompt(MESSAGES)
    bos = tokenizer.eos_token
    tokenizer.bos_token = bos
    processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    for template in (CHATML, bos + CHATML):
        tokenizer.chat_template = template
        assert Renderer(tokenizer, [0]).prompt(MESSAGES) == (tokenizer.eos_token_id, *plain)
