"""How the engine takes a schedule: from the file, from the C interface, and what it refuses, with a reason."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import psutil
import pytest
from gguf import GGUFValueType as T
from gguf.gguf_writer import GGUFValue

import gguf_faults
from swaa_local import Llama
from swaa_local.errors import ModelLoadError
from swaa_local.needle.model import bundled_model
from tests.support.engine import EngineError, EngineModel, assert_close
from tests.support.foreign import FOREIGN
from tests.support.masks import Sched
from tests.support.program import environment
from tests.support.reference_numpy import forward
from tests.support.tiny import ALWAYS, FULL, PREFILL, random_tokens, write_tiny_gguf

pytestmark = pytest.mark.usefixtures("engine")

SCHEDULE = Sched(24, 4, (ALWAYS, FULL, PREFILL, ALWAYS))
OTHER = Sched(40, 0, (PREFILL, PREFILL, FULL, FULL))
TOKENS = random_tokens(150)
EXACT = 1e-3


def logits(model: EngineModel, n_prompt: int = 130) -> np.ndarray:
    with model.context(flash="off", kv="F32", n_ubatch=32) as ctx:
        return ctx.run(TOKENS, n_prompt)


def test_schedule_from_the_file(tiny_model_factory):
    with EngineModel(tiny_model_factory(schedule=SCHEDULE)) as model:
        assert model.get_schedule() == SCHEDULE
        assert_close(logits(model), forward(TOKENS, SCHEDULE, 130), EXACT)


def test_no_schedule(tiny_model):
    with EngineModel(tiny_model) as model:
        assert model.get_schedule() is None
        assert_close(logits(model), forward(TOKENS), EXACT)


def test_set_replaces_the_file_s_schedule(tiny_model_factory):
    with EngineModel(tiny_model_factory(schedule=SCHEDULE)) as model:
        model.set_schedule(OTHER)
        assert model.get_schedule() == OTHER
        assert_close(logits(model), forward(TOKENS, OTHER, 130), EXACT)


def test_set_full_switches_a_schedule_off(tiny_model_factory):
    with EngineModel(tiny_model_factory(schedule=SCHEDULE)) as model, EngineModel(tiny_model_factory()) as plain:
        model.set_schedule(Sched(24, 4, (FULL,) * 4))
        assert np.array_equal(logits(model), logits(plain))
        with model.context() as ctx, plain.context() as plain_ctx:
            assert ctx.kv_bytes() == plain_ctx.kv_bytes()


def test_a_context_keeps_the_schedule_it_was_made_with(tiny_model):
    with EngineModel(tiny_model, SCHEDULE) as model, model.context(flash="off", kv="F32", n_ubatch=32) as old:
        old.set_prompt_end(0, 130)
        before = old.feed(TOKENS[:100])
        model.set_schedule(OTHER)
        after = [old.feed(TOKENS[100:130])] + [old.feed([t]) for t in TOKENS[130:]]
        assert_close(np.concatenate([before, *after]), forward(TOKENS, SCHEDULE, 130), EXACT, "old")
        assert_close(logits(model), forward(TOKENS, OTHER, 130), EXACT, "new")
        old.clear()
        assert_close(old.run(TOKENS, 130), forward(TOKENS, SCHEDULE, 130), EXACT, "old, cleared")


def test_huge_window_and_sinks_are_full_attention(tiny_model):
    """No overflow on the way to the ring's size or in the mask, up to 2^30, which no context reaches."""
    top = 2**30
    for schedule in (Sched(top, top, (ALWAYS,) * 4), Sched(top, 4, (PREFILL,) * 4), Sched(8, top, (ALWAYS,) * 4)):
        with EngineModel(tiny_model, schedule) as model:
            assert model.get_schedule() == schedule
            assert_close(logits(model), forward(TOKENS), EXACT, schedule)


@pytest.mark.skipif(not psutil.LINUX, reason="this system does not limit what is reserved")
def test_a_huge_window_reserves_no_more_than_the_cache(tiny_model_factory):
    path = tiny_model_factory(schedule=Sched(2**30, 4, (ALWAYS,) * 4))
    code = (
        "import psutil, resource, sys\n"
        "from swaa_local import Llama\n"
        "llm = Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1)\n"
        "used = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "llm.eval(llm.tokenize(b'hello'))\n"
        "llm.eval([5], decode=True)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], env=environment(), check=True)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"qwen3.block_count": 2**31}, "hparams.n_layer_all > 0 && hparams.n_layer_all <= LLAMA_MAX_LAYERS"),
        ({"qwen3.nextn_predict_layers": 2**32 - 1}, "hparams.n_layer_nextn <= hparams.n_layer_all"),
        ({"qwen3.expert_count": 2**32 - 1}, "hparams.n_expert <= LLAMA_MAX_EXPERTS"),
        ({"qwen3.rope.scaling.type": "junk"}, "rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED"),
    ],
)
def test_what_a_file_makes_the_loader_assert_is_an_error(tmp_path, extra, said):
    """By the engine alone, past the reader that refuses these before; the next model loads as if nothing had been."""
    path = write_tiny_gguf(tmp_path / "bad.gguf", extra=extra)
    with pytest.raises(
        EngineError, match=rf"error loading model.*llama-model.cpp:\d+: GGML_ASSERT\(.*{re.escape(said)}"
    ):
        EngineModel(path)
    with EngineModel(write_tiny_gguf(tmp_path / "good.gguf")) as model:
        assert_close(logits(model), forward(TOKENS), EXACT)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"extra": {"qwen3.rope.dimension_count": 16}}, r"qwen3\.cpp:\d+: GGML_ASSERT\(n_embd_head == n_rot\)"),
        # in C, below libllama
        ({"n_head": 4, "n_head_kv": 3}, r"ggml\.c:\d+: GGML_ASSERT\(ggml_can_mul_mat\("),
    ],
)
def test_what_a_file_makes_a_graph_assert_is_an_error(tmp_path, model, said):
    with EngineModel(write_tiny_gguf(tmp_path / "bad.gguf", **model)) as bad:
        for _ in range(2):
            with pytest.raises(EngineError, match=f"failed to initialize the context: {said}"):
                bad.context()


def test_a_byte_that_an_spm_vocabulary_lacks_is_its_unknown_token(tmp_path):
    """The bundled model's vocabulary, of another kind, says that it is one of SPM: it has no <0x0A>."""
    parts = gguf_faults.take_apart(bundled_model().read_bytes())
    parts.set("tokenizer.ggml.model", gguf_faults.STRING, gguf_faults.text(b"llama"))
    parts.set("tokenizer.ggml.unknown_token_id", gguf_faults.U32, gguf_faults.number(gguf_faults.U32, 7))
    path = tmp_path / "spm.gguf"
    path.write_bytes(parts.encode())
    llm = Llama(str(path), vocab_only=True)
    assert llm.tokenize("\n€".encode(), add_bos=False) == [7] * 7  # the bytes of the ▁ in front, the line's end and €
    llm.close()


def test_n_swa_tells_where_rings_exist(tiny_model):
    """Servers ask `llama_model_n_swa` whether the past may be incomplete."""
    from llama_cpp.llama_cpp import llama_model_n_swa

    for schedule, want in ((SCHEDULE, 24), (OTHER, 0), (Sched(24, 4, (FULL,) * 4), 0)):
        with EngineModel(tiny_model, schedule) as model:
            assert llama_model_n_swa(model.ptr) == want


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Sched(0, 4, (ALWAYS,) * 4), "swaa.window = 0"),
        (Sched(2**32 - 1, 4, (ALWAYS,) * 4), "swaa.window = 4294967295"),
        (Sched(24, 2**32 - 1, (ALWAYS,) * 4), "swaa.sinks = 4294967295"),
        (Sched(24, 4, (ALWAYS,) * 3), "3"),
        (Sched(24, 4, (ALWAYS,) * 5), "5"),
        (Sched(24, 4, ()), "0"),
        (Sched(24, 4, (ALWAYS, FULL, 3, FULL)), "3"),
        (Sched(24, 4, (255, FULL, FULL, FULL)), "255"),
    ],
)
def test_set_refuses(tiny_model, schedule, said):
    """With a reason in the log; the schedule stays as it was."""
    with EngineModel(tiny_model, SCHEDULE) as model:
        with pytest.raises(EngineError, match=said):
            model.set_schedule(schedule)
        assert model.get_schedule() == SCHEDULE
        assert_close(logits(model), forward(TOKENS, SCHEDULE, 130), EXACT)


def array(values: list[Any], kind: T = T.INT32) -> GGUFValue:
    return GGUFValue(values, T.ARRAY, kind)


MALFORMED = {
    "version unknown": ({"swaa.version": 2}, "swaa.version", "2"),
    "version 0": ({"swaa.version": 0}, "swaa.version", "0"),
    "version missing": ({"swaa.version": None}, "swaa.version", ""),
    "version of another type": ({"swaa.version": "1"}, "swaa.version", ""),
    "window 0": ({"swaa.window": 0}, "swaa.window", "0"),
    "window missing": ({"swaa.window": None}, "swaa.window", ""),
    "window of another type": ({"swaa.window": 24.0}, "swaa.window", ""),
    "window negative": ({"swaa.window": -24}, "swaa.window", ""),
    "sinks missing": ({"swaa.sinks": None}, "swaa.sinks", ""),
    "sinks of another type": ({"swaa.sinks": "four"}, "swaa.sinks", ""),
    "sinks negative": ({"swaa.sinks": -1}, "swaa.sinks", ""),
    "modes missing": ({"swaa.layer_modes": None}, "swaa.layer_modes", ""),
    "modes too few": ({"swaa.layer_modes": array([2, 0, 1])}, "swaa.layer_modes", "3"),
    "modes too many": ({"swaa.layer_modes": array([2, 0, 1, 2, 2])}, "swaa.layer_modes", "5"),
    "mode 3": ({"swaa.layer_modes": array([2, 0, 3, 2])}, "swaa.layer_modes", "3"),
    "mode -1": ({"swaa.layer_modes": array([2, 0, -1, 2])}, "swaa.layer_modes", "-1"),
    "mode 258": ({"swaa.layer_modes": array([2, 0, 258, 2])}, "swaa.layer_modes", "258"),
    "modes no array": ({"swaa.layer_modes": 2}, "swaa.layer_modes", ""),
    "modes of another type": ({"swaa.layer_modes": array([2.0, 0.0, 1.0, 2.0], T.FLOAT32)}, "swaa.layer_modes", ""),
    "modes as bytes": ({"swaa.layer_modes": array([2, 0, 1, 2], T.UINT8)}, "swaa.layer_modes", ""),
    "tail too large": ({"swaa.tail": 2**30 + 1}, "swaa.tail", "1073741825"),
    "tail of another type": ({"swaa.tail": "five"}, "swaa.tail", "str"),
    "tail negative": ({"swaa.tail": -1}, "swaa.tail", "i32"),
    "tail without the others": (
        {"swaa.tail": 5, "swaa.version": None, "swaa.window": None, "swaa.sinks": None, "swaa.layer_modes": None},
        "swaa.version",
        "",
    ),
    "only a version": (
        {"swaa.window": None, "swaa.sinks": None, "swaa.layer_modes": None},
        r"swaa\.(window|sinks|layer_modes)",
        "",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_keys(tmp_path, case):
    """A load error that names the key and the value; nothing falls back silently."""
    change, key, value = MALFORMED[case]
    keys = {"swaa.version": 1, "swaa.window": 24, "swaa.sinks": 4, "swaa.layer_modes": array([2, 0, 1, 2])} | change
    path = write_tiny_gguf(tmp_path / "bad.gguf", extra={k: v for k, v in keys.items() if v is not None})
    with pytest.raises(EngineError) as error:
        EngineModel(path).close()
    lines = [line for line in str(error.value).splitlines() if "swaa." in line and "error" in line]
    assert lines, str(error.value)
    assert any(re.search(key, line) and value in line for line in lines), lines


def overrides(schedule: Sched) -> dict[str, Any]:
    """What `--override-kv` of llama.cpp's programs passes on."""
    letters = "".join("FPA"[mode] for mode in schedule.layer_modes)
    values: dict[str, int | str] = {
        "version": 1,
        "window": schedule.window,
        "sinks": schedule.sinks,
        "layer_modes": letters,
    }
    return {f"swaa.{name}": value for name, value in values.items()}


@pytest.mark.parametrize("of_file", [None, SCHEDULE], ids=["none", "another"])
def test_overrides_replace_the_file_s_schedule(tiny_model_factory, of_file):
    llm = Llama(str(tiny_model_factory(schedule=of_file)), n_ctx=256, kv_overrides=overrides(OTHER))
    assert llm.schedule is not None
    assert (llm.schedule.window, llm.schedule.sinks) == (OTHER.window, OTHER.sinks)
    assert llm.schedule.layer_modes == tuple(OTHER.layer_modes)


def test_overrides_switch_a_schedule_off(tiny_model_factory):
    llm = Llama(
        str(tiny_model_factory(schedule=SCHEDULE)), n_ctx=256, kv_overrides={"swaa.layer_modes": "F" * len(SCHEDULE[2])}
    )
    assert llm.schedule is None


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        ("FPX", "has 'X', expected F (full), P (windowed prefill) or A (always windowed)"),
        ("FP", "swaa.layer_modes has 2 entries, but the model has 4 layers"),
        (1, "the override of key swaa.layer_modes is not a str"),
    ],
)
def test_overrides_that_make_no_schedule(tiny_model_factory, modes, said):
    with pytest.raises(ModelLoadError, match=re.escape(said)):
        Llama(str(tiny_model_factory(schedule=SCHEDULE)), n_ctx=256, kv_overrides={"swaa.layer_modes": modes})


@pytest.mark.parametrize("arch", FOREIGN)
def test_other_attention_is_refused_by_name(tmp_path, arch):
    """From the file and through the C interface; without a schedule these models load as ever."""
    weights, keys = FOREIGN[arch]()
    common = {"file_arch": arch, "weights": weights, "extra": keys}
    with EngineModel(write_tiny_gguf(tmp_path / "plain.gguf", **common)) as model:
        with pytest.raises(EngineError, match=arch):
            model.set_schedule(SCHEDULE)
        assert model.get_schedule() is None
    with pytest.raises(EngineError, match=rf"(?m)error.*{arch}|{arch}.*schedule"):
        EngineModel(write_tiny_gguf(tmp_path / "scheduled.gguf", schedule=SCHEDULE, **common)).close()
