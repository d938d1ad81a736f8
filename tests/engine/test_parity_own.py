"""Models with sliding windows of their own against transformers, in the manner of `test_parity`: schedules for their
full layers, over models, splits and caches, while the layers with a window keep it.

In the reference, transformers makes the masks of those layers itself.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is compared with transformers")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is compared with it")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so nothing is compared with transformers")

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
    make_subjects,
)
from tests.support.tiny_hf import OWN_KINDS

GRID = grid(OWN_KINDS, lambda i, j, k: i + j + 3 * k + i // 3)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    return make_subjects(tmp_path_factory.mktemp("parity"), OWN_KINDS)


def test_the_grid_covers_all_pairs():
    assert covers_all_pairs(GRID)


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_costs_are_those_of_the_engine(subjects, kind):
    subject = subjects[kind]
    check_costs(subject.gguf, {"full": None, "all modes": subject.schedule("all modes")})


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_references_are_far_apart(subjects, kind):
    check_references(subjects[kind])


@pytest.mark.parametrize(("kind", "config", "split", "cache"), GRID, ids=lambda value: str(value))
def test_parity(subjects, record_property, kind, config, split, cache):
    # Configurations differ in half of the layers or fewer, and a quantized cache rounds in all of them.
    check_parity(subjects[kind], (kind, config, split, cache), record_property, apart=1.1)


@pytest.mark.parametrize("tail", TAILS[1:])
@pytest.mark.parametrize("split", SPLITS[1:3], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_parity_with_a_tail(subjects, config, split, tail):
    """The last tokens of the prompt are decode tokens; models take turns."""
    turn = list(CONFIGS).index(config) + 3 * SPLITS.index(split) + 5 * TAILS.index(tail)
    cache = CACHES["f16, flash attention" if turn % 2 else "f32"]
    check_tail(subjects[list(OWN_KINDS)[turn % len(OWN_KINDS)]], config, split, cache, tail)


@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("swa_full", [False, True])
def test_all_cells_for_the_windows_of_the_model_change_nothing(subjects, kind, swa_full):
    """`swa_full` only keeps what the model's own windows have left behind."""
    subject, cache = subjects[kind], CACHES["f16, flash attention"]
    got = subject.run("all modes", (512, 32), cache, swa_full=swa_full)
    assert worst_ratio(got, subject.references["all modes"]) < (GPU_TOLERANCE if GPU_LAYERS else cache.tolerance)
