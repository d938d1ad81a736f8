"""The training script: the model is transformers' Qwen3, the masks are the definition's, and all of it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.masks import Sched, layer_masks
from tests.support.program import ROOT, environment

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is trained")
pytest.importorskip(
    "tokenizers", reason="tokenizers, which transformers needs, is not installed, so nothing is trained"
)
pytest.importorskip("safetensors", reason="safetensors, which transformers needs, is not installed")
import torch

from needle.model import Needle, NeedleConfig, load_checkpoint, save_checkpoint
from needle.rows import RowMaker, tokenizer_texts
from needle.schedules import Bench, Cell, choose_full_layers, visible
from needle.tokenizer import Encoder, train_tokenizer
from needle.trainer import Curriculum, Stage, steps_for, train
from swaa_local import LayerMode, SWAAConfig

TINY = NeedleConfig(
    vocab_size=1200, hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=32, max_position_embeddings=512
)
SENTENCES = ["Nothing to be learnt is said in this sentence."]
CURRICULUM = Curriculum(4, 512, (Stage(0.5, 256), Stage(0.5, 512)))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer(tokenizer_texts(0, SENTENCES, 200), TINY.vocab_size))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(encoder: Encoder, workers: int, curriculum: Curriculum = CURRICULUM, deadline: float = 1e18):
    model = Needle(TINY)
    model.initialize(3)
    outcome = train(
        model,
        RowMaker(encoder, 3, SENTENCES),
        curriculum,
        device="cpu",
        workers=workers,
        deadline=deadline,
        log=lambda text: None,
        save=lambda model: None,
        log_every=1,
    )
    return model, outcome


def test_the_model_is_the_qwen3_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = Needle(TINY)
    model.initialize(0)
    for norm in (p for p in model.parameters() if p.ndim == 1):
        norm.data += 0.3 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(1))
    save_checkpoint(model, tmp_path, eos=5, pad=4)
    model = load_checkpoint(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(TINY.vocab_size, (2, 100), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens)), reference(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.std().item())
    assert reference.config.eos_token_id == reference.generation_config.eos_token_id == 5
    assert not list(tmp_path.glob("*.part"))


def test_masks_are_those_of_the_definition() -> None:
    ends = [20, 33]
    for mode in LayerMode:
        ours = visible(40, torch.tensor(ends), mode, 8, 3)
        for index, end in enumerate(ends):
            expected = layer_masks(Sched(8, 3, (int(mode),)), 40, end)[0]
            assert np.array_equal(ours[min(index, len(ours) - 1), 0].numpy(), expected)


def test_data_workers_change_nothing(encoder: Encoder) -> None:
    _, alone = trained(encoder, 0)
    _, helped = trained(encoder, 2)
    assert alone.weights_sha256 == helped.weights_sha256
    assert [record["loss"] for record in alone.records] == [record["loss"] for record in helped.records]
    assert alone.records[-1]["loss"] < alone.records[0]["loss"]
    assert (alone.n_steps, alone.n_tokens, alone.stopped_early) == (4, 2048, False)


def test_training_stops_when_the_time_is_up(encoder: Encoder) -> None:
    _, outcome = trained(encoder, 0, deadline=time.monotonic())
    assert (outcome.n_steps, outcome.stopped_early) == (1, True)


def test_the_curriculum_grows_and_keeps_short_rows() -> None:
    c = Curriculum(1000)
    lengths = [c.kind(step).length for step in range(1000)]
    assert lengths[0] == 512
    assert max(lengths[-100:]) == 8192
    assert min(lengths[-100:]) == 512
    assert all(c.n_rows(step) * c.kind(step).length == 65536 for step in range(1000))
    assert all(c.first_row(step) + c.n_rows(step) <= c.first_row(step + 1) for step in range(999))
    shares = [c.kind(step).section_share for step in range(1000)]
    assert (shares[0], shares[-1]) == (0.15, 0.55)
    assert shares == sorted(shares)
    rates = [c.lr(step) for step in range(1000)]
    assert max(rates) == rates[200] == 2e-3
    assert rates[-1] == pytest.approx(0.02 * 2e-3, rel=0.01)
    seconds = {512: 1.0, 1024: 1.0, 2048: 1.0, 4096: 1.0, 8192: 1.0}
    assert steps_for(1234, seconds, c) == 1200


def test_a_question_counts_if_its_whole_reply_is_the_most_likely(encoder: Encoder) -> None:
    maker = RowMaker(encoder, 3, SENTENCES)
    asked = [maker.question(i, "statements", 256, think=True) for i in range(4)]

    wrong = {2: 1}

    class Oracle(Needle):
        """Says what it was given, but for the questions in `wrong`, where one token of the reply is another."""

        def forward(self, tokens, masks=None, dtype=torch.float32):
            said = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
            for row, offset in wrong.items():
                said[row, asked[row].prompt_end - 1 + offset] += 1
            return torch.nn.functional.one_hot(said % TINY.vocab_size, TINY.vocab_size).float()

        def logits(self, hidden):
            return hidden

    bench = Bench(Oracle(TINY), maker, encoder.special["<|endoftext|>"], "cpu")
    score = bench.score(SWAAConfig(64), Cell("statements", 256, True), 4)
    assert (score.n, score.right, score.accuracy) == (4, 3, 0.75)


@pytest.mark.parametrize("tail", [0, 5, 1000])
def test_the_tail_reads_everything(encoder: Encoder, tail: int) -> None:
    """The masks that the model is asked with: those of a prompt that ends `tail` tokens earlier, or at its start."""
    maker = RowMaker(encoder, 3, SENTENCES)
    question = maker.question(0, "statements", 256, think=True)
    seen: list[torch.Tensor] = []

    class Watched(Needle):
        def forward(self, tokens, masks=None, dtype=torch.float32):
            seen.extend(masks)
            return super().forward(tokens, masks, dtype)

    bench = Bench(Watched(TINY), maker, encoder.special["<|endoftext|>"], "cpu")
    bench.score(SWAAConfig(64, 4, True, prompt_tail=tail), Cell("statements", 256, True), 1)
    end = max(0, question.prompt_end - tail)
    expected = layer_masks(Sched(64, 4, (int(LayerMode.PREFILL),)), len(question.tokens), end)[0]
    assert len(seen) == TINY.num_hidden_layers
    for mask in seen:
        assert np.array_equal(mask[0, 0].numpy(), expected)


@pytest.mark.parametrize(
    ("needed", "chosen", "n_tried"),
    [((), (), 2), ((3,), (3,), 6), ((1, 2), (1, 2), 12), ((0, 2, 3), (0, 2, 3), 14), (None, (0, 1, 2, 3), 1)],
)
def test_the_fewest_full_layers_are_chosen(
    needed: tuple[int, ...] | None, chosen: tuple[int, ...], n_tried: int
) -> None:
    def worst(layers: tuple[int, ...]) -> float:
        return 0.5 if needed is None else 1 - 0.1 * len(set(needed) - set(layers))

    choice = choose_full_layers(worst, 4, 0.97)
    assert choice.full_layers == chosen
    assert len(choice.tried) == n_tried


def test_the_script_trains_evaluates_and_says_how_to_convert(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(ROOT / "scripts" / "train_needle.py"), "--out", str(out), "--device", "cpu"]
    command += ["--smoke", "--steps", "3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    log = json.loads((out / "log.json").read_text())
    assert log["training"]["n_steps"] == len(log["training"]["records"]) == 3
    assert log["training"]["records"][-1]["loss"] < 8
    shown = {row["schedule"] for row in log["evaluation"]["table"]}
    assert shown >= {"full attention", "naive SWA", "recipe", "recipe + tail"}
    assert log["convert"].startswith("swaa-local convert DIR -o needle.gguf")
    assert log["convert"].endswith(" --fa-decode --tail 32")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "log.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "pass --force" in again.stderr
