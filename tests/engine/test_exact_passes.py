"""A token's logits on an x86 CPU: the same to the bit, whether it is decoded alone or with up to seven others.

So drafts change no choice, however close it is. The oracle is the engine itself, one token at a time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_cpp import llama_cpp as C

from swaa_local import LayerMode, Llama, Schedule
from tests.support.engine import GPU_LAYERS, cpu_features, quantize
from tests.support.tiny import random_tokens, write_tiny_gguf

HAS = cpu_features()
pytestmark = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.skipif(GPU_LAYERS > 0, reason="GPUs have kernels by the number of tokens"),
    pytest.mark.skipif(HAS.get("AVX2") != "1", reason="the kernel for quantized weights is for AVX2"),
    pytest.mark.skipif("AMX_INT8" in HAS, reason="AMX has weights of a form of its own"),
]
FULL, PREFILL, ALWAYS = LayerMode
PROMPT, N = 301, 33
TOKENS = random_tokens(PROMPT + N)
SPLITS = ([2] * 16, [3] * 11, [4] * 8, [5, 1] * 5, [6] * 5, [7, 2] * 3, [8] * 4)
FILE_TYPES = ["Q8_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_S", "Q6_K", "Q4_K_M"]
SCHEDULES = {
    "no schedule": None,
    "FA decode": Schedule(64, 4, (PREFILL,) * 4),
    "all modes": Schedule(40, 4, (ALWAYS, PREFILL, FULL, ALWAYS)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exact")
    plain = write_tiny_gguf(folder / "plain.gguf", n_embd=256, n_ff=1536)
    for name in FILE_TYPES:
        quantize(plain, folder / f"{name}.gguf", getattr(C, f"LLAMA_FTYPE_MOSTLY_{name}"))
    return {name: folder / f"{name}.gguf" for name in FILE_TYPES}


def logits(llm: Llama, sizes: list[int]) -> np.ndarray:
    """Of the tokens behind the prompt, evaluated in passes of these sizes."""
    llm.reset()
    llm.eval(TOKENS[:PROMPT])
    at = PROMPT
    for size in sizes:
        llm.eval(TOKENS[at : at + size], decode=True)
        at += size
    return llm.scores[PROMPT:at].copy()


def check(path: Path, schedule: Schedule | None, **kwargs) -> None:
    options = {"n_threads": 1, "n_threads_batch": 1, "flash_attn": True} | kwargs
    llm = Llama(str(path), swaa=schedule or False, n_ctx=512, n_ubatch=64, logits_all=True, **options)
    try:
        alone = logits(llm, [1] * N)
        assert len(np.unique(alone.argmax(1))) > 3
        for sizes in SPLITS:
            found = logits(llm, sizes)
            assert np.array_equal(found, alone[: len(found)]), f"passes of {sizes[:2]} tokens"
    finally:
        llm.close()


@pytest.mark.parametrize("name", FILE_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_token_says_the_same_beside_others(models, name, schedule):
    check(models[name], schedule)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", FILE_TYPES)
def test_mixtures_of_experts(tmp_path, name, schedule):
    """Of up to eight tokens any number chooses an expert."""
    plain = write_tiny_gguf(tmp_path / "plain.gguf", arch="qwen3moe", n_embd=256, n_ff=256)
    quantize(plain, tmp_path / "mixture.gguf", getattr(C, f"LLAMA_FTYPE_MOSTLY_{name}"))
    check(tmp_path / "mixture.gguf", schedule)


@pytest.mark.parametrize("kind", [0, 8, 2], ids=["F32", "Q8_0", "Q4_0"])
def test_with_every_kind_of_cache(models, kind):
    check(models["Q8_0"], SCHEDULES["all modes"], type_k=kind, type_v=kind)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_where_several_query_heads_share_a_head_of_the_cache(tmp_path, schedule):
    plain = write_tiny_gguf(tmp_path / "plain.gguf", n_embd=256, n_ff=512, n_head=8, n_head_kv=2)
    quantize(plain, tmp_path / "shared.gguf", C.LLAMA_FTYPE_MOSTLY_Q8_0)
    check(tmp_path / "shared.gguf", schedule)


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_with_every_number_of_threads(models, n_threads):
    check(models["Q4_K_M"], SCHEDULES["all modes"], n_threads=n_threads, n_threads_batch=n_threads)
