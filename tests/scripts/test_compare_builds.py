"""scripts/compare_builds.py from outside: both builds are measured, and its figures follow from its samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.program import ROOT, environment
from tests.support.tiny import ScheduleKeys

SCRIPT = [sys.executable, str(ROOT / "scripts" / "compare_builds.py")]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*SCRIPT, *map(str, args)], env=environment(), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def stock() -> str:
    folder = os.environ.get("SWAA_STOCK_LIB")
    if not folder:
        pytest.skip("SWAA_STOCK_LIB names no unpatched build of llama.cpp to compare with")
    return folder


@pytest.mark.usefixtures("engine")
def test_two_builds_are_measured_in_turn_and_figures_follow_from_the_samples(tiny_model, stock):
    args = ("-t", 1, "--cpu-time", "-r", 2, "-p", 40, "-n", 2, "-d", 300, "-ub", 32, "-ctk", "f16,q8_0")
    done = run(tiny_model, "--stock", stock, *args, "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert (found["stock"]["patched"], found["patched"]["patched"]) == (False, True)
    assert found["stock"]["libraries"] != found["patched"]["libraries"]
    settings = {(s["kv_type"], s["flash_attn"], s["test"]) for s in found["series"]}
    fas = [("f16", True), ("f16", False), ("q8_0", True)]  # a quantized V cache needs flash attention
    assert settings == {(kv, fa, test) for kv, fa in fas for test in ("pp40", "tg2")}
    assert len(found["series"]) == len(settings)
    for series in found["series"]:
        for samples in (series["stock_s"], series["patched_s"], series["copy_bytes_per_s"]):
            assert len(samples) == 2
            assert min(samples) > 0
        # 4 layers of 2 heads of 32 elements, keys and values
        bytes_of_element = 2 if series["kv_type"] == "f16" else 34 / 32
        assert series["kv_bytes"] == 300 * 4 * 2 * 64 * bytes_of_element

    for series, speed in zip(found["series"], found["speeds"], strict=True):
        ratios = [a / b for a, b in zip(series["stock_s"], series["patched_s"], strict=True)]
        assert speed["patched_over_stock"] == pytest.approx(
            {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
        )
    assert [d["kv_type"] for d in found["deep_decodes"]] == ["f16", "q8_0"]
    for deep in found["deep_decodes"]:
        check_deep_decode(deep, found)


def check_deep_decode(deep: dict[str, Any], found: dict[str, Any]) -> None:
    same = [s for s in found["series"] if (s["test"], s["kv_type"]) == ("tg2", deep["kv_type"])]
    stock_s = {s["flash_attn"]: median(s["stock_s"]) / 2 for s in same}
    assert deep["stock_s"]["median"] == pytest.approx(min(stock_s.values()))
    assert stock_s[deep["stock_flash_attn"]] == min(stock_s.values())
    ours = next(s for s in same if s["flash_attn"])
    moved = ours["kv_bytes"] + found["weight_bytes"]
    floors = [moved / rate for rate in ours["copy_bytes_per_s"]]
    assert deep["floor_once_s"]["median"] == pytest.approx(median(floors))
    assert deep["floor_twice_s"]["median"] == pytest.approx(median(floors) / 2)
    over = [seconds / 2 / floor for seconds, floor in zip(ours["patched_s"], floors, strict=True)]
    assert deep["over_floor_once"]["median"] == pytest.approx(median(over))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("flash", ["on", "off"])
def test_a_filled_cache_is_one_that_the_tokens_could_have_left(new_context, flash):
    """The engine takes the repeated state, and gives back the very bytes; repeated once, it is the state itself."""
    from engine_build import BuildError, repeat_state

    with_tokens = new_context(None, flash=flash, kv="F16", n_ctx=512)
    with_tokens.feed(list(range(50, 90)))
    state = np.frombuffer(with_tokens.state(0), np.uint8)
    same, token_bytes = repeat_state(state, 40)
    assert same.tobytes() == state.tobytes()
    assert token_bytes == 2 * 2 * 64 * 2  # 2 layers, keys and values, 2 heads of 32 elements, F16

    repeated, _ = repeat_state(state, 100)
    filled = new_context(None, flash=flash, kv="F16", n_ctx=512)
    filled.load_state(repeated.tobytes(), 0)
    assert filled.state(0) == repeated.tobytes()
    for damaged in (state[:-1], np.append(state, np.uint8(0))):
        with pytest.raises(BuildError, match="not that of one plain KV cache"):
            repeat_state(damaged, 100)


def test_weights_are_those_that_a_token_reads(tiny_model_factory):
    from compare_builds import read_model

    def size(path: Path, *, skip: str, share: float = 1) -> float:
        tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
        return sum(n * (share if "_exps." in name else 1) for name, n in tensors.items() if name != skip)

    dense, experts = tiny_model_factory(), tiny_model_factory(arch="qwen3moe")
    assert read_model(dense)[1] == size(dense, skip="token_embd.weight")
    assert read_model(experts)[1] == size(experts, skip="token_embd.weight", share=2 / 4)


@pytest.mark.usefixtures("engine")
def test_what_cannot_be_compared_is_refused_with_a_reason(tiny_model, tiny_model_factory, tmp_path):
    scheduled = tiny_model_factory(schedule=ScheduleKeys(64, 4, [1] * 4))
    for model, folder, reason in (
        (scheduled, tmp_path, "has a schedule, which upstream's build does not run"),
        (tiny_model, tmp_path / "none", "no such folder"),
        (tiny_model, tmp_path, "the stock build: "),  # an empty folder
    ):
        done = run(model, "--stock", folder)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("compare_builds.py: error: ")
        assert reason in done.stderr


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["-t", "2", "--cpu-time"], "add -t 1"),
        (["-ctk", "q8_0", "-fa", "0"], "without flash attention"),
        (["-ctk", "f16,q8_0", "-ctv", "f16"], "one of V for each of K"),
        (["-ctk", "q9"], "known are f32, f16"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(capsys, args, reason):
    from compare_builds import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["model.gguf", "--stock", "lib", *args])
    assert reason in capsys.readouterr().err


def test_the_table_says_what_was_measured_and_what_is_not_alike():
    """By hand: copies of 1 GB/s, a cache of 3 MB and weights of 2 MB, so a floor of 5 ms or, read + written, 2.5 ms."""
    from build_figures import Comparison, Series, markdown
    from engine_build import BuildInfo

    def info(patched: bool, features: str) -> BuildInfo:
        return BuildInfo("lib", patched, features, "a CPU", 2_000_000)

    comparison = Comparison(
        model="folder/tiny.gguf",
        stock=info(False, "AVX = 1"),
        patched=info(True, "AVX2 = 1"),
        n_threads=1,
        n_ubatch=512,
        cpu_time=True,
        weight_bytes=2_000_000,
        copy_bytes=1 << 28,
        series=[
            Series("tg2", 2, 4096, "f16", True, 3_000_000, [0.1, 0.2, 0.3], [0.02, 0.02, 0.02], [1e9] * 3),
            Series("tg2", 2, 4096, "f16", False, 3_000_000, [0.04, 0.05, 0.08], [0.04, 0.05, 0.08], [1e9] * 3),
        ],
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(comparison).splitlines()]
    assert ["tg2 @ d4096", "f16", "on", "10.0", "100.0", "10.000 (5.000-15.000)"] in cells
    assert ["tg2 @ d4096", "f16", "off", "40.0", "40.0", "1.000"] in cells
    better, ours = ["25.0 ms (fa off)", "10.0 ms"], "0.40 (0.25-0.50)"
    assert ["tg2 @ d4096", "f16", "2.9 MiB", *better, ours, "5.00 ms", "2.00", "2.50 ms", "4.00"] in cells
    assert "CPU time" in markdown(comparison)
    assert "NOTE: the builds have not the same CPU features" in markdown(comparison)
    comparison.stock = comparison.patched
    assert "so it is not upstream's" in markdown(comparison)
