"""What an Apple GPU would leave to the CPU of a graph with a schedule, by llama.cpp's own account of it.

No Mac is needed: the graphs are those of this machine, and the function that the scheduler would ask is compiled from
the pinned source. What Metal's kernels compute is not tested here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C
import pytest

from source_tree import SDIST_ENV, SourceError, fetch_sdist, read_pin
from tests.support.engine import EngineModel
from tests.support.masks import Sched
from tests.support.metal import Gpu, Metal
from tests.support.program import ROOT
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens, with_own_windows
from tests.support.tiny_hybrid import hybrid, write_tiny_hybrid

pytestmark = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler"),
]

TOKENS = random_tokens(1100)
SCHEDULES = {
    "FA decode": Sched(100, 8, (PREFILL,) * 4),
    "no sinks": Sched(100, 0, (PREFILL,) * 4),
    "rings": Sched(100, 8, (ALWAYS,) * 4),
    "all modes": Sched(100, 8, (ALWAYS, FULL, PREFILL, FULL)),
}
LONG_CONTEXT = {"CONCAT f32 f32 -> f32", "CPY f16 f16 -> f16", "REPEAT f16 -> f16"}
"""Full layers in parts, under a mask that is made on the device."""
GATHERED = {"CPY f32 f16 -> f16", "FLASH_ATTN_EXT f32 f16 f16 f16 -> f32"}
"""The rows of a quantized cache."""
M1 = Gpu()
OLDER = Gpu(simdgroup_mm=False, bfloat=False)


@pytest.fixture(scope="module")
def metal(request, tmp_path_factory) -> Metal:
    """From the source archive that SWAA_UPSTREAM_SDIST names, or from pip's, which pytest's cache keeps.

    Skips where it cannot be had; under SWAA_REQUIRE_UPSTREAM that is a failure.
    """
    kept = Path(request.config.cache.mkdir("upstream")) / f"{read_pin().sha256}.tar.gz"
    if SDIST_ENV in os.environ or not kept.exists():
        try:
            sdist = fetch_sdist(read_pin(), tmp_path_factory.mktemp("download"))
        except SourceError as error:
            if os.environ.get("SWAA_REQUIRE_UPSTREAM"):
                pytest.fail(f"SWAA_REQUIRE_UPSTREAM is set, and yet: {error}", pytrace=False)
            pytest.skip(str(error))
        os.replace(shutil.copy(sdist, kept.with_suffix(f".{os.getpid()}")), kept)
    return Metal(kept, tmp_path_factory.mktemp("metal"))


@pytest.fixture
def refused(metal) -> Callable[..., dict[str, bool]]:
    """`refused(model, gpu=M1, tail=0, draft=False, n_seq_max=1, **EngineContext's keywords)`: the operations of a
    prompt and of some generated tokens, with their types, and whether Metal refuses any of the kind."""

    def ask_metal(
        model: EngineModel, *, gpu: Gpu = M1, tail: int = 0, draft: bool = False, n_seq_max: int = 1, **kwargs: Any
    ) -> dict[str, bool]:
        found: dict[str, bool] = {}

        @C.ggml_backend_sched_eval_callback
        def observe(tensor: int, _ask: bool, _user: int) -> bool:
            what = metal.describe(tensor)
            found[what] = found.get(what, False) or not metal.declares(tensor, gpu)
            return False

        settings = {"n_ctx": 2048 * n_seq_max, "n_batch": 600 * n_seq_max, "n_seq_max": n_seq_max}
        with model.context(**settings, cb_eval=observe, **kwargs) as ctx:
            for seq in range(n_seq_max):
                ctx.set_prompt_end(seq, 900 - tail)
            for start, end in ((0, 600), (600, 900)):
                ctx.decode([(TOKENS[p], p, seq) for p in range(start, end) for seq in range(n_seq_max)])
            if draft:
                ctx.set_draft_start(0, 900)
            for p in range(900, 903):
                ctx.decode([(TOKENS[p], p, seq) for seq in range(n_seq_max)])
        return found

    return ask_metal


def left(found: dict[str, bool]) -> list[str]:
    assert found
    return [what for what, is_refused in found.items() if is_refused]


@pytest.mark.parametrize("kv", ["F16", "BF16", "Q8_0", "Q4_0", "F32"])
@pytest.mark.parametrize("n_ubatch", [64, 600])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_is_left_to_the_cpu(load_model, refused, name, n_ubatch, kv):
    """Short ubatches, windows in blocks, full layers in parts, with a tail; while reading and while writing.

    Heads of 128, so that quantized caches are rotated.
    """
    found = refused(load_model(SCHEDULES[name], head_dim=128), n_ubatch=n_ubatch, kv=kv, tail=40)
    assert any(what.startswith("FLASH_ATTN_EXT ") for what in found)
    assert any(what.startswith("GET_ROWS ") for what in found)
    assert not left(found)


@pytest.mark.parametrize("kv", ["F16", "F32"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_is_left_to_the_cpu_without_flash_attention(load_model, refused, name, kv):
    found = refused(load_model(SCHEDULES[name], head_dim=128), flash="off", kv=kv)
    assert any(what.startswith("SOFT_MAX ") for what in found)
    assert not left(found)


@pytest.mark.parametrize("unified", [True, False])
def test_nothing_is_left_to_the_cpu_with_several_sequences(load_model, refused, unified):
    assert not left(refused(load_model(SCHEDULES["all modes"]), n_seq_max=3, unified=unified))


def test_a_draft_is_not_left_to_the_cpu(tiny_model_factory, refused):
    with EngineModel(tiny_model_factory(), SCHEDULES["all modes"]) as model:
        model.set_draft(64, 4)
        assert not left(refused(model, draft=True))


@pytest.mark.parametrize("modes", [(PREFILL, FULL, PREFILL, FULL), (ALWAYS, FULL, PREFILL, FULL)])
def test_nothing_of_other_families_is_left_to_the_cpu(load_model, tmp_path, refused, modes):
    """Experts, windows of the model's own, recurrent layers."""
    assert not left(refused(load_model(Sched(100, 8, modes), arch="qwen3moe")))
    own = with_own_windows(40, (False, True, False, True))
    assert not left(refused(load_model(Sched(100, 8, modes), **own), swa_full=False))
    with EngineModel(write_tiny_hybrid(tmp_path / "m.gguf"), hybrid(100, 8, modes)) as model:
        assert not left(refused(model))


def test_what_is_left_to_the_cpu_is_seen(load_model, refused):
    """GPUs without matrices of SIMD groups have no flash attention, those without bfloat none of it, and IQ4_NL caches
    are read on the CPU, but not by windows, whose rows are F16."""
    model = load_model(SCHEDULES["all modes"])
    assert {what.split()[0] for what in left(refused(model, gpu=OLDER))} == {"FLASH_ATTN_EXT"}
    on_older = left(refused(model, gpu=OLDER, kv="BF16"))
    assert "SET_ROWS f32 i64 bf16 -> bf16" in on_older
    assert left(refused(model, kv="IQ4_NL")) == ["FLASH_ATTN_EXT f32 iq4_nl iq4_nl f16 -> f32"]


@pytest.mark.parametrize(
    ("flash", "kv", "want"),
    [
        ("on", "F16", {"GET_ROWS i32 i32 -> i32", *LONG_CONTEXT}),
        ("on", "BF16", {"GET_ROWS i32 i32 -> i32", *LONG_CONTEXT}),
        ("on", "Q8_0", {"GET_ROWS q8_0 i32 -> f32", *GATHERED, *LONG_CONTEXT}),
        ("on", "Q4_0", {"GET_ROWS q4_0 i32 -> f32", *GATHERED, *LONG_CONTEXT}),
        ("off", "F16", {"CPY f32 f32 -> f32", "REPEAT f32 -> f32"}),
        ("off", "F32", {"CPY f32 f32 -> f32", "REPEAT f32 -> f32"}),
    ],
)
def test_what_a_schedule_adds_to_a_graph(load_model, refused, flash, kv, want):
    """The first table of docs/backends.md, with types; views apart."""
    without = set(refused(load_model(head_dim=128), flash=flash, kv=kv))
    added = set(refused(load_model(SCHEDULES["all modes"], head_dim=128), flash=flash, kv=kv)) - without
    assert {what for what in added if what.split()[0] not in ("VIEW", "RESHAPE", "PERMUTE")} == want
    page = (ROOT / "docs" / "backends.md").read_text()
    table = page[page.index("| op |") : page.index("\n\n", page.index("| op |"))]
    assert not [what for what in added if f"`{what.split()[0]}`" not in table]
