"""The rules of a schedule: paper's configurations, layer lists, presets, and the formulas of its cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from swaa_local.errors import ScheduleError, SWAAError
from swaa_local.schedule.config import MAX_TOKENS, LayerMode, Schedule, SWAAConfig
from swaa_local.schedule.cost import full_cells, kv_bytes, window_keys, window_pairs
from swaa_local.schedule.layers import compact_layers, format_layers, parse_layers
from swaa_local.schedule.model_layers import LayerKind, ModelLayers
from swaa_local.schedule.presets import DEFAULT_PRESET, GENERIC_PRESETS, PRESETS, get_preset

F, P, A = LayerMode.FULL, LayerMode.PREFILL, LayerMode.ALWAYS


def test_a_config_of_the_papers_code_can_be_pasted():
    config = SWAAConfig(sliding_window_size=2048, keep_first=100, force_fa_decode=True, non_sliding_layers=[1, 3, 5])
    assert config.schedule(6) == Schedule(2048, 100, (P, F, P, F, P, F))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        (SWAAConfig(), (F, F, F)),
        (SWAAConfig(non_sliding_layers=[0], force_fa_decode=True), (F, F, F)),
        (SWAAConfig(8), (A, A, A)),
        (SWAAConfig(8, force_fa_decode=True), (P, P, P)),
        (SWAAConfig(8, force_fa_decode=[]), (A, A, A)),
        (SWAAConfig(8, force_fa_decode=[1]), (A, P, A)),
        (SWAAConfig(8, non_sliding_layers=[2]), (A, A, F)),
        (SWAAConfig(8, force_fa_decode=[0, 2], non_sliding_layers=[2]), (P, A, F)),
    ],
)
def test_mode_of_each_layer(config, modes):
    schedule = config.schedule(3)
    assert schedule.layer_modes == modes
    assert schedule.config().schedule(3) == schedule
    assert schedule.is_full == (set(modes) == {F})
    assert schedule.has_ring == (A in modes)


def test_lists_become_sorted_tuples_so_equal_schedules_are_equal():
    assert SWAAConfig(8, non_sliding_layers=[3, 1, 3]) == SWAAConfig(8, non_sliding_layers=(1, 3))
    assert SWAAConfig(8, force_fa_decode=[]) == SWAAConfig(8)
    assert hash(SWAAConfig(8, non_sliding_layers=[1])) == hash(SWAAConfig(8, non_sliding_layers=(1,)))
    numpy: Any = (np.int64(8), np.int32(2), False, np.arange(2))
    assert SWAAConfig(*numpy) == SWAAConfig(8, 2, False, (0, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window_size": 0}, "sliding_window_size is 0"),
        ({"sliding_window_size": -5}, "sliding_window_size is -5"),
        ({"sliding_window_size": MAX_TOKENS + 1}, str(MAX_TOKENS + 1)),
        ({"sliding_window_size": 2048.5}, "whole number, not 2048.5"),
        ({"sliding_window_size": True}, "whole number, not True"),
        ({"sliding_window_size": "2048"}, "whole number, not '2048'"),
        ({"keep_first": -1}, "keep_first is -1"),
        ({"keep_first": None}, "whole number, not None"),
        ({"non_sliding_layers": [0, -2]}, "non_sliding_layers lists layer -2"),
        ({"non_sliding_layers": "1,3"}, "list of layer numbers, not '1,3'"),
        ({"non_sliding_layers": [1.5]}, "whole number, not 1.5"),
        ({"force_fa_decode": [-1]}, "force_fa_decode lists layer -1"),
        ({"force_fa_decode": 1}, "list of layer numbers, not 1"),
        ({"force_fa_decode": None}, "list of layer numbers, not None"),
    ],
)
def test_bad_values_are_refused_with_the_value(fields, message):
    with pytest.raises(ScheduleError, match=message):
        SWAAConfig(**fields)


@pytest.mark.parametrize("field", ["non_sliding_layers", "force_fa_decode"])
def test_layers_past_the_last_one_name_the_layer_count(field):
    listing: dict[str, Any] = {field: [1, 3, 4]}
    config = SWAAConfig(8, **listing)
    with pytest.raises(ScheduleError, match=rf"{field} lists layer 3, but the model has 3 layers .*--clip-layers"):
        config.schedule(3)
    assert config.schedule(3, clip_layers=True) == SWAAConfig(8, **(listing | {field: [1]})).schedule(3)


def test_errors_are_of_the_library_and_value_errors():
    assert issubclass(ScheduleError, SWAAError)
    assert issubclass(ScheduleError, ValueError)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 0, (0,)), "window is 0"),
        ((1, -1, (0,)), "sinks is -1"),
        ((1, 0, ()), "layer_modes is empty"),
        ((1, 0, (0, 3)), r"layer_modes\[1\] is 3"),
        ((1, 0, (0, -1)), r"layer_modes\[1\] is -1"),
    ],
)
def test_a_schedule_outside_the_format_is_refused(args, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(*args)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", ()),
        ("  ", ()),
        ("1,3,5", (1, 3, 5)),
        ("5, 3,3", (3, 5)),
        ("0-3", (0, 1, 2, 3)),
        ("2-2", (2,)),
        ("1::2", (1, 3, 5, 7)),
        ("0::2", (0, 2, 4, 6)),
        ("::3", (0, 3, 6)),
        (":2", (0, 1)),
        ("6:", (6, 7)),
        (":", tuple(range(8))),
        ("-2:", (6, 7)),
        (":-6", (0, 1)),
        ("2:8:3", (2, 5)),
        ("0-1,5,6::1", (0, 1, 5, 6, 7)),
    ],
)
def test_layer_lists(text, layers):
    assert parse_layers(text, 8) == layers
    assert parse_layers(format_layers(layers), 8) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "'8' goes past the model's 8 layers"),
        ("6-9", "'6-9' goes past"),
        ("9::2", "'9::2' goes past"),
        ("0:9", "'0:9' goes past"),
        ("3-1", "runs backwards"),
        ("1::0", "step 0"),
        ("7::-1", "step -1"),
        ("1,,2", "empty item"),
        ("1,", "empty item"),
        ("odd", "cannot read layer list item 'odd'"),
        ("-1", "cannot read layer list item '-1'"),
        ("1.5", "cannot read"),
    ],
)
def test_bad_layer_lists(text, message):
    with pytest.raises(ScheduleError, match=message):
        parse_layers(text, 8)


def test_clip_layers_drops_what_is_past_the_last_layer():
    assert parse_layers("1,9,6-12,0:40:4", 8, clip_layers=True) == (0, 1, 4, 6, 7)


def test_published_presets():
    odd, even = tuple(range(1, 36, 2)), tuple(range(0, 48, 2))
    assert get_preset("qwen3-4b-paper").config() == SWAAConfig(2048, 100, True, odd)
    assert get_preset("Qwen3-4B-w4096-paper").config() == SWAAConfig(4096, 100, True, odd)
    assert get_preset("qwen3-30b-a3b-paper").config() == SWAAConfig(2048, 100, True, even)
    assert get_preset("llama-3.1-8b-paper").config(32) == SWAAConfig(2048, 100, True, even[:16])
    light = (0, 1, 4, 5, 8, 9, 10, 11, 13, 14, 21, 23, 24, 25, 26, 27)
    assert get_preset("llama-3.1-8b-lighttransfer-paper").config() == SWAAConfig(2048, 100, True, light)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_resolves_and_says_what_is_known_about_it(preset):
    n_layer = preset.n_layer or 28
    assert not preset.config(n_layer).schedule(n_layer).is_full
    assert preset.description
    assert preset.notes


def test_a_preset_for_another_depth_is_refused():
    preset = get_preset("qwen3-4b")
    with pytest.raises(ScheduleError, match=r"36 layers, and this one has 28.*quality.*--clip-layers"):
        preset.config(28)
    with pytest.raises(ScheduleError, match=r"36 layers, and this one has 40.*--full-layers"):
        preset.config(40, clip_layers=True)
    assert preset.config(28, clip_layers=True).non_sliding_layers == tuple(range(1, 28, 2))
    assert "quality" in GENERIC_PRESETS
    with pytest.raises(ScheduleError, match="pass the number of layers"):
        get_preset("quality").config()


@pytest.mark.parametrize(
    ("name", "n_full", "has_ring"),
    [
        ("quality", 14, False),
        ("quality-odd", 14, False),
        ("balanced", 0, False),
        ("speed", 0, False),
        ("memory", 14, True),
    ],
)
def test_generic_presets_are_what_their_names_promise(name, n_full, has_ring):
    schedule = get_preset(name).config(28).schedule(28)
    assert len(schedule.layers(LayerMode.FULL)) == n_full
    assert schedule.has_ring == has_ring
    assert schedule.tail == (0 if has_ring else 128)
    pairs = {other: sum(get_preset(other).config(28).schedule(28).prefill_pairs(32768)) for other in GENERIC_PRESETS}
    assert pairs["speed"] < pairs["balanced"] < pairs["quality"]


def test_the_preset_that_is_proposed_exists():
    assert DEFAULT_PRESET in GENERIC_PRESETS


def test_an_unknown_preset_lists_the_names():
    with pytest.raises(ScheduleError, match=r"unknown preset 'qwen'; known are .*qwen3-4b"):
        get_preset("qwen")


def test_ring_cells_are_padded_and_never_more_than_full():
    schedule = SWAAConfig(2048, 100).schedule(2)
    assert schedule.ring_cells(32768) == 2816  # 100 + 2048 + 512 = 2660
    assert schedule.ring_cells(32768, n_ubatch=32) == 2304
    assert schedule.ring_cells(2000) == 2048
    assert schedule.ring_cells(32768, n_seq_max=4, unified=True) == 9216  # 4 * 2148 + 512 = 9104
    assert schedule.ring_cells(32768, n_seq_max=4, unified=False) == 2816


def test_kv_cells_of_a_mixed_schedule():
    schedule = SWAAConfig(256, 16, force_fa_decode=[1], non_sliding_layers=[0]).schedule(3)
    assert schedule.kv_cells(4000) == (4096, 4096, 1024)
    assert full_cells(4000, n_seq_max=3) == 1536  # 4096 // 3 = 1365
    assert full_cells(4000, n_seq_max=3, unified=True) == 4096


def test_kv_bytes_by_type():
    assert kv_bytes(256, 1024, 1024) == 256 * 4096
    assert kv_bytes(256, 1024, 512, "q8_0", "F32") == 256 * (1088 + 2048)
    with pytest.raises(SWAAError, match="multiple of 32 elements, not 80"):
        kv_bytes(256, 80, 80, "q8_0")
    with pytest.raises(SWAAError, match="unknown KV cache type 'q9_0'; known are f32, f16"):
        kv_bytes(256, 64, 64, "q9_0")


@pytest.mark.parametrize("window", [1, 3, 8, 50])
@pytest.mark.parametrize("sinks", [0, 1, 5, 40])
def test_attention_work_is_the_size_of_the_mask(window, sinks):
    n = 30
    p1, p0 = np.mgrid[:n, :n]
    visible = (p0 <= p1) & ((p1 - p0 < window) | (p0 < sinks))
    assert [window_keys(p, window, sinks) for p in range(n)] == visible.sum(1).tolist()
    assert window_pairs(n, window, sinks) == visible.sum()
    schedule = SWAAConfig(window, sinks, force_fa_decode=[1], non_sliding_layers=[0]).schedule(3)
    assert schedule.prefill_pairs(n) == (n * (n + 1) // 2, visible.sum(), visible.sum())
    assert schedule.decode_keys(n - 1) == (n, n, visible[-1].sum())


@pytest.mark.parametrize("tail", [0, 1, 5, 40])
@pytest.mark.parametrize("n", [0, 1, 4, 30])
def test_a_tail_sees_all_where_decode_does(n, tail):
    p1, p0 = np.mgrid[:n, :n]
    causal = p0 <= p1
    windowed = causal & ((p1 - p0 < 8) | (p0 < 3))
    with_tail = np.where(p1 >= n - tail, causal, windowed)
    schedule = SWAAConfig(8, 3, force_fa_decode=[1], non_sliding_layers=[0], prompt_tail=tail).schedule(3)
    assert schedule.prefill_pairs(n) == (causal.sum(), with_tail.sum(), windowed.sum())
    assert schedule.tail_pairs(n) == with_tail.sum() - windowed.sum()


def test_a_tail_without_fa_decode_has_no_use():
    assert SWAAConfig(8, prompt_tail=5).schedule(2).active_tail == 0
    assert SWAAConfig(prompt_tail=5).schedule(2) == Schedule.full(2)
    assert SWAAConfig(8, force_fa_decode=[1], prompt_tail=5).schedule(2).active_tail == 5


def test_presets_have_a_tail_where_decode_is_full_and_the_papers_have_none():
    for preset in PRESETS.values():
        assert preset.tail == (128 if preset.fa_decode else 0)
        paper = get_preset(f"{preset.name}-paper")
        assert paper.config(preset.n_layer or 4) == dataclasses.replace(
            preset.config(preset.n_layer or 4), prompt_tail=0
        )
        assert not any("tail of" in note for note in paper.notes)


# Layers 2, 5 and 8 of 9 slide; the others have windows of their own, of 16 tokens.
OWN = ModelLayers(tuple(LayerKind.SLIDES if i % 3 == 2 else LayerKind.OWN_WINDOW for i in range(9)), own_window=16)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1::2", (5,)),
        ("::2", (2, 8)),
        ("-1:", (8,)),
        (":2", (2, 5)),
        ("5", (5,)),
        ("0-5", (2, 5)),
        ("0-1", ()),
        ("", ()),
    ],
)
def test_layer_lists_of_a_model_with_windows_of_its_own(text, layers):
    """Slices count the layers that can slide; numbers and ranges are the model's."""
    assert parse_layers(text, OWN) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "'4': layer 4 has a window of its own .16 tokens. and cannot slide; .* can are 2, 5, 8"),
        ("9", r"'9' goes past the model's 9 layers \(0 to 8\)"),
        ("3::2", "'3::2' goes past the model's 3 layers that can slide, which slices count"),
        (":4", "':4' goes past the model's 3 layers that can slide"),
    ],
)
def test_layer_lists_that_a_model_with_windows_of_its_own_cannot_have(text, message):
    with pytest.raises(ScheduleError, match=message):
        parse_layers(text, OWN)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        (SWAAConfig(8), (F, F, A) * 3),
        (SWAAConfig(8, force_fa_decode=True), (F, F, P) * 3),
        (SWAAConfig(8, force_fa_decode=True, non_sliding_layers=[0, 5]), (F, F, P, F, F, F, F, F, P)),
        (SWAAConfig(8, force_fa_decode=[2]), (F, F, P, F, F, A, F, F, A)),
    ],
)
def test_layers_with_a_window_of_their_own_keep_it(config, modes):
    schedule = config.schedule(OWN)
    assert schedule.layer_modes == modes
    assert schedule.config().schedule(OWN) == schedule
    assert sorted(layer for mode in LayerMode for layer in schedule.layers(mode)) == [2, 5, 8]


def test_fa_decode_for_a_window_of_the_models_own_is_refused():
    with pytest.raises(ScheduleError, match="force_fa_decode lists layer 4: layer 4 has a window of its own"):
        SWAAConfig(8, force_fa_decode=[2, 4]).schedule(OWN)
    with pytest.raises(ScheduleError, match="mode 1 for layer 0"):
        Schedule(8, 0, (P,) * 9, model=OWN)
    with pytest.raises(ScheduleError, match="layer_modes has 3 entries, but the model has 9 layers"):
        Schedule(8, 0, (P,) * 3, model=OWN)


def test_the_layers_are_no_part_of_what_makes_schedules_equal():
    with_model, without = SWAAConfig(8).schedule(OWN), Schedule(8, 0, (F, F, A) * 3)
    assert with_model == without
    assert hash(with_model) == hash(without)
    assert (with_model.is_naive, without.is_naive) == (True, False)


def test_slices_are_written_as_they_are_read():
    for layers in [(2, 5, 8), (5,), (2, 8), ()]:
        assert parse_layers(compact_layers(layers, OWN), OWN) == layers
    many = ModelLayers(tuple(LayerKind.SLIDES if i % 6 == 5 else LayerKind.OWN_WINDOW for i in range(36)), own_window=9)
    assert compact_layers((11, 23, 35), many) == "1::2"
    assert compact_layers((5, 11), many) == "5,11"


def test_the_cost_of_windows_of_the_models_own():
    schedule = SWAAConfig(64, keep_first=2, force_fa_decode=True, non_sliding_layers=[2]).schedule(OWN)
    n = 1000
    seen = {
        "own": [min(p + 1, 16) for p in range(n)],
        "window": [min(p + 1, 64 + min(2, max(0, p + 1 - 64))) for p in range(n)],
        "all": [p + 1 for p in range(n)],
    }
    kinds = ["own", "own", "all", "own", "own", "window", "own", "own", "window"]
    assert schedule.prefill_pairs(n) == tuple(sum(seen[kind]) for kind in kinds)
    assert schedule.decode_keys(n - 1) == tuple(16 if kind == "own" else n for kind in kinds)
    assert schedule.kv_cells(4096, n_ubatch=512) == tuple(768 if kind == "own" else 4096 for kind in kinds)
    assert Schedule.full(OWN).kv_cells(256, n_ubatch=512) == (256,) * 9


def test_a_layer_that_reads_another_ones_cache_has_none():
    kinds = (LayerKind.OWN_WINDOW, LayerKind.SLIDES) * 2
    shared = ModelLayers(kinds, own_window=16, kv_of=(0, 1, 0, 1))
    assert SWAAConfig(8).schedule(shared).kv_cells(4096, n_ubatch=256) == (512, 512, 0, 0)
    with pytest.raises(ScheduleError, match="layer 3 reads the KV cache of layer 1"):
        SWAAConfig(8, non_sliding_layers=[1]).schedule(shared)


def test_a_window_for_a_model_whose_layers_cannot_slide_is_refused():
    layers = ModelLayers((LayerKind.OWN_WINDOW, LayerKind.RECURRENT), own_window=16)
    with pytest.raises(ScheduleError, match=r"no layer of this model can slide: own window \(16 tokens\), recurrent"):
        SWAAConfig(8).schedule(layers)
    assert SWAAConfig().schedule(layers).is_full
