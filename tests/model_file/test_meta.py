"""Reading a schedule and a model's facts from GGUF headers; the files are written without `swaa_local`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest

from swaa_local.errors import GGUFError
from swaa_local.model_file.header import GGUFFile, ValueType
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.model_file.unsupported import unsupported_reason
from swaa_local.schedule.config import MAX_TOKENS, LayerMode, Schedule
from tests.support.gguf_edit import ODD_VALUES, SWAA, Typed, i32s, patch_bytes, set_version, u32, write_header_model
from tests.support.tiny import write_tiny_gguf

T: Any = gguf.GGUFValueType


def test_schedule_of_a_file(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", SWAA)
    F, P, A = LayerMode.FULL, LayerMode.PREFILL, LayerMode.ALWAYS
    assert read_schedule(path) == Schedule(8, 2, (F, P, A, F))


def test_a_tail_is_optional(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", SWAA | {"swaa.tail": u32(96)})
    schedule = read_schedule(path)
    assert schedule is not None
    assert schedule.tail == 96


def test_no_schedule(tmp_path):
    assert read_schedule(write_header_model(tmp_path / "m.gguf", {})) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"swaa.version": u32(2)}, "swaa.version is 2, but this program reads version 1"),
        ({"swaa.version": u32(0)}, "swaa.version is 0"),
        ({"swaa.version": None}, "key swaa.version is missing"),
        ({"swaa.version": Typed("1", T.STRING)}, r"swaa.version is '1' \(string\), expected a u32"),
        ({"swaa.version": Typed(1, T.INT32)}, r"swaa.version is 1 \(i32\), expected a u32"),
        ({"swaa.window": u32(0)}, "swaa.window is 0, expected 1 to"),
        ({"swaa.window": u32(MAX_TOKENS + 1)}, f"swaa.window is {MAX_TOKENS + 1}"),
        ({"swaa.window": None}, "key swaa.window is missing"),
        ({"swaa.window": Typed(8.5, T.FLOAT32)}, r"swaa.window is 8.5 \(f32\)"),
        ({"swaa.window": i32s([8])}, "swaa.window is an array of 1 i32"),
        ({"swaa.sinks": None}, "key swaa.sinks is missing"),
        ({"swaa.sinks": Typed(True, T.BOOL)}, r"swaa.sinks is True \(bool\)"),
        ({"swaa.sinks": u32(2**32 - 1)}, "swaa.sinks is 4294967295"),
        ({"swaa.tail": u32(2**31)}, "swaa.tail is 2147483648, expected 0 to"),
        ({"swaa.tail": Typed(5, T.INT32)}, r"swaa.tail is 5 \(i32\), expected a u32"),
        ({"swaa.layer_modes": None}, "key swaa.layer_modes is missing"),
        ({"swaa.layer_modes": i32s([0, 1, 2])}, "swaa.layer_modes has 3 entries, but the model has 4 layers"),
        ({"swaa.layer_modes": i32s([0, 1, 2, 0, 0])}, "swaa.layer_modes has 5 entries"),
        ({"swaa.layer_modes": i32s([])}, "swaa.layer_modes has 0 entries"),
        ({"swaa.layer_modes": i32s([0, 1, 3, 0])}, r"swaa.layer_modes\[2\] is 3"),
        ({"swaa.layer_modes": i32s([0, -1, 2, 0])}, r"swaa.layer_modes\[1\] is -1"),
        ({"swaa.layer_modes": u32(1)}, r"swaa.layer_modes is 1 \(u32\), expected an array of i32"),
        ({"swaa.layer_modes": Typed([0, 1, 2, 0], T.ARRAY, T.UINT32)}, "swaa.layer_modes is an array of 4 u32"),
        ({"swaa.layer_modes": Typed(["0"] * 4, T.ARRAY, T.STRING)}, "swaa.layer_modes is an array of 4 string"),
    ],
)
def test_malformed_keys_are_errors_that_name_key_value_and_file(tmp_path, keys, message):
    path = write_header_model(tmp_path / "bad.gguf", SWAA | keys)
    with pytest.raises(GGUFError, match=message) as caught:
        read_schedule(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_lone_key_is_not_no_schedule(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", {"swaa.window": u32(8)})
    with pytest.raises(GGUFError, match=r"key swaa\.version is missing"):
        read_schedule(path)


def test_model_info(tmp_path):
    path = write_tiny_gguf(tmp_path / "m.gguf", arch="llama", n_layer=3, n_ctx_train=2048)
    info = read_model_info(path)
    reader = gguf.GGUFReader(path)
    assert (info.architecture, info.name, info.n_layer, info.n_ctx_train) == ("llama", "tiny", 3, 2048)
    assert (info.n_head, info.n_head_kv, info.head_dim_k, info.head_dim_v) == ((4,) * 3, (2,) * 3, 32, 32)
    assert info.n_embd_k == info.n_embd_v == (64,) * 3
    assert info.n_params == sum(int(math.prod(t.shape)) for t in reader.tensors)
    assert info.file_bytes == path.stat().st_size
    assert info.file_type == "F32"
    assert info.has_chat_template
    assert info.n_split == 1
    assert info.unsupported is None


def test_head_counts_may_differ_by_layer_and_default_to_query_heads(tmp_path):
    keys = {"qwen3.attention.head_count": i32s([4, 2, 4, 4]), "qwen3.attention.head_count_kv": i32s([2, 0, 2, 1])}
    info = read_model_info(write_header_model(tmp_path / "m.gguf", keys))
    assert info.n_head == (4, 2, 4, 4)
    assert info.n_embd_k == (64, 0, 64, 32)
    info = read_model_info(write_header_model(tmp_path / "n.gguf", {"qwen3.attention.head_count_kv": None}))
    assert info.n_head_kv == (4, 4, 4, 4)
    with pytest.raises(GGUFError, match="head_count_kv is an array of 3 i32, expected a number or one for each of 4"):
        read_model_info(write_header_model(tmp_path / "o.gguf", {"qwen3.attention.head_count_kv": i32s([2] * 3)}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"qwen3.block_count": None}, "qwen3.block_count is missing"),
        ({"qwen3.block_count": u32(0)}, "qwen3.block_count is 0"),
        ({"qwen3.block_count": Typed("4", T.STRING)}, r"qwen3.block_count is '4' \(string\), expected 1 to 512"),
        ({"general.type": Typed("adapter", T.STRING)}, "is of type 'adapter' and not a language model"),
    ],
)
def test_files_that_are_no_models(tmp_path, keys, message):
    with pytest.raises(GGUFError, match=message):
        read_model_info(write_header_model(tmp_path / "m.gguf", keys))


@pytest.mark.parametrize(
    ("arch", "keys", "reason"),
    [
        ("qwen3", {}, None),
        ("phi3", {"phi3.attention.sliding_window": u32(2047)}, None),
        ("llama", {"llama.attention.sliding_window": u32(4096)}, None),
        ("olmo2", {}, None),
        ("olmo2", {"olmo2.attention.sliding_window": u32(0)}, None),
        ("olmo2", {"olmo2.attention.sliding_window": u32(4096)}, None),
        ("gemma3", {"gemma3.attention.sliding_window": u32(512)}, r"no layer that can slide: own window \(512 tokens"),
        ("gemma2", {}, None),
        ("gpt-oss", {"gpt-oss.attention.sliding_window": u32(128)}, None),
        ("llama4", {}, "'llama4' attends in chunks of 8192 tokens"),
        ("gemma4-assistant", {}, "'gemma4-assistant' drafts for another model"),
        ("qwen3", {"qwen3.attention.shared_kv_layers": u32(2)}, "'qwen3' shares KV caches between layers"),
        ("llama4", {"llama4.attention.sliding_window": u32(0)}, None),
        ("exaone4", {}, None),
        ("deepseek2", {"deepseek2.attention.kv_lora_rank": u32(512)}, "'deepseek2' has multi-head latent attention"),
        ("deepseek2", {"deepseek2.attention.key_length_mla": u32(192)}, "MLA"),
        ("mamba", {"mamba.ssm.conv_kernel": u32(4)}, "'mamba' has recurrent layers"),
        ("lfm2", {"lfm2.shortconv.l_cache": u32(3)}, None),
        (
            "lfm2",
            {"lfm2.shortconv.l_cache": u32(3), "lfm2.attention.sliding_window": u32(128)},
            "'lfm2' has recurrent layers beside a sliding window of its own",
        ),
        ("kimi-linear", {"kimi-linear.kda.head_dim": u32(64)}, "'kimi-linear' has recurrent layers, and no others"),
        ("rwkv7", {"rwkv7.wkv.head_size": u32(64)}, "'rwkv7' has recurrent layers"),
        ("bert", {}, "'bert' does not use causal attention"),
        ("llama", {"llama.attention.causal": Typed(False, T.BOOL)}, "'llama' does not use causal attention"),
        ("bloom", {}, "'bloom' uses ALiBi"),
        ("qwen2vl", {}, None),
        ("glm4", {"glm4.rope.dimension_sections": i32s([16, 24, 24, 0])}, None),
        ("glm4moe", {"glm4moe.nextn_predict_layers": u32(1)}, None),
    ],
)
def test_architectures_a_schedule_cannot_apply_to(tmp_path, arch, keys, reason):
    info = read_model_info(write_header_model(tmp_path / "m.gguf", keys, arch=arch))
    if reason is None:
        assert info.unsupported is None
    else:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(info.unsupported)


def test_unsupported_reason_reads_metadata_not_yet_written():
    keys = {"mamba.ssm.conv_kernel": 4}
    assert "recurrent" in (unsupported_reason("mamba", keys, keys.get) or "")


def test_nested_arrays_are_read(tmp_path):
    inner = [Typed(["a", "bc"], T.ARRAY, T.STRING), Typed([], T.ARRAY, T.STRING)]
    path = write_header_model(tmp_path / "m.gguf", {"x.nested": Typed(inner, T.ARRAY, T.ARRAY), "x.after": u32(7)})
    with GGUFFile.open(path) as file:
        assert file.get("x.nested") == [["a", "bc"], []]
        assert file.get("x.after") == 7


def test_every_value_type_is_read(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", ODD_VALUES)
    reader = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        assert {key: file.get(key) for key in ODD_VALUES} == {key: typed.value for key, typed in ODD_VALUES.items()}
        assert set(file.keys) == {key for key in reader.fields if not key.startswith("GGUF.")}
        assert [(t.name, t.n_bytes) for t in file.tensors] == [(t.name, t.n_bytes) for t in reader.tensors]
        assert file.data_offset + file.tensors[0].offset == reader.tensors[0].data_offset
        assert file.keys["x.texts"].item_type is ValueType.STRING


@pytest.mark.parametrize("cut", [0, 3, 4, 7, 12, 23, 24, 40, 100, 300, -1, -600])
def test_truncated_anywhere(tmp_path, cut, tiny_model):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model.read_bytes()[:cut])
    for read in (read_schedule, read_model_info):
        with pytest.raises(GGUFError, match=r"cut\.gguf: (truncated|not a GGUF)"):
            read(path)


def test_every_truncation_of_a_header_is_an_error(tmp_path):
    whole = write_header_model(tmp_path / "m.gguf", SWAA | ODD_VALUES).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole) - 1, 5):
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            read_model_info(path)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"hello", b"\0" * 4096, b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 400, b"GGUF\3\0\0\0" + b"\0" * 400],
)
def test_garbage(tmp_path, garbage):
    path = tmp_path / "garbage.gguf"
    path.write_bytes(garbage)
    with pytest.raises(GGUFError, match=r"garbage\.gguf: "):
        read_model_info(path)


def test_random_damage_is_never_a_crash(tmp_path):
    whole = write_header_model(tmp_path / "m.gguf", SWAA | ODD_VALUES)
    size = whole.stat().st_size
    damaged = tmp_path / "damaged.gguf"
    for offset in range(8, size - 512, 3):
        patch_bytes(whole, damaged, offset, b"\xff\xfe")
        try:
            read_model_info(damaged)
            read_schedule(damaged)
        except GGUFError:
            pass


def test_versions_and_byte_order(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", {})
    assert read_model_info(set_version(path, tmp_path / "v2.gguf", 2)).n_layer == 4
    with pytest.raises(GGUFError, match="GGUF version 1, but only 2 and 3"):
        read_model_info(set_version(path, tmp_path / "v1.gguf", 1))
    with pytest.raises(GGUFError, match="big-endian"):
        read_model_info(set_version(path, tmp_path / "be.gguf", 3 << 24))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(GGUFError, match=r"none\.gguf: cannot read it: No such file"):
        read_schedule(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="cannot read it: Is a directory"):
        read_schedule(tmp_path)
    with pytest.raises(GGUFError, match="not a regular file"):
        read_schedule(Path("/dev/null"))
