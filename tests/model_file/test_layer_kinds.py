"""Kinds of layers by metadata, against the patterns as their models are published: S slides, w own window, r recurrent,
n no attention."""

import pytest

from swaa_local.model_file.layer_kinds import layer_kinds
from swaa_local.schedule.model_layers import LayerKind

LETTERS = {LayerKind.SLIDES: "S", LayerKind.OWN_WINDOW: "w", LayerKind.RECURRENT: "r", LayerKind.NO_ATTENTION: "n"}


def kinds(architecture, n_layer, **values):
    keys = {f"{architecture}.{name.replace('__', '.')}": value for name, value in values.items()}
    keys[f"{architecture}.block_count"] = n_layer
    layers = layer_kinds(architecture, n_layer, keys.get)
    return "".join(LETTERS[kind] for kind in layers.kinds), layers


@pytest.mark.parametrize(
    ("architecture", "n_layer", "values", "expected", "window"),
    [
        ("qwen3", 4, {}, "SSSS", 0),
        ("phi3", 4, {"attention__sliding_window": 2047}, "SSSS", 0),
        ("gemma2", 5, {}, "wSwSw", 4096),
        ("gemma2", 4, {"attention__sliding_window": 512}, "wSwS", 512),
        ("gemma3", 8, {"attention__sliding_window": 512}, "wwwwwSww", 512),
        ("gemma3", 4, {}, "SSSS", 0),
        ("gemma3", 4, {"attention__sliding_window": 64, "attention__sliding_window_pattern": 2}, "wSwS", 64),
        (
            "gemma3",
            4,
            {"attention__sliding_window": 64, "attention__sliding_window_pattern": [True, False, False, True]},
            "wSSw",
            64,
        ),
        ("gpt-oss", 4, {"attention__sliding_window": 128}, "wSwS", 128),
        ("cohere2", 4, {"attention__sliding_window": 4096}, "wwwS", 4096),
        ("cohere2moe", 5, {"attention__sliding_window": 4096}, "SwwwS", 4096),
        ("olmo2", 4, {}, "SSSS", 0),
        ("olmo2", 4, {"attention__sliding_window": 4096}, "wwwS", 4096),
        ("smallthinker", 4, {"attention__sliding_window": 1}, "Swww", 4096),
        ("smallthinker", 4, {"attention__sliding_window": 0}, "SSSS", 0),
        ("exaone4", 4, {}, "SSSS", 0),
        ("exaone4", 64, {}, "wwwS" * 16, 4096),
        (
            "gemma4",
            4,
            {"attention__sliding_window": 8, "attention__sliding_window_pattern": [1, 1, 0, 0]},
            "wwSS",
            8,
        ),
        ("olmo2", 4, {"attention__sliding_window": 8, "attention__sliding_window_pattern": [1]}, "wSSS", 8),
        ("olmo2", 2, {"attention__sliding_window": 8, "attention__sliding_window_pattern": 0}, "ww", 8),
        ("mamba", 2, {}, "rr", 0),
        ("qwen3next", 5, {}, "rrrSr", 0),
        ("qwen35", 4, {"full_attention_interval": 2}, "rSrS", 0),
        ("qwen35", 4, {"attention__recurrent_layers": [1, 0, 1, 1]}, "rSrr", 0),
        ("granitehybrid", 4, {"attention__head_count_kv": [0, 0, 4, 0]}, "rrSr", 0),
        ("falcon-h1", 2, {"attention__head_count_kv": 2}, "SS", 0),
        (
            "nemotron_h",
            4,
            {"attention__head_count_kv": [0, 0, 2, 0], "feed_forward_length": [0, 64, 0, 0]},
            "rnSr",
            0,
        ),
    ],
)
def test_kinds(architecture, n_layer, values, expected, window):
    found, layers = kinds(architecture, n_layer, **values)
    assert found == expected
    assert layers.own_window == window
    assert layers.kv_of == ()


def test_caches_that_are_shared():
    pattern = [1, 1, 1, 0, 1, 0, 1, 0]
    values = {"attention__sliding_window": 8, "attention__sliding_window_pattern": pattern}
    _, layers = kinds("gemma4", 8, attention__shared_kv_layers=4, **values)
    assert layers.kv_of == (0, 1, 2, 3, 2, 3, 2, 3)
    _, layers = kinds("gemma3n", 25, attention__sliding_window=8)
    assert layers.kv_of == (*range(20), 18, 18, 18, 18, 19)
    assert kinds("gemma3n", 20, attention__sliding_window=8)[1].kv_of == ()
