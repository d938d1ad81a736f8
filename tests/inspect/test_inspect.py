"""`swaa-local inspect`: the layer map and the figures, on files with and without a schedule."""

from __future__ import annotations

import json
from contextlib import closing
from shlex import split

import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.chat.commands import run_command
from swaa_local.chat.session import Session
from swaa_local.chat.settings import Settings
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.layers import compact_layers
from swaa_local.schedule.text import layer_strip
from tests.support.gguf_edit import SWAA, i32s, u32, write_header_model
from tests.support.program import ROOT, fails, run, succeeds
from tests.support.tiny import ScheduleKeys, TinyShape, tiny_weights

F, P, A = LayerMode.FULL, LayerMode.PREFILL, LayerMode.ALWAYS

# Qwen3-4B's shape: 36 layers, 8 KV heads of dimension 128.
QWEN3_4B = {
    "qwen3.embedding_length": u32(2560),
    "qwen3.attention.head_count": u32(32),
    "qwen3.attention.head_count_kv": u32(8),
    "qwen3.attention.key_length": u32(128),
    "qwen3.attention.value_length": u32(128),
    "qwen3.context_length": u32(262144),
    "swaa.version": u32(1),
    "swaa.window": u32(2048),
    "swaa.sinks": u32(100),
}


def write_qwen3_4b(path, modes):
    return write_header_model(path, QWEN3_4B | {"swaa.layer_modes": i32s(list(modes))}, n_layer=36)


def test_a_model_has_one_size_everywhere(tiny_model_factory):
    """llama.cpp's own description guesses it from the shape: 256M for one of 135 million, `?B` for a tiny one."""
    model = tiny_model_factory()
    n_params = json.loads(succeeds("inspect", model, "--json"))["model"]["n_params"]
    assert n_params == sum(array.size for array in tiny_weights(TinyShape()).values())
    told = f"qwen3, {n_params / 1000:.2f} k parameters, F32"
    assert told in succeeds("inspect", model)
    arguments = split("-p 16 -n 0 -r 1 -t 1 -fa on --no-swaa")
    assert f"({told})" in succeeds("bench", model, *arguments)
    [line] = succeeds("bench", model, *arguments, "-o", "jsonl").splitlines()
    assert (json.loads(line)["model_type"], json.loads(line)["model_n_params"]) == (told, n_params)
    session = Session(lambda full: Llama(str(model), n_ctx=256), Settings())
    with closing(session):
        said: list[str] = []
        run_command(session, "/info", said.append)
    assert f"({told})" in said[0]


def test_the_tail_and_its_share_are_shown(tmp_path):
    """Counted one query at a time: what the last 128 tokens read that no window shows, in the layers that have one."""
    modes = [P if layer % 2 else F for layer in range(36)]
    path = write_qwen3_4b(tmp_path / "m.gguf", modes)
    tailed = write_header_model(
        tmp_path / "t.gguf", QWEN3_4B | {"swaa.layer_modes": i32s(modes), "swaa.tail": u32(128)}, n_layer=36
    )
    n = 8192
    more = 18 * sum(p + 1 - min(p + 1, 2048 + 100) for p in range(n - 128, n))
    plain, document = (json.loads(succeeds("inspect", file, "-c", n, "--json")) for file in (path, tailed))
    assert document["schedule"]["tail"] == 128
    assert SWAAConfig(**document["schedule"]["swaa_config"]) == SWAAConfig(
        2048, 100, True, range(0, 36, 2), prompt_tail=128
    )
    pairs = [shown["scheduled"]["prefill_pairs"] for shown in (plain, document)]
    assert pairs[1] - pairs[0] == document["scheduled"]["tail_pairs"] == more
    text = succeeds("inspect", tailed, "-c", n)
    assert "window 2048, sinks 100, tail 128, 36 layers" in text
    assert f"tail: its 128 tokens take {more / pairs[1]:.1%} of the scheduled query-key pairs" in text
    assert "tail" not in succeeds("inspect", path, "-c", n).replace(str(path), "")


@pytest.mark.parametrize("extra", [{"qwen3.ssm.state_size": 4}, {"qwen3.attention.kv_lora_rank": 4}])
def test_nothing_is_promised_where_no_schedule_can_apply(tiny_model_factory, extra, tmp_path):
    model = tiny_model_factory(extra=extra)
    text = succeeds("inspect", model)
    assert "schedule   none\n" in text
    assert "adds one" not in text
    assert "No schedule can apply here: architecture 'qwen3'" in text
    assert "no schedule to show; none can apply: architecture 'qwen3'" in fails("demo", "-m", model)
    done = run("convert", model, "-o", tmp_path / "o.gguf", "--outtype", "q8_0", "--dry-run")
    assert "note      no schedule can apply: architecture 'qwen3'" in done.stdout


def test_published_schedule_of_qwen3_4b(tmp_path):
    path = write_qwen3_4b(tmp_path / "m.gguf", [1, 0] * 18)
    text = succeeds("inspect", path)
    for part in (
        "window 2048, sinks 100, 36 layers",
        "PFPFPFPFPFPFPFPFPFPFPFPFPFPFPFPFPFPF",
        "18 x full attention: 1::2",
        "18 x window while prefilling, full attention while decoding: 0::2",
        "at 32768 tokens (-c), KV f16",
        "4.5 GiB",  # 32768 cells x 36 layers x 2 x 1024 x 2 bytes, by hand
    ):
        assert part in text
    assert "ring" not in text


def test_figures_of_rings_as_json(tmp_path):
    path = write_qwen3_4b(tmp_path / "m.gguf", [0] * 4 + [2] * 32)
    data = json.loads(succeeds("inspect", path, "-c", 40000, "-ctk", "q8_0", "-ctv", "Q8_0", "--json"))
    full_row, cells = 2 * 1024 // 32 * 34, 40192
    assert data["full"]["kv_bytes"] == 36 * cells * full_row
    assert data["scheduled"]["kv_bytes"] == (4 * cells + 32 * 2816) * full_row
    assert data["scheduled"]["kv_cells"] == [cells] * 4 + [2816] * 32
    n, w, k = 40000, 2048, 100
    windowed = sum(min(p + 1, w + min(k, max(0, p + 1 - w))) for p in range(n))
    assert data["full"]["prefill_pairs"] == 36 * n * (n + 1) // 2
    assert data["scheduled"]["prefill_pairs"] == 4 * n * (n + 1) // 2 + 32 * windowed
    assert data["scheduled"]["decode_keys"] == 4 * n + 32 * (w + k)
    assert data["schedule"]["swaa_config"] == {
        "sliding_window_size": 2048,
        "keep_first": 100,
        "force_fa_decode": False,
        "non_sliding_layers": [0, 1, 2, 3],
    }
    assert "2816 cells" in succeeds("inspect", path, "-c", 40000)
    assert "2304 cells" in succeeds("inspect", path, "-c", 40000, "-ub", 128)


def test_kv_bytes_are_what_the_engine_allocates(tiny_model_factory, load_model):
    from tests.support.masks import Sched
    from tests.support.tiny import ScheduleKeys

    modes = (0, 1, 2, 2)
    path = tiny_model_factory(schedule=ScheduleKeys(100, 10, modes))
    data = json.loads(succeeds("inspect", path, "-c", 3000, "-ub", 64, "--json"))
    from tests.support.engine import _lib

    context = load_model(Sched(100, 10, modes)).context(n_ctx=3000, n_batch=64)
    assert data["scheduled"]["kv_bytes"] == _lib.llama_swaa_kv_bytes(context.ptr)
    assert data["full"]["kv_bytes"] == 4 * 3072 * 2 * 64 * 2


def test_a_file_without_a_schedule_says_so(tiny_model):
    text = succeeds("inspect", tiny_model)
    assert "schedule   none: full attention everywhere" in text
    assert "saved" not in text
    data = json.loads(succeeds("inspect", tiny_model, "--json"))
    assert data["schedule"] is None
    assert data["scheduled"] is None
    assert data["n_ctx"] == 4096


FOUND = {"length": 2048, "keep": 0.9, "quality": 1.0432, "keeps": True, "evidence": "search", "speed": 2.317}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            FOUND,
            "keeps 104.3% of full attention's quality (90.0% asked for), reads 2.32 times as fast; nothing was checked",
        ),
        (
            FOUND | {"speed_in": "search"},
            "keeps 104.3% of full attention's quality (90.0% asked for), reads 2.32 times as fast in the search; "
            "nothing was checked",
        ),
        (
            FOUND
            | {"evidence": "check", "right": 4, "n": 16, "full_right": 5, "quality": 0.8, "keeps": False}
            | {"speed_in": "check"},
            "keeps 80.0% of full attention's quality (less than the 90.0% asked for), reads 2.32 times as fast in the "
            "check; "
            "4 of 16 right in the check, full attention 5",
        ),
    ],
)
def test_what_calibrate_found_is_told_in_words(tiny_model_factory, found, words):
    schedule = ScheduleKeys(24, 4, [P] * 4)
    model = tiny_model_factory(schedule=schedule, extra={"swaa.calibration": json.dumps(found)})
    assert f"\ncalibrated with prompts of 2048 tokens: {words}\n" in succeeds("inspect", model)


@pytest.mark.parametrize("stored", ["{}", "by hand", "[]", '{"length": "x"}'])
def test_what_somebody_else_stored_as_a_calibration_is_shown_as_it_is(tiny_model_factory, stored):
    model = tiny_model_factory(schedule=ScheduleKeys(24, 4, [P] * 4), extra={"swaa.calibration": stored})
    assert f"\ncalibrated {stored}\n" in succeeds("inspect", model)


def test_a_stored_schedule_of_full_layers(tmp_path):
    text = succeeds("inspect", write_qwen3_4b(tmp_path / "m.gguf", [0] * 36))
    assert "full attention in all 36 layers" in text


def test_no_figures_where_the_cache_is_no_plain_one(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", {"llama4.attention.sliding_window": u32(8192)}, arch="llama4")
    text = succeeds("inspect", path)
    assert "architecture 'llama4' attends in chunks of 8192 tokens" in text
    assert "at 4096 tokens" not in text
    assert json.loads(succeeds("inspect", path, "--json"))["full"] is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"swaa.version": u32(2)}, "swaa.version is 2"),
        ({"swaa.window": u32(0)}, "swaa.window is 0"),
        ({"swaa.sinks": None}, "key swaa.sinks is missing"),
        ({"swaa.layer_modes": i32s([0, 1, 2])}, "swaa.layer_modes has 3 entries, but the model has 4 layers"),
        ({"swaa.layer_modes": i32s([0, 1, 2, 3])}, "swaa.layer_modes[3] is 3"),
    ],
)
def test_malformed_schedules(tmp_path, keys, message):
    path = write_header_model(tmp_path / "bad.gguf", SWAA | keys)
    line = fails("inspect", path)
    assert message in line
    assert str(path) in line


def test_a_kv_type_that_does_not_fit_the_heads(tmp_path):
    path = write_header_model(tmp_path / "m.gguf", {"qwen3.attention.key_length": u32(40)})
    assert "needs rows of a multiple of 32 elements, not 80" in fails("inspect", path, "-ctk", "q8_0")


def test_a_missing_file(tmp_path):
    assert "none.gguf: cannot read it: No such file" in fails("inspect", tmp_path / "none.gguf")


def test_a_directory_is_refused_with_the_command_that_shows_what_is_in_it(tmp_path):
    directory = tmp_path / "my models"
    directory.mkdir()
    write_qwen3_4b(directory / "m.gguf", [F] * 36)
    message = fails("inspect", directory)
    assert f"{directory} is a directory" in message
    _, command = message.split("; ")
    program, *words = split(command.removesuffix(" shows the models in it"))
    assert program == "swaa-local"
    assert str(directory / "m.gguf") in succeeds(*words)


def write_gemma3(path, keys):
    """Every third layer is full, the others have a window of 256 tokens; 2 KV heads of dimension 32, 8 layers."""
    own = {"gemma3.attention.sliding_window": u32(256), "gemma3.attention.sliding_window_pattern": u32(3)}
    return write_header_model(path, own | keys, arch="gemma3", n_layer=8)


def test_layers_with_a_window_of_the_models_own_are_shown_and_counted(tmp_path):
    modes = [0, 0, 1, 0, 0, 0, 0, 0]
    schedule = {"swaa.version": u32(1), "swaa.window": u32(512), "swaa.sinks": u32(4), "swaa.layer_modes": i32s(modes)}
    path = write_gemma3(tmp_path / "m.gguf", schedule)
    text = succeeds("inspect", path, "-c", "4096", "-ub", "512")
    assert "can slide  2 of 8: 2,5; others: own window (256 tokens)" in text
    assert "\n  0 wwPwwFww\n" in text
    assert "  F   1 x full attention: 5\n" in text
    assert "  w   6 x own window (256 tokens): 0-1,3-4,6-7\n" in text
    data = json.loads(succeeds("inspect", path, "-c", "4096", "-ub", "512", "--json"))
    assert data["model"]["layer_kinds"] == ["own window", "own window", "slides"] * 2 + ["own window"] * 2
    assert data["model"]["own_window"] == 256
    assert data["schedule"]["swaa_config"]["non_sliding_layers"] == [5]
    everything, own = 4096 * 4097 // 2, 256 * 257 // 2 + (4096 - 256) * 256
    windowed = sum(min(p + 1, 512) + min(4, max(0, p + 1 - 512)) for p in range(4096))
    assert data["full"]["prefill_pairs"] == 2 * everything + 6 * own
    assert data["scheduled"]["prefill_pairs"] == everything + windowed + 6 * own
    assert data["scheduled"]["decode_keys"] == 2 * 4096 + 6 * 256
    cells = [768, 768, 4096, 768, 768, 4096, 768, 768]
    assert data["scheduled"]["kv_cells"] == cells
    assert data["scheduled"]["kv_bytes"] == sum(cells) * 2 * 64 * 2


def test_a_mode_for_a_window_of_the_models_own_is_refused(tmp_path):
    schedule = {"swaa.version": u32(1), "swaa.window": u32(512), "swaa.sinks": u32(4)}
    path = write_gemma3(tmp_path / "m.gguf", schedule | {"swaa.layer_modes": i32s([0, 0, 1, 2, 0, 0, 0, 0])})
    line = fails("inspect", path)
    assert "swaa.layer_modes has mode 2 for layer 3, which takes 0 (full) alone" in line
    assert "layer 3 has a window of its own (256 tokens) and cannot slide; the model's layers that can are 2, 5" in line


def test_without_a_schedule_the_layers_that_can_slide_are_told(tmp_path):
    text = succeeds("inspect", write_gemma3(tmp_path / "m.gguf", {}))
    assert "can slide  2 of 8: 2,5" in text
    assert "none: full attention where layers can slide" in text


def test_layer_strip_breaks_long_models_with_their_first_index():
    assert layer_strip(Schedule(8, 0, (F, P, A))) == ["0 FPA"]
    assert layer_strip(Schedule(8, 0, (F,) * 10 + (A,) * 5), width=8) == [" 0 FFFFFFFF", " 8 FFAAAAA"]


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), ""), ((1, 3, 5, 7), "1::2"), ((0, 4), "0,4"), ((1, 3, 5), "1,3,5"), ((0, 1, 2, 6), "0-2,6"), ((7,), "7")],
)
def test_compact_layers_are_the_command_lines_own_syntax(layers, text):
    from swaa_local.schedule.layers import parse_layers

    assert compact_layers(layers, 8) == text
    assert parse_layers(text, 8) == layers


def test_it_needs_no_engine(tiny_model, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('the engine was loaded')")
    done = run("inspect", tiny_model, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 0, done.stderr
