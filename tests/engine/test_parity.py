"""`Llama` on converted GGUFs against transformers with explicit masks, over models, schedules, splits, caches.

The worst figure stands in pytest's summary: the largest difference of a logit at any position, prompt or decode, over
the standard deviation of the logits.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is compared with transformers")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is compared with it")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so nothing is compared with transformers")

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
    make_subjects,
)
from tests.support.program import succeeds
from tests.support.tiny_hf import KINDS

GRID = grid(KINDS, lambda i, j, k: i + j + 3 * k + i // 2)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    return make_subjects(tmp_path_factory.mktemp("parity"), KINDS)


def test_the_grid_covers_all_pairs():
    assert covers_all_pairs(GRID)


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_far_apart(subjects, kind):
    check_references(subjects[kind])


@pytest.mark.parametrize(("kind", "config", "split", "cache"), GRID, ids=lambda value: str(value))
def test_parity(subjects, record_property, kind, config, split, cache):
    check_parity(subjects[kind], (kind, config, split, cache), record_property)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_parity_with_a_tail(subjects, config, split, tail):
    """The last tokens of the prompt are decode tokens, in every configuration and split; models take turns."""
    turn = list(CONFIGS).index(config) + SPLITS.index(split) + 2 * TAILS.index(tail)
    cache = CACHES["f16, flash attention" if turn % 2 else "f32"]
    check_tail(subjects[list(KINDS)[turn % len(KINDS)]], config, split, cache, tail)


@pytest.mark.parametrize(("kind", "options"), [("qwen3", []), ("qwen3-moe", ["--pre-tokenizer", "qwen2"])])
def test_parity_of_what_convert_makes(subjects, tmp_path, kind, options):
    """The command on a checkpoint, with the schedule in the file; SentencePiece and BPE."""
    subject, gguf = subjects[kind], tmp_path / "out.gguf"
    schedule_options = ["--window", "24", "--sinks", "4", "--full-layers", "1::2", "--fa-decode"]
    succeeds("convert", subject.checkpoint, "-o", gguf, "--outtype", "f32", *schedule_options, *options)
    got = subject.run(None, (64, 16), CACHES["f32"], gguf)
    limit = GPU_TOLERANCE if GPU_LAYERS else 1e-3
    assert worst_ratio(got, subject.references["full layers 1::2, FA decode"]) < limit
