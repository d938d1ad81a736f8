"""Values of a file that llama.cpp would not survive are errors that name key and value; those of real models pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

import gguf_faults
from gguf_faults import FAULTS, write_faults
from swaa_local import Llama
from swaa_local.errors import GGUFError, ModelLoadError
from swaa_local.model_file.check import check_gguf
from swaa_local.model_file.model_info import read_model_info
from swaa_local.needle.model import bundled_model
from tests.support.gguf_edit import Typed, i32s, u32, write_header_model
from tests.support.program import fails, succeeds

T: Any = gguf.GGUFValueType


def f32(value: float) -> Typed:
    return Typed(value, T.FLOAT32)


def text(value: str) -> Typed:
    return Typed(value, T.STRING)


# What is refused by its value; the rest of the faults is refused elsewhere, or no fault to the reader.
REFUSED = {
    "block-count-0": "block_count is 0 (u32), expected 1 to 512",
    "block-count-2e31": "block_count is 2147483648 (u32), expected 1 to 512",
    "block-count-513": "block_count is 513 (u32), expected 1 to 512",
    "block-count-negative": "block_count is -1 (i32), expected 1 to 512",
    "block-count-text": "block_count is 'eight' (string), expected 1 to 512",
    "nextn-max": "nextn_predict_layers is 4294967295 (u32), expected 0 to 511",
    "experts-max": "expert_count is 4294967295 (u32), expected 0 to 1024",
    "experts-used-none": "expert_count is 8 (u32), expected 0, because the model uses none",
    "experts-used-of-none": "expert_used_count is 8 (u32), expected at most the model's 0 experts",
    "expert-groups-of-none": "expert_group_count is 2 (u32), expected fewer than the model's 0 experts",
    "embedding-0": "embedding_length is 0 (u32), expected 1 to 16777216",
    "heads-max": "head_count is 4294967295 (u32), expected 0 to 16777216",
    "kv-heads-3": "head_count_kv is 3 (u32), expected a divisor of the 4 heads",
    "context-0": "context_length is 0 (u32), expected 1 to 1073741824",
    "context-max": "context_length is 4294967295 (u32), expected 1 to 1073741824",
    "rope-dim-odd": "rope.dimension_count is 63 (u32), expected an even number",
    "rope-dim-wide": "rope.dimension_count is 128 (u32), expected at most the width of a head, 64",
    "rope-type-junk": "rope.scaling.type is 'junk' (string), expected one of none, linear, yarn, longrope",
    "rope-base-nan": "rope.freq_base is nan (f32), expected a number above 0",
    "rope-factor-inf": "rope.scaling.factor is inf (f32), expected a number that is at least 0",
    "rope-sections-text": "rope.dimension_sections is an array of 3 string, expected 0 to 16777216",
    "epsilon-nan": "layer_norm_rms_epsilon is nan (f32), expected a number that is at least 0",
    "epsilon-negative": "layer_norm_rms_epsilon is -1.0 (f32), expected a number that is at least 0",
    "split-count-text": "split.count is 'two', expected 0 to 65535",
    "split-count-negative": "split.count is -2, expected 0 to 65535",
    "own-window-text": "sliding_window is 'x' (string), expected 0 to 4294967295",
    "own-window-texts": "sliding_window is an array of 2 string, expected 0 to 4294967295",
    "alignment-0": "general.alignment is 0",
    "alignment-text": "general.alignment is 'x'",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_faults(bundled_model(), tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_named_faults(files, name):
    """The same sentence from the reader and from `Llama`, which asks it first."""
    if name not in REFUSED:
        check_gguf(files[name])
        return
    with pytest.raises(GGUFError) as of_reader:
        check_gguf(files[name])
    with pytest.raises(ModelLoadError) as of_llama:
        Llama(str(files[name]))
    assert str(of_reader.value) == str(of_llama.value)
    assert REFUSED[name] in str(of_reader.value)
    assert str(files[name]) in str(of_reader.value)


@pytest.mark.parametrize("name", ["block-count-2e31", "epsilon-nan", "experts-max"])
def test_every_command_refuses_them_before_the_engine_sees_them(files, tmp_path, name):
    for command in (
        ("inspect", files[name]),
        ("convert", files[name], "-o", tmp_path / "o.gguf", "--no-swaa"),
        ("chat", files[name], "-p", "x"),
        ("bench", files[name]),
        ("eval", files[name], "--results", tmp_path / "r.jsonl"),
        ("serve", files[name]),
    ):
        assert REFUSED[name] in fails(*command)
    assert list(tmp_path.iterdir()) == []


def test_what_is_odd_and_no_fault_is_shown(files):
    for name in ("key-length-0", "kv-heads-0", "heads-0"):
        assert "KV cache" in succeeds("inspect", files[name])


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        ("phi2", {"rope.dimension_count": u32(16)}),
        ("chatglm", {"rope.dimension_count": u32(16), "attention.key_length": u32(32)}),
        ("deepseek2", {"attention.key_length": u32(576), "rope.dimension_count": u32(64), "expert_count": u32(64)}
         | {"expert_used_count": u32(6), "expert_group_count": u32(1), "expert_group_used_count": u32(1)}),
        ("deepseek2", {"expert_count": u32(256), "expert_used_count": u32(8), "expert_group_count": u32(8)}
         | {"expert_group_used_count": u32(4), "nextn_predict_layers": u32(1)}),
        ("hunyuan-dense", {"expert_count": u32(1)}),
        ("qwen3moe", {"expert_count": u32(128), "expert_used_count": i32s([8, 8, 8, 8])}),
        ("mamba", {"attention.head_count": u32(0), "feed_forward_length": u32(0), "context_length": u32(1 << 20)}),
        ("deci", {"attention.head_count": i32s([0, 4, 4, 4]), "attention.head_count_kv": i32s([0, 2, 2, 0])}),
        ("gemma3n", {"activation_sparsity_scale": Typed([1.6, float("-inf")], T.ARRAY, T.FLOAT32)}),
        ("llama4", {"attention.sliding_window": u32(0), "context_length": u32(10_485_760)}),
        ("llama", {"rope.scaling.type": text("yarn"), "rope.scaling.factor": f32(4.0)}),
        ("llama", {"rope.scaling.type": text("none"), "rope.scaling.factor": f32(0.0)}),
        ("qwen2vl", {"rope.dimension_sections": i32s([16, 24, 24, 0])}),
        ("bert", {"pooling_type": u32(2), "attention.layer_norm_epsilon": f32(1e-12)}),
    ],
)  # fmt: skip
def test_values_of_real_models(tmp_path, arch, keys):
    path = write_header_model(tmp_path / "m.gguf", {f"{arch}.{name}": value for name, value in keys.items()}, arch=arch)
    check_gguf(path)
    assert read_model_info(path).architecture == arch


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.head_count": i32s([4, -1, 4, 4])}, "head_count is an array of 4 i32, expected 0 to"),
        ({"attention.head_count": Typed(True, T.BOOL)}, r"head_count is True \(bool\), expected 0 to"),
        ({"expert_count": u32(8), "expert_used_count": u32(9)}, r"expert_used_count is 9 \(u32\), expected at most"),
        ({"expert_count": u32(8), "expert_used_count": u32(2), "expert_group_count": u32(3)}, "a divisor of .* 8 exp"),
        (
            {"expert_count": u32(8), "expert_used_count": u32(2), "expert_group_count": u32(2)},
            "expert_group_count is 2",
        ),
        ({"nextn_predict_layers": u32(4)}, r"nextn_predict_layers is 4 \(u32\), expected fewer than the model's 4"),
        ({"pooling_type": u32(9)}, r"pooling_type is 9 \(u32\), expected 0 to 4"),
        ({"logit_scale": f32(float("nan"))}, r"logit_scale is nan \(f32\), expected a number"),
        ({"attention.layer_norm_epsilon": u32(0)}, r"layer_norm_epsilon is 0 \(u32\), expected a number"),
        ({"rope.scaling.type": u32(1)}, r"rope.scaling.type is 1 \(u32\), expected one of none"),
    ],
)
def test_values_that_are_none(tmp_path, keys, message):
    path = write_header_model(tmp_path / "m.gguf", {f"qwen3.{name}": value for name, value in keys.items()})
    with pytest.raises(GGUFError, match=message):
        check_gguf(path)


SHARED = {"attention.sliding_window": u32(512), "attention.shared_kv_layers": u32(2)}


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("qwen3next", {"full_attention_interval": u32(0)}, r"full_attention_interval is 0 \(u32\), expected 1 to 512"),
        ("minimax-01", {"full_attention_interval": i32s([0])}, "full_attention_interval is an array"),
        ("gemma4", {"attention.shared_kv_layers": u32(3)}, r"shared_kv_layers is 3 \(u32\), expected at most 2 of"),
        ("gemma4", {"attention.key_length_swa": Typed(-8, T.INT32)}, r"key_length_swa is -8 \(i32\), expected 0 to"),
        (
            "gemma4",
            SHARED | {"attention.sliding_window_pattern": i32s([0, 1, 1, 0])},
            "sliding_window_pattern is an array of 4 i32, expected a layer with a window and one without",
        ),
    ],
)
def test_values_that_layers_of_two_kinds_cannot_have(tmp_path, arch, keys, message):
    """llama.cpp divides by the first, and asserts on what comes of the others."""
    path = write_header_model(tmp_path / "m.gguf", {f"{arch}.{name}": value for name, value in keys.items()}, arch=arch)
    with pytest.raises(GGUFError, match=message):
        check_gguf(path)


def test_layers_of_two_kinds_before_those_that_share(tmp_path):
    keys = SHARED | {"attention.sliding_window_pattern": i32s([1, 0, 1, 0])}
    check_gguf(write_header_model(tmp_path / "m.gguf", {f"gemma4.{k}": v for k, v in keys.items()}, arch="gemma4"))


@pytest.mark.parametrize(
    ("name", "dims", "kind", "message"),
    [
        ("output_norm.weight", (128,), 13, "'output_norm.weight' has type q5_k, expected f32, as all vectors"),
        ("output_norm.weight", (128, 1), 1, "has type f16, expected f32"),
        ("blk.0.attn_q.bias", (128,), 26, "'blk.0.attn_q.bias' has type i32, expected f32"),
        ("blk.0.attn_q.weight", (128, 128), 26, "'blk.0.attn_q.weight' has type i32, expected a type of weights"),
        ("blk.0.attn_q.weight", (128, 128), 15, "has type q8_k, expected a type of weights"),
        ("output_norm.weight", (128,), 0, None),
        ("blk.0.attn_q.weight", (128, 128), 30, None),
        ("cls.output.weight", (128, 1), 1, None),
        ("d2t", (128,), 27, None),
    ],
)
def test_types_of_tensors(tmp_path, name, dims, kind, message):
    parts = gguf_faults.take_apart(write_header_model(tmp_path / "m.gguf", {}).read_bytes())
    parts.tensors = [gguf_faults.Tensor(name.encode(), dims, kind, 0)]
    parts.data = bytes(1 << 18)
    path = tmp_path / "t.gguf"
    path.write_bytes(parts.encode())
    if message is None:
        check_gguf(path)
    else:
        with pytest.raises(GGUFError, match=message):
            check_gguf(path)


def test_texts_that_are_no_utf8_and_tensors_that_occur_twice(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", {"general.author": text("aXXb")})
    path.write_bytes(path.read_bytes().replace(b"aXXb", b"a\xff\xfeb"))
    with pytest.raises(GGUFError, match="is not UTF-8; the file is damaged"):
        check_gguf(path)
    whole = write_header_model(tmp_path / "n.gguf", {}).read_bytes()
    at = whole.index(b"output_norm.weight") - 8
    entry = whole[at : at + 8 + 18 + 4 + 8 + 4 + 8]
    doubled = whole[:8] + (2).to_bytes(8, "little") + whole[16:at] + entry * 2 + whole[at + len(entry) :]
    path.write_bytes(doubled + bytes(64))
    with pytest.raises(GGUFError, match=r"'output_norm\.weight' occurs twice"):
        check_gguf(path)
