"""`swaa-local convert` from a GGUF: what is kept, what is refused, and that nothing half-done is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from swaa_local.convert import plan
from swaa_local.convert.request import ConvertError, Request
from swaa_local.convert.run import convert
from swaa_local.model_file.copy import copy_gguf
from swaa_local.model_file.header import GGUFFile
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.schedule.config import LayerMode, Schedule, SWAAConfig
from tests.support.gguf_edit import ODD_VALUES, SWAA, Typed, i32s, u32, write_header_model
from tests.support.program import environment, fails, interrupt, run, succeeds
from tests.support.tiny import ScheduleKeys, write_tiny_gguf

F, P, A = LayerMode.FULL, LayerMode.PREFILL, LayerMode.ALWAYS
OPTIONS = ("--window", 8, "--sinks", 2, "--full-layers", "0::2", "--fa-decode")
SCHEDULE = Schedule(8, 2, (F, P, F, P))
WITH_SCHEDULE = {"schedule": ScheduleKeys(8, 2, (F, P, F, P))}


def read_all(path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Every key's raw bytes but the schedule's, and every tensor's, by gguf-py."""
    reader = gguf.GGUFReader(path)
    keys = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith(("swaa.", "GGUF."))
    }
    return keys, {t.name: bytes([t.tensor_type]) + t.shape.tobytes() + t.data.tobytes() for t in reader.tensors}


def nothing_left(directory: Path, *names: str) -> bool:
    return sorted(os.listdir(directory)) == sorted(names)


def test_a_schedule_is_added_and_nothing_else_changes(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    done = run("convert", tiny_model, "-o", out, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert read_schedule(out) == SCHEDULE
    assert read_all(out) == read_all(tiny_model)
    reader = gguf.GGUFReader(out)
    assert reader.fields["swaa.version"].contents() == 1
    assert reader.fields["swaa.window"].contents() == 8
    assert reader.fields["swaa.sinks"].contents() == 2
    modes = reader.fields["swaa.layer_modes"]
    assert modes.contents() == [0, 1, 0, 1]
    assert modes.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert nothing_left(tmp_path, "out.gguf")


def test_the_output_has_the_rights_of_a_new_file(tmp_path, tiny_model):
    succeeds("convert", tiny_model, "-o", tmp_path / "out.gguf", *OPTIONS)
    (tmp_path / "new").touch()
    assert (tmp_path / "out.gguf").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_every_kind_of_metadata_survives_byte_for_byte(tmp_path, alignment):
    nested = Typed(
        [Typed(["a", ""], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)] * 2, *[gguf.GGUFValueType.ARRAY] * 2
    )
    keys = {**ODD_VALUES, "x.nested": nested, **({"general.alignment": u32(alignment)} if alignment else {})}
    source = write_header_model(tmp_path / "in.gguf", SWAA | keys)
    source.write_bytes(source.read_bytes() + b"tail")
    out = tmp_path / "out.gguf"
    with GGUFFile.open(source) as old:
        copy_gguf(old, out, None)  # the engine knows no nested arrays, so the command would refuse the file
    assert read_schedule(out) is None
    with GGUFFile.open(source) as old, GGUFFile.open(out) as new:
        assert list(new.keys) == [key for key in old.keys if not key.startswith("swaa.")]
        assert all(new.raw(key) == old.raw(key) for key in new.keys)
        assert new.raw_tensor_infos() == old.raw_tensor_infos()
        assert new.data_offset % (alignment or 32) == 0
        assert out.read_bytes()[new.data_offset :] == source.read_bytes()[old.data_offset :]


@pytest.mark.parametrize(
    "old",
    [
        SWAA,
        SWAA | {"swaa.version": u32(7)},
        {"swaa.layer_modes": i32s([9] * 77), "swaa.window": Typed("x", gguf.GGUFValueType.STRING)},
    ],
    ids=["good", "future", "malformed"],
)
def test_older_keys_are_replaced_even_if_malformed(tmp_path, tiny_model_factory, old):
    source = tmp_path / "old.gguf"
    with GGUFFile.open(tiny_model_factory()) as file:
        # The old keys of a small file go in front of the first key of a whole model.
        with GGUFFile.open(write_header_model(tmp_path / "keys.gguf", old)) as small:
            entries = [small.raw(key) for key in old] + [file.raw(key) for key in file.keys]
        head = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(entries))
        head += b"".join(entries) + file.raw_tensor_infos()
        source.write_bytes(head + bytes(-len(head) % 32) + file.path.read_bytes()[file.data_offset :])
    out = tmp_path / "out.gguf"
    succeeds("convert", source, "-o", out, *OPTIONS)
    assert read_schedule(out) == SCHEDULE
    assert read_all(out) == read_all(source)


def test_a_schedule_is_replaced_and_taken_away(tmp_path, tiny_model_factory):
    source = tiny_model_factory(**WITH_SCHEDULE)
    succeeds("convert", source, "-o", tmp_path / "b.gguf", "--window", 16)
    assert read_schedule(tmp_path / "b.gguf") == Schedule(16, 0, (A,) * 4)
    succeeds("convert", source, "-o", tmp_path / "c.gguf", "--no-swaa")
    assert read_schedule(tmp_path / "c.gguf") is None
    assert read_all(tmp_path / "b.gguf") == read_all(tmp_path / "c.gguf") == read_all(source)


def test_presets_and_options_on_top(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    done = run("convert", tiny_model, "-o", out, "--preset", "QUALITY", "--window", 64)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith("before you rely on it; --list-presets says what is known of quality")
    assert read_schedule(out) == Schedule(64, 100, (F, P, F, P), 128)
    message = fails("convert", tiny_model, "-o", tmp_path / "b.gguf", "--preset", "qwen3-4b")
    assert "published for a model of 36 layers, and this one has 4" in message
    succeeds("convert", tiny_model, "-o", tmp_path / "b.gguf", "--preset", "qwen3-4b", "--clip-layers")
    assert read_schedule(tmp_path / "b.gguf") == Schedule(2048, 100, (P, F, P, F), 128)


def test_a_tail_of_its_own_and_of_another_schedule(tmp_path, tiny_model):
    first, second, third = (tmp_path / f"{name}.gguf" for name in "abc")
    succeeds("convert", tiny_model, "-o", first, "--window", 16, "--sinks", 2, "--fa-decode", "--tail", 40)
    assert read_schedule(first) == Schedule(16, 2, (P,) * 4, 40)
    succeeds("convert", first, "-o", second, "--tail", 8)
    assert read_schedule(second) == Schedule(16, 2, (P,) * 4, 8)
    succeeds("convert", tiny_model, "-o", third, "--preset", "quality-paper")
    assert read_schedule(third) == Schedule(2048, 100, (F, P, F, P))
    assert "tail 40" in succeeds("inspect", first)
    message = fails("convert", tiny_model, "-o", tmp_path / "d.gguf", "--tail", 8)
    assert "the file has no schedule for --tail to change; add --window TOKENS or --preset NAME" in message


def test_layers_are_clipped_with_a_tail(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    options = ("--window", 16, "--full-layers", "1,9", "--fa-decode-layers", "0,2,7", "--clip-layers", "--tail", 5)
    succeeds("convert", tiny_model, "-o", out, *options)
    assert read_schedule(out) == Schedule(16, 0, (P, F, P, A), 5)


def test_a_presets_tail_goes_with_its_fa_decode(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    succeeds("convert", tiny_model, "-o", out, "--preset", "quality", "--no-fa-decode")
    assert read_schedule(out) == Schedule(2048, 100, (F, A, F, A), 0)


@pytest.mark.parametrize("options", [("--window", 8), ("--preset", "streaming")], ids=str)
@pytest.mark.parametrize("command", ["convert", "chat", "serve", "bench"])
def test_a_tail_that_no_layer_would_have_is_refused(tmp_path, tiny_model, command, options):
    place = {"convert": ("-o", tmp_path / "out.gguf"), "chat": ("-p", "a"), "serve": ("--port", 0)}.get(command, ())
    said = "--tail 9 has no effect without FA decode: add --fa-decode, or leave out --tail"
    assert said in fails(command, tiny_model, *place, *options, "--tail", 9)
    assert os.listdir(tmp_path) == []


def test_a_tail_that_no_layer_of_the_file_would_have_is_refused(tmp_path, tiny_model_factory):
    source = tiny_model_factory(schedule=ScheduleKeys(8, 2, (F, A, A, A)))
    assert "--tail 9 has no effect without FA decode" in fails("convert", source, "-o", tmp_path / "o", "--tail", 9)
    succeeds("convert", source, "-o", tmp_path / "o", "--tail", 0)


def test_fa_decode_by_layer(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    succeeds("convert", tiny_model, "-o", out, "--window", 8, "--fa-decode-layers", "0-1", "--full-layers", "3")
    assert read_schedule(out) == Schedule(8, 0, (P, P, A, F))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "nothing to do for .*: give a schedule, for instance --preset quality"),
        (("--no-swaa",), "has no schedule that --no-swaa could take away"),
        (("--outtype", "f32"), "nothing to do"),
        (("--outtype", "q9_x", "--window", 8), "unknown --outtype 'q9_x'; known are f32, f16"),
        (("--outtype", "iq1_s"), "IQ1_S needs an importance matrix"),
        (("--preset", "qwen"), "unknown preset 'qwen'; known are .*qwen3-4b"),
        (("--window", 8, "--full-layers", "1,4"), "'4' goes past the model's 4 layers"),
        (("--window", 8, "--full-layers", "odd"), "cannot read layer list item 'odd'"),
        (("--window", 8, "--full-layers", "0-3"), "all 4 layers have full attention, so it does nothing"),
        (("--window", 8, "--pre-tokenizer", "qwen2"), "--pre-tokenizer is for checkpoints"),
    ],
)
def test_requests_that_make_no_sense(tmp_path, tiny_model, args, message):
    assert re.search(message, fails("convert", tiny_model, "-o", tmp_path / "out.gguf", *args))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--sinks", 4), "--sinks needs a window"),
        (("--window", 0), "Invalid value for '--window'"),
        (("--window", 8, "--no-swaa"), "--no-swaa means no schedule"),
        (("--window", 8, "--fa-decode", "--fa-decode-layers", "1"), "give one of them"),
        (("--in-place", "--window", 8), "convert never rewrites its source"),
    ],
)
def test_wrong_usage_is_exit_code_2(tmp_path, tiny_model, args, message):
    assert message in fails("convert", tiny_model, "-o", tmp_path / "out.gguf", *args, code=2)
    assert nothing_left(tmp_path)


def test_output_is_required():
    assert "-o OUT.gguf" in fails("convert", "in.gguf", code=2)
    assert "convert never rewrites its source" in fails("convert", "in.gguf", "--in-place", code=2)


def test_an_existing_output_needs_force(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    assert "exists; pass --force to replace it" in fails("convert", tiny_model, "-o", out, *OPTIONS)
    assert out.read_text() == "precious"
    succeeds("convert", tiny_model, "-o", out, *OPTIONS, "--force")
    assert read_schedule(out) == SCHEDULE


def test_the_source_is_never_the_output(tmp_path, tiny_model):
    source = Path(shutil.copy(tiny_model, tmp_path / "m.gguf"))
    before = source.read_bytes()
    (tmp_path / "soft.gguf").symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    for name in ("m.gguf", "soft.gguf", "hard.gguf", "../" + tmp_path.name + "/m.gguf"):
        assert "is the source itself" in fails("convert", source, "-o", tmp_path / name, *OPTIONS, "--force")
    assert source.read_bytes() == before


def test_outputs_that_cannot_be_written(tmp_path, tiny_model):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    for out, message in {
        tmp_path / "file" / "out.gguf": "cannot write",
        tmp_path / "none" / "out.gguf": "is not a directory",
        tmp_path / "dir": "is a directory; name a file in it",
        Path("/proc/out.gguf"): "cannot write to /proc",
    }.items():
        assert message in fails("convert", tiny_model, "-o", out, *OPTIONS)
    assert nothing_left(tmp_path, "dir", "file")
    assert nothing_left(tmp_path / "dir")


def test_a_full_disk_in_the_middle_leaves_nothing(tmp_path, tiny_model):
    """The shell's limit of a file's size stands in for a full disk."""
    command = f"ulimit -f 500; exec {sys.executable} -m swaa_local convert {tiny_model} -o {tmp_path}/o.gguf --window 8"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_left(tmp_path)


def test_too_little_space_is_said_before_anything_is_done(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    request = Request(str(tiny_model), tmp_path / "out.gguf", SWAAConfig(8))
    with pytest.raises(ConvertError, match=r"not enough space .* MiB needed, 1000 B free in"):
        convert(request)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["none.gguf", "./none", "/nowhere/m.gguf", "a/b/c", "none"])
def test_missing_sources(tmp_path, name):
    assert "no such file or directory" in fails("convert", name, "-o", tmp_path / "o.gguf", *OPTIONS, cwd=tmp_path)
    assert nothing_left(tmp_path)


def test_damaged_sources(tmp_path, tiny_model):
    whole = tiny_model.read_bytes()
    source = tmp_path / "bad.gguf"
    for content, message in ((b"", "it is empty"), (b"x" * 99, "not a GGUF file"), (whole[:-40], "truncated")):
        source.write_bytes(content)
        assert message in fails("convert", source, "-o", tmp_path / "o.gguf", *OPTIONS)
        assert "bad.gguf" in fails("inspect", source)
    assert nothing_left(tmp_path, "bad.gguf")


def test_what_is_copied_must_run_too(tmp_path, tiny_model):
    """Also without a schedule, and before it replaces a good file."""
    source, good = tmp_path / "broken.gguf", tmp_path / "good.gguf"
    source.write_bytes(tiny_model.read_bytes().replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_xx.weight"))
    good.write_bytes(b"precious")
    for options in (("--no-swaa",), ("--outtype", "q8_0"), OPTIONS):
        with_old = write_with_schedule(source, tmp_path / "old.gguf")
        message = fails("convert", with_old, "-o", good, "--force", *options)
        assert "blk.3.ffn_up.weight" in message
        assert good.read_bytes() == b"precious"
    assert nothing_left(tmp_path, "broken.gguf", "good.gguf", "old.gguf")


def write_with_schedule(source: Path, target: Path) -> Path:
    """`source` with a schedule, which --no-swaa can take away."""
    with GGUFFile.open(source) as file:
        copy_gguf(file, target, SCHEDULE)
    return target


def test_architectures_are_refused_by_name(tmp_path):
    source = write_header_model(tmp_path / "m.gguf", {"mamba.ssm.conv_kernel": u32(4)}, arch="mamba")
    message = fails("convert", source, "-o", tmp_path / "o.gguf", *OPTIONS)
    assert "no schedule can apply: architecture 'mamba' has recurrent layers" in message
    assert nothing_left(tmp_path, "m.gguf")


def test_what_metadata_do_not_tell_the_engine_refuses(tmp_path, engine):
    source = write_tiny_gguf(tmp_path / "m.gguf", file_arch="nosucharch")
    message = fails("convert", source, "-o", tmp_path / "o.gguf", *OPTIONS)
    assert "the engine would not run" in message
    assert "nosucharch" in message
    assert nothing_left(tmp_path, "m.gguf")


def test_quantizing_keeps_or_sets_the_schedule(tmp_path, tiny_model_factory):
    source = tiny_model_factory(n_embd=256, **WITH_SCHEDULE)
    kept, changed = tmp_path / "kept.gguf", tmp_path / "changed.gguf"
    succeeds("convert", source, "-o", kept, "--outtype", "Q8_0")
    assert read_schedule(kept) == SCHEDULE
    succeeds("convert", source, "-o", changed, "--outtype", "q4_K_m", "--window", 16)
    assert read_schedule(changed) == Schedule(16, 0, (A,) * 4)
    assert read_model_info(kept).file_type == "Q8_0"
    assert read_model_info(changed).file_type == "Q4_K_M"
    types = {t.tensor_type for t in gguf.GGUFReader(changed).tensors}
    assert gguf.GGMLQuantizationType.Q4_K in types
    assert nothing_left(tmp_path, "kept.gguf", "changed.gguf")


def test_quantizing_is_what_llama_cpp_does(tmp_path, tiny_model):
    out = tmp_path / "out.gguf"
    succeeds("convert", tiny_model, "-o", out, "--outtype", "q8_0", *OPTIONS)
    original = {t.name: t for t in gguf.GGUFReader(tiny_model).tensors}
    for tensor in gguf.GGUFReader(out).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            expected = gguf.quants.quantize(original[tensor.name].data, gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(tensor.data, expected), tensor.name
        else:
            assert np.array_equal(tensor.data, original[tensor.name].data)


def test_what_the_quantizer_would_damage_is_refused(tmp_path):
    """llama.cpp's quantizer pads to 32 bytes whatever the file says, so its output could not be loaded."""
    source = write_header_model(tmp_path / "m.gguf", {"general.alignment": u32(64)})
    message = fails("convert", source, "-o", tmp_path / "o.gguf", "--outtype", "q8_0")
    assert "has 64-byte alignment, which llama.cpp's quantizer cannot write" in message


def test_quantizing_again_has_to_be_allowed(tmp_path, tiny_model):
    once, twice = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    succeeds("convert", tiny_model, "-o", once, "--outtype", "q8_0")
    message = fails("convert", once, "-o", twice, "--outtype", "q4_0")
    assert "already quantized (q8_0)" in message
    assert "--allow-requantize" in message
    succeeds("convert", once, "-o", twice, "--outtype", "q4_0", "--allow-requantize")
    assert read_model_info(twice).file_type == "Q4_0"
    succeeds("convert", once, "-o", tmp_path / "same.gguf", "--outtype", "Q8_0", *OPTIONS)
    assert read_all(tmp_path / "same.gguf") == read_all(once)


def test_dry_run_shows_the_plan_and_does_nothing(tmp_path, tiny_model):
    text = succeeds("convert", tiny_model, "-o", tmp_path / "o.gguf", *OPTIONS, "--outtype", "q4_k_m", "--dry-run")
    for part in ("qwen3, 4 layers", "window 8, sinks 2", "FPFP", "quantize", "Q4_K_M", "write the schedule", "o.gguf"):
        assert part in text
    assert nothing_left(tmp_path)
    assert "copy all tensors byte for byte" in succeeds(
        "convert", tiny_model, "-o", tmp_path / "o.gguf", *OPTIONS, "--dry-run"
    )
    assert "is the source itself" in fails("convert", tiny_model, "-o", tiny_model, *OPTIONS, "--dry-run")


@pytest.fixture
def large_model(tmp_path) -> Path:
    """Three sparse GB, so that a copy takes a while."""
    source = write_header_model(tmp_path / "in.gguf", SWAA)
    os.truncate(source, 3 << 30)
    return source


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_a_copy_leaves_nothing(tmp_path, large_model, number, code):
    args = ("convert", large_model, "-o", tmp_path / "out.gguf", "--no-swaa")
    assert interrupt(*args, when=lambda: any(tmp_path.glob(".swaa-local-*/*")), number=number) == code
    assert nothing_left(tmp_path, "in.gguf")


def test_stopping_the_quantizer_leaves_nothing(tmp_path):
    source = write_tiny_gguf(tmp_path / "in.gguf", n_embd=512, n_ff=2048, n_layer=4)
    args = ("convert", source, "-o", tmp_path / "out.gguf", "--outtype", "iq3_s", *OPTIONS)
    assert interrupt(*args, when=lambda: any(tmp_path.glob(".swaa-local-*/quantized.gguf"))) == 130
    assert nothing_left(tmp_path, "in.gguf")


def test_progress_on_a_terminal_has_bytes(tmp_path, tiny_model):
    pexpect = pytest.importorskip("pexpect")
    out = tmp_path / "out.gguf"
    command = ["-m", "swaa_local", "convert", str(tiny_model), "-o", str(out), "--window", "8"]
    child = pexpect.spawn(sys.executable, command, env=environment(TERM="xterm", COLUMNS="120"), encoding="utf-8")
    text = child.read()
    child.close()
    assert child.exitstatus == 0, text
    assert "writing out.gguf" in text
    assert "MB" in text


def test_the_engine_runs_the_result_with_its_schedule(tmp_path, tiny_model, load_model):
    from tests.support.engine import EngineModel
    from tests.support.masks import Sched

    out = tmp_path / "out.gguf"
    succeeds("convert", tiny_model, "-o", out, *OPTIONS)
    with EngineModel(out) as model:
        assert model.get_schedule() == Sched(8, 2, (0, 1, 0, 1))
