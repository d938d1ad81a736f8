"""`Llama` on converted GGUFs against transformers with explicit masks, over models, schedules, splits, caches.

The worst figure stands in pytest's summary: the largest difference of a logit at any position, prompt or decode, over
the standard deviation of the logits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.support.masks import Sched
from tests.support.tiny import ALWAYS, FULL, PREFILL

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is compared with transformers")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is compared with it")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed, so nothing is compared with transformers")

from swaa_local import Llama, SWAAConfig
from tests.support.engine import GPU_LAYERS, GPU_TOLERANCE, worst_ratio
from tests.support.program import succeeds
from tests.support.reference import TransformersModel
from tests.support.tiny_hf import KINDS, N_LAYER, convert_all, write_checkpoint

N_TOKENS, PROMPT = 300, 272
# Addresses of workers, HOST:PORT, separated by commas: the tests run with all layers there if this is set.
WORKERS = [address for address in os.environ.get("SWAA_TEST_WORKERS", "").split(",") if address]

CONFIGS = {
    "full": SWAAConfig(),
    "naive window": SWAAConfig(24),
    "window and sinks": SWAAConfig(24, keep_first=4),
    "FA decode, no sinks": SWAAConfig(24, force_fa_decode=True),
    "FA decode and sinks": SWAAConfig(24, keep_first=10, force_fa_decode=True),
    "full layers 1::2, FA decode": SWAAConfig(24, keep_first=4, force_fa_decode=True, non_sliding_layers=[1, 3]),
    "full layers 0::2, FA decode": SWAAConfig(24, keep_first=4, force_fa_decode=True, non_sliding_layers=[0, 2]),
    "full layers 0::2, rings": SWAAConfig(24, keep_first=4, non_sliding_layers=[0, 2]),
    "FA decode by layer": SWAAConfig(24, keep_first=4, force_fa_decode=[0, 3]),
    "all modes": SWAAConfig(24, keep_first=4, force_fa_decode=[1, 2], non_sliding_layers=[2]),
    "window above the ubatch": SWAAConfig(100, keep_first=8, force_fa_decode=[0, 1], non_sliding_layers=[3]),
}
TAILS = [0, 1, 5, 40]
SPLITS = [(512, 512), (512, 32), (64, 16), (32, 32), (7, 7)]


@dataclass(frozen=True)
class Cache:
    """How keys and values are held; `tolerance` in sigma, None for quantized ones, whose bound is full attention's."""

    flash: bool
    type_kv: int  # ggml type
    tolerance: float | None


CACHES = {
    "f32": Cache(False, 0, 1e-3),
    "f16": Cache(False, 1, 1e-2),
    "f16, flash attention": Cache(True, 1, 1e-2),
    "q8_0, flash attention": Cache(True, 8, None),
    "q4_0, flash attention": Cache(True, 2, None),
}

# Every configuration with every split and cache, the models in turns such that they too meet all of each.
GRID = [
    (list(KINDS)[(3 * i + j + 2 * k + i // 4) % len(KINDS)], config, split, cache)
    for i, config in enumerate(CONFIGS)
    for j, split in enumerate(SPLITS)
    for k, cache in enumerate(CACHES)
]


def schedule(config: SWAAConfig) -> Sched:
    """The modes of a configuration, written down again from DESIGN section 2."""

    def mode(layer: int) -> int:
        if config.sliding_window_size is None or layer in config.non_sliding_layers:
            return FULL
        fa_decode = config.force_fa_decode
        return PREFILL if (fa_decode if isinstance(fa_decode, bool) else layer in fa_decode) else ALWAYS

    return Sched(config.sliding_window_size or 1, config.keep_first, tuple(mode(i) for i in range(N_LAYER)))


@dataclass(eq=False)
class Subject:
    """One model: its checkpoint and GGUF, tokens, references by configuration."""

    checkpoint: Path
    gguf: Path
    tokens: list[int] = field(default_factory=list)

    @functools.cached_property
    def transformer(self) -> TransformersModel:
        model = TransformersModel(self.checkpoint)
        self.tokens = np.random.default_rng(3).integers(10, model.model.config.vocab_size, N_TOKENS).tolist()
        return model

    @functools.cached_property
    def references(self) -> dict[str, np.ndarray]:
        model = self.transformer
        return {name: model.logits(self.tokens, schedule(config), PROMPT) for name, config in CONFIGS.items()}

    @functools.cache  # noqa: B019 - subjects live as long as the module
    def reference_with_tail(self, config: str, tail: int) -> np.ndarray:
        model = self.transformer
        return model.logits(self.tokens, schedule(CONFIGS[config]), PROMPT - tail)

    def run(
        self, config: str | None, split: tuple[int, int], cache: Cache, gguf: Path | None = None, tail: int = 0
    ) -> np.ndarray:
        """Logits of the engine; config None: the schedule that the file holds."""
        llm = Llama(
            str(gguf or self.gguf),
            swaa=None if config is None else dataclasses.replace(CONFIGS[config], prompt_tail=tail),
            n_ctx=512,
            n_batch=split[0],
            n_ubatch=split[1],
            flash_attn=cache.flash,
            type_k=cache.type_kv,
            type_v=cache.type_kv,
            logits_all=True,
            n_threads=1,
            n_threads_batch=1,
            n_gpu_layers=-1 if WORKERS else GPU_LAYERS,
            rpc_servers=WORKERS,
        )
        try:
            llm.eval(self.tokens[:PROMPT])
            for token in self.tokens[PROMPT:]:
                llm.eval([token], decode=True)
            return llm.scores[:N_TOKENS].copy()
        finally:
            llm.close()

    @functools.cache  # noqa: B019 - subjects live as long as the module
    def full_attention_error(self, cache: Cache) -> float:
        return rms(self.run("full", SPLITS[0], cache) - self.references["full"])


def rms(a: np.ndarray) -> float:
    return float(np.sqrt((a**2).mean()))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("parity")
    made = {}
    for i, kind in enumerate(KINDS):
        made[kind] = Subject(write_checkpoint(root / str(i), kind), root / f"{i}.gguf")
    convert_all({subject.checkpoint: subject.gguf for subject in made.values()})
    return made


def test_the_grid_covers_all_pairs():
    for a, b in itertools.combinations(range(4), 2):
        pairs = {(row[a], row[b]) for row in GRID}
        assert len(pairs) == len({row[a] for row in GRID}) * len({row[b] for row in GRID})


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_far_apart(subjects, kind):
    """The references of any two configurations differ by more than ten times what a run may be off."""
    references = subjects[kind].references
    for a, b in itertools.combinations(CONFIGS, 2):
        assert worst_ratio(references[a], references[b]) > 0.1, (a, b)


@pytest.mark.parametrize(("kind", "config", "split", "cache"), GRID, ids=lambda value: str(value))
def test_parity(subjects, record_property, kind, config, split, cache):
    subject = subjects[kind]
    references = subject.references
    got = subject.run(config, split, CACHES[cache])
    others = [name for name in CONFIGS if name != config]
    tolerance = CACHES[cache].tolerance
    if tolerance is None:
        error = rms(got - references[config])
        assert error < 3 * subject.full_attention_error(CACHES[cache])
        assert all(rms(got - references[name]) > 1.5 * error for name in others)
    else:
        worst = worst_ratio(got, references[config])
        record_property("parity", (float(worst), cache, kind, config, "/".join(map(str, split))))
        assert worst < (GPU_TOLERANCE if GPU_LAYERS else tolerance)
        assert all(worst_ratio(got, references[name]) > (5 if GPU_LAYERS else 10) * worst for name in others)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_parity_with_a_tail(subjects, config, split, tail):
    """The last tokens of the prompt are decode tokens, in every configuration and split; models take turns."""
    turn = list(CONFIGS).index(config) + SPLITS.index(split) + 2 * TAILS.index(tail)
    subject = subjects[list(KINDS)[turn % len(KINDS)]]
    cache = CACHES["f16, flash attention" if turn % 2 else "f32"]
    want = subject.reference_with_tail(config, tail)
    worst = worst_ratio(subject.run(config, split, cache, tail=tail), want)
    assert worst < (GPU_TOLERANCE if GPU_LAYERS else cache.tolerance)
    if tail > 1 and PREFILL in schedule(CONFIGS[config]).layer_modes:
        assert worst_ratio(subject.references[config], want) > (5 if GPU_LAYERS else 10) * worst


@pytest.mark.parametrize(("kind", "options"), [("qwen3", []), ("qwen3-moe", ["--pre-tokenizer", "qwen2"])])
def test_parity_of_what_convert_makes(subjects, tmp_path, kind, options):
    """The command on a checkpoint, with the schedule in the file; SentencePiece and BPE."""
    subject, gguf = subjects[kind], tmp_path / "out.gguf"
    schedule_options = ["--window", "24", "--sinks", "4", "--full-layers", "1::2", "--fa-decode"]
    succeeds("convert", subject.checkpoint, "-o", gguf, "--outtype", "f32", *schedule_options, *options)
    got = subject.run(None, (64, 16), CACHES["f32"], gguf)
    limit = GPU_TOLERANCE if GPU_LAYERS else 1e-3
    assert worst_ratio(got, subject.references["full layers 1::2, FA decode"]) < limit
