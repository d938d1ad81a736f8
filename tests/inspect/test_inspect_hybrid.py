"""What `inspect`, `convert` and `list` say of a hybrid model, and how its layers are listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swaa_local.model_file.schedule_keys import read_schedule
from tests.support.context_cost import check_costs
from tests.support.program import fails, succeeds
from tests.support.tiny import ALWAYS, FULL, PREFILL, write_tiny_gguf
from tests.support.tiny_hybrid import ATTENDING, L_CACHE, SHAPE, hybrid, write_tiny_hybrid

ROW = 2 * 2 * SHAPE.n_head_kv * SHAPE.head_dim  # bytes of K and V of a token in F16


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_tiny_hybrid(tmp_path / "plain.gguf")


def test_inspect_shows_which_layers_attend(tmp_path, plain):
    assert "can slide  4 of 7: 1,3-4,6; others: recurrent" in succeeds("inspect", plain)
    path = write_tiny_hybrid(tmp_path / "m.gguf", schedule=hybrid(24, 4, (PREFILL, FULL, ALWAYS, PREFILL)))
    text = succeeds("inspect", path)
    for part in (
        "rPrFArP",
        "F   1 x full attention: 3",
        "P   2 x window while prefilling, full attention while decoding: 1,6",
        "A   1 x window always, KV cache is a ring: 4",
        "r   3 x recurrent: 0,2,5",
    ):
        assert part in text


def test_costs_are_of_layers_with_attention(tmp_path):
    path = write_tiny_hybrid(tmp_path / "m.gguf", schedule=hybrid(24, 4, (PREFILL, FULL, ALWAYS, PREFILL)))
    told = json.loads(succeeds("inspect", path, "-c", "2048", "-ub", "64", "--json"))
    assert told["full"]["kv_cells"] == [2048 if i in ATTENDING else 0 for i in range(7)]
    assert told["scheduled"]["kv_cells"] == [0, 2048, 0, 2048, 256, 0, 2048]
    assert told["full"]["kv_bytes"] == 4 * 2048 * ROW
    assert told["full"]["prefill_pairs"] == 4 * 2048 * 2049 // 2
    assert told["full"]["decode_keys"] == 4 * 2048
    assert told["schedule"]["layer_modes"] == [FULL, PREFILL, FULL, FULL, ALWAYS, FULL, PREFILL]
    assert told["schedule"]["swaa_config"]["non_sliding_layers"] == [3]


def test_recurrent_states_are_told_apart(tmp_path, plain):
    """The last tokens of a short convolution, in F32, in three layers: with a schedule or without, of any length."""
    expected = 3 * 4 * (L_CACHE - 1) * SHAPE.n_embd
    path = write_tiny_hybrid(tmp_path / "m.gguf", schedule=hybrid(24, 4, (PREFILL, FULL, ALWAYS, PREFILL)))
    for n_ctx in (256, 4096):
        told = json.loads(succeeds("inspect", path, "-c", n_ctx, "--json"))
        assert told["full"]["state_bytes"] == told["scheduled"]["state_bytes"] == expected
    assert any(
        line.split() == ["recurrent", "states", "3.0", "KiB"] for line in succeeds("inspect", plain).splitlines()
    )
    assert "recurrent states" not in succeeds("inspect", write_tiny_gguf(tmp_path / "qwen3.gguf"))


@pytest.mark.parametrize(
    ("listed", "full"),
    [
        ("1::2", (3, 6)),
        ("0::2", (1, 4)),
        (":2", (1, 3)),
        ("-1:", (6,)),
        ("3", (3,)),
        ("0-4", (1, 3, 4)),
        ("4,6", (4, 6)),
    ],
)
def test_lists_of_layers(tmp_path, plain, listed, full):
    """A number is the model's own, a range leaves recurrent layers out, a slice counts the others."""
    out = tmp_path / "out.gguf"
    succeeds("convert", plain, "-o", out, "--window", "24", "--sinks", "4", "--fa-decode", "--full-layers", listed)
    schedule = read_schedule(out)
    assert schedule is not None
    assert schedule.layer_modes == hybrid(24, 4, [FULL if i in full else PREFILL for i in ATTENDING]).layer_modes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--full-layers", "2"), "layer 2 is recurrent and cannot slide; the model's layers that can are 1, 3, 4, 6"),
        (("--full-layers", "4:"), "goes past the model's 4 layers that can slide, which slices count"),
        (("--full-layers", "7"), "goes past the model's 7 layers (0 to 6)"),
        (("--fa-decode-layers", "0,1"), "layer 0 is recurrent and cannot slide"),
        (("--full-layers", ":", "--fa-decode"), "all 4 layers that can slide have full attention"),
    ],
)
def test_lists_that_are_refused(tmp_path, plain, options, said):
    assert said in fails("convert", plain, "-o", tmp_path / "o.gguf", "--window", "24", *options)
    assert not (tmp_path / "o.gguf").exists()


def test_presets_take_every_second_layer_of_those_that_attend(tmp_path, plain):
    succeeds("convert", plain, "-o", tmp_path / "o.gguf", "--preset", "quality")
    schedule = read_schedule(tmp_path / "o.gguf")
    assert schedule is not None
    assert schedule.layer_modes == hybrid(2048, 100, (FULL, PREFILL, FULL, PREFILL)).layer_modes
    assert "w2048 k100 fadec 1,4 tail128" in succeeds("list", tmp_path)


@pytest.mark.parametrize("mode", [PREFILL, ALWAYS])
def test_a_file_that_gives_a_recurrent_layer_a_mode(tmp_path, mode):
    modes = list(hybrid(24, 4, (PREFILL,) * 4).layer_modes)
    modes[2] = mode
    path = write_tiny_hybrid(tmp_path / "m.gguf", schedule=hybrid(24, 4, (PREFILL,) * 4)._replace(layer_modes=modes))
    said = fails("inspect", path)
    assert f"swaa.layer_modes has mode {mode} for layer 2, which takes 0 (full) alone: layer 2 is recurrent" in said


def test_costs_are_those_of_the_engine(plain):
    modes = {"all modes": (PREFILL, FULL, ALWAYS, PREFILL), "rings": (ALWAYS,) * 4}
    check_costs(plain, {"full": None} | {name: hybrid(24, 4, each) for name, each in modes.items()})


def test_tune_refuses_by_name(plain):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    data = plain.with_name("data.jsonl")
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    said = fails("tune", plain, "--data", data, "-o", plain.with_name("adapter.gguf"), "--window", "24", "--fa-decode")
    assert "not every layer of this model can slide" in said
