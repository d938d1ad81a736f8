"""`Llama` on converted GGUFs of hybrid models against transformers: the grid of `test_parity`, where some layers attend
and the others are recurrent. The mask of the layers with attention alone is another."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is compared with transformers")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is compared with it")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so nothing is compared with transformers")

from safetensors.torch import load_file, save_file

from swaa_local.model_file.model_info import read_model_info
from tests.support.context_cost import check_costs
from tests.support.engine import GPU_LAYERS, GPU_TOLERANCE, worst_ratio
from tests.support.parity import (
    CACHES,
    CONFIGS,
    SPLITS,
    TAILS,
    Subject,
    check_parity,
    check_references,
    check_tail,
    covers_all_pairs,
    grid,
)
from tests.support.program import succeeds
from tests.support.tiny_hf import convert_all
from tests.support.tiny_hf_hybrid import HYBRIDS, write_hybrid

GRID = grid(HYBRIDS, lambda i, j, k: i + j + 3 * k + i // 3)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("hybrids")
    made = {}
    for i, (kind, hybrid) in enumerate(HYBRIDS.items()):
        checkpoint = write_hybrid(root / str(i), kind)
        made[kind] = Subject(checkpoint, root / f"{i}.gguf", hybrid.attending, hybrid.n_layer)
    convert_all({subject.checkpoint: subject.gguf for subject in made.values()})
    return made


def test_the_grid_covers_all_pairs():
    assert covers_all_pairs(GRID)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_file_tells_which_layers_attend(subjects, kind):
    subject = subjects[kind]
    info = read_model_info(subject.gguf)
    assert info.unsupported is None
    assert (info.layers.sliding, info.layers.n_layer) == (subject.sliding, subject.n_layer)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_costs_are_those_of_the_engine(subjects, kind):
    subject = subjects[kind]
    # Of MiniMax-Text-01 llama.cpp makes no context for sequences with cells of their own, with a schedule or without.
    apart = kind != "minimax-01"
    check_costs(subject.gguf, {"full": None, "all modes": subject.schedule("all modes")}, apart=apart)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_references_are_far_apart(subjects, kind):
    check_references(subjects[kind])


@pytest.mark.parametrize(("kind", "config", "split", "cache"), GRID, ids=lambda value: str(value))
def test_parity(subjects, record_property, kind, config, split, cache):
    check_parity(subjects[kind], (kind, config, split, cache), record_property)


@pytest.mark.parametrize("tail", TAILS[1:])
@pytest.mark.parametrize("split", SPLITS[1:3], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_parity_with_a_tail(subjects, config, split, tail):
    """The last tokens of the prompt are decode tokens; models take turns."""
    turn = list(CONFIGS).index(config) + 3 * SPLITS.index(split) + 5 * TAILS.index(tail)
    cache = CACHES["f16, flash attention" if turn % 2 else "f32"]
    check_tail(subjects[list(HYBRIDS)[turn % len(HYBRIDS)]], config, split, cache, tail)


@pytest.mark.parametrize("kind", ["qwen3.5", "lfm2", "nemotron-h-moe", "bamba"])
def test_parity_of_what_convert_makes(subjects, tmp_path, kind):
    """The command on a checkpoint: a slice counts layers with attention, and a number names a layer of the model."""
    subject, gguf = subjects[kind], tmp_path / "out.gguf"
    options = ["--window", "24", "--sinks", "4", "--fa-decode", "--pre-tokenizer", "qwen2"]
    succeeds("convert", subject.checkpoint, "-o", gguf, "--outtype", "f32", "--full-layers", "1::2", *options)
    got = subject.run(None, (64, 16), CACHES["f32"], gguf)
    assert worst_ratio(got, subject.references["full layers 1::2, FA decode"]) < (GPU_TOLERANCE if GPU_LAYERS else 1e-3)
    again, listed = tmp_path / "again.gguf", ",".join(str(subject.sliding[nth]) for nth in (0, 2))
    succeeds("convert", gguf, "-o", again, "--full-layers", listed, *options[:5])
    got = subject.run(None, (64, 16), CACHES["f32"], again)
    assert worst_ratio(got, subject.references["full layers 0::2, FA decode"]) < (GPU_TOLERANCE if GPU_LAYERS else 1e-3)


@pytest.mark.parametrize("kind", ["qwen3.5", "qwen3-next"])
def test_parity_of_what_transformers_has_saved(subjects, tmp_path, kind):
    """It loads no layers for multi-token prediction, which upstream's converter expects in these."""
    subject, checkpoint, gguf = subjects[kind], tmp_path / "saved", tmp_path / "out.gguf"
    shutil.copytree(subject.checkpoint, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("mtp.")}
    assert len(kept) < len(weights)
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    options = ["--window", "24", "--fa-decode", "--pre-tokenizer", "qwen2"]
    succeeds("convert", checkpoint, "-o", gguf, "--outtype", "f32", *options)
    got = subject.run(None, (64, 16), CACHES["f32"], gguf)
    assert worst_ratio(got, subject.references["FA decode, no sinks"]) < (GPU_TOLERANCE if GPU_LAYERS else 1e-3)


@pytest.mark.parametrize(
    ("kind", "settings"), [("bamba", "attn_rotary_emb"), ("nemotron-h", "hybrid_override_pattern")]
)
def test_parity_of_what_transformers_has_saved_in_its_own_words(subjects, tmp_path, kind, settings):
    """It leaves out settings that upstream's converter reads, and says the same in others."""
    subject, checkpoint, gguf = subjects[kind], tmp_path / "saved", tmp_path / "out.gguf"
    shutil.copytree(subject.checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    del config[settings]
    (checkpoint / "config.json").write_text(json.dumps(config))
    options = ["--window", "24", "--fa-decode", "--pre-tokenizer", "qwen2"]
    succeeds("convert", checkpoint, "-o", gguf, "--outtype", "f32", *options)
    got = subject.run(None, (64, 16), CACHES["f32"], gguf)
    assert worst_ratio(got, subject.references["FA decode, no sinks"]) < (GPU_TOLERANCE if GPU_LAYERS else 1e-3)
