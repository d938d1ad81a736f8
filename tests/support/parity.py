"""What a parity test compares: configurations, splits of a batch, caches, and one model run by the engine and by
transformers.

Layers of a configuration are counted among those that can slide; `Subject.sliding` says which these are in the model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swaa_local import Llama, SWAAConfig
from swaa_local.engine.options import SPLIT_MODES
from tests.support.engine import GPU_LAYERS, GPU_TOLERANCE, worst_ratio
from tests.support.masks import Sched
from tests.support.reference import TransformersModel
from tests.support.tiny import ALWAYS, FULL, PREFILL
from tests.support.tiny_hf import N_LAYER, convert_all, write_checkpoint
from tests.support.tiny_hf_own import ROUNDING

N_TOKENS, PROMPT = 300, 272
# Addresses of workers, HOST:PORT, separated by commas: the tests run with all layers there if this is set.
WORKERS = [address for address in os.environ.get("SWAA_TEST_WORKERS", "").split(",") if address]
# How several GPUs share the model, as -sm says it.
SPLIT_MODE = SPLIT_MODES.index(os.environ.get("SWAA_TEST_SPLIT_MODE", "layer"))

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


Row = tuple[str, str, tuple[int, int], str]
"""Kind of model, configuration, split and cache."""


def grid(kinds: Iterable[str], turn: Callable[[int, int, int], int]) -> list[Row]:
    """Every configuration with every split and cache, the models in turns such that they too meet all of each."""
    names = list(kinds)
    return [
        (names[turn(i, j, k) % len(names)], config, split, cache)
        for i, config in enumerate(CONFIGS)
        for j, split in enumerate(SPLITS)
        for k, cache in enumerate(CACHES)
    ]


def covers_all_pairs(rows: list[Row]) -> bool:
    for a, b in itertools.combinations(range(4), 2):
        pairs = {(row[a], row[b]) for row in rows}
        if len(pairs) != len({row[a] for row in rows}) * len({row[b] for row in rows}):
            return False
    return True


def schedule(config: SWAAConfig, sliding: tuple[int, ...] = tuple(range(N_LAYER)), n_layer: int = N_LAYER) -> Sched:
    """The modes of a configuration, written down again from DESIGN section 2; layers that cannot slide are full."""

    def mode(layer: int) -> int:
        if config.sliding_window_size is None or layer in config.non_sliding_layers:
            return FULL
        fa_decode = config.force_fa_decode
        return PREFILL if (fa_decode if isinstance(fa_decode, bool) else layer in fa_decode) else ALWAYS

    modes = [FULL] * n_layer
    for number, layer in enumerate(sliding):
        modes[layer] = mode(number)
    return Sched(config.sliding_window_size or 1, config.keep_first, tuple(modes))


@dataclass(eq=False)
class Subject:
    """One model: its checkpoint and GGUF, tokens, references by configuration.

    sliding: the layers that can slide. rounding: of the model's operators, in sigma.
    """

    checkpoint: Path
    gguf: Path
    sliding: tuple[int, ...] = tuple(range(N_LAYER))
    n_layer: int = N_LAYER
    rounding: float = 0.0

    def config(self, name: str) -> SWAAConfig:
        """The configuration for this model's layers."""
        config = CONFIGS[name]
        full = [self.sliding[i] for i in config.non_sliding_layers]
        decode = config.force_fa_decode
        if not isinstance(decode, bool):
            decode = [self.sliding[i] for i in decode]
        return dataclasses.replace(config, non_sliding_layers=full, force_fa_decode=decode)

    def schedule(self, name: str) -> Sched:
        return schedule(CONFIGS[name], self.sliding, self.n_layer)

    @functools.cached_property
    def transformer(self) -> TransformersModel:
        return TransformersModel(self.checkpoint, self.sliding)

    @functools.cached_property
    def tokens(self) -> list[int]:
        n_vocab = self.transformer.model.config.vocab_size
        return [int(token) for token in np.random.default_rng(3).integers(10, n_vocab, N_TOKENS)]

    @functools.cached_property
    def references(self) -> dict[str, np.ndarray]:
        model = self.transformer
        return {name: model.logits(self.tokens, self.schedule(name), PROMPT) for name in CONFIGS}

    @functools.cache  # noqa: B019 - subjects live as long as the module
    def reference_with_tail(self, config: str, tail: int) -> np.ndarray:
        model = self.transformer
        return model.logits(self.tokens, self.schedule(config), PROMPT - tail)

    def run(
        self,
        config: str | None,
        split: tuple[int, int],
        cache: Cache,
        gguf: Path | None = None,
        tail: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """Logits of the engine; config None: the schedule that the file holds. options: of `Llama`."""
        llm = Llama(
            str(gguf or self.gguf),
            swaa=None if config is None else dataclasses.replace(self.config(config), prompt_tail=tail),
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
            split_mode=SPLIT_MODE,
            **options,
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


def make_subjects(root: Path, kinds: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Subject]:
    """A checkpoint and its GGUF of each kind of `tiny_hf`."""
    made = {}
    for i, (kind, (_, settings)) in enumerate(kinds.items()):
        types = settings.get("layer_types", ["full_attention"] * N_LAYER)
        sliding = tuple(layer for layer, each in enumerate(types) if each == "full_attention")
        checkpoint = write_checkpoint(root / str(i), kind)
        made[kind] = Subject(checkpoint, root / f"{i}.gguf", sliding, len(types), ROUNDING.get(kind, 0.0))
    convert_all({subject.checkpoint: subject.gguf for subject in made.values()})
    return made


def check_references(subject: Subject) -> None:
    """Those of any two configurations differ by more than ten times what a run may be off."""
    for a, b in itertools.combinations(CONFIGS, 2):
        assert worst_ratio(subject.references[a], subject.references[b]) > 0.1, (a, b)


def check_parity(
    subject: Subject, row: Row, record_property: Callable[[str, object], None], *, apart: float = 1.5
) -> None:
    """Assert that the engine gives the reference's logits, and those of no other configuration.

    apart: how many times a quantized cache's error the others are away at least.
    """
    kind, config, split, cache = row
    references = subject.references
    got = subject.run(config, split, CACHES[cache])
    others = [name for name in CONFIGS if name != config]
    tolerance = CACHES[cache].tolerance
    if tolerance is None:
        error = rms(got - references[config])
        assert error < 3 * subject.full_attention_error(CACHES[cache])
        assert all(rms(got - references[name]) > apart * error for name in others)
    else:
        worst = worst_ratio(got, references[config])
        record_property("parity", (float(worst), cache, kind, config, "/".join(map(str, split))))
        assert worst < (GPU_TOLERANCE if GPU_LAYERS else max(tolerance, subject.rounding))
        assert all(worst_ratio(got, references[name]) > (5 if GPU_LAYERS else 10) * worst for name in others)


def check_tail(subject: Subject, config: str, split: tuple[int, int], cache: Cache, tail: int) -> None:
    """Assert that the last tokens of the prompt are decode tokens."""
    want = subject.reference_with_tail(config, tail)
    worst = worst_ratio(subject.run(config, split, cache, tail=tail), want)
    assert cache.tolerance is not None
    assert worst < (GPU_TOLERANCE if GPU_LAYERS else max(cache.tolerance, subject.rounding))
    if tail > 1 and PREFILL in subject.schedule(config).layer_modes:
        assert worst_ratio(subject.references[config], want) > (5 if GPU_LAYERS else 10) * worst
