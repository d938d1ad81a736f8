"""Models in several GGUF files: read, run, merged, and what is said of parts that are missing or named alone."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

import gguf_faults
from swaa_local import Llama, read_schedule
from swaa_local.errors import GGUFError, ModelLoadError
from swaa_local.inspect.run import inspect_gguf
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.split import PartName, open_gguf, whole_models
from tests.support.gguf_edit import T, Typed, u32, write_header_model, write_split
from tests.support.program import fails, succeeds
from tests.support.serving import serving
from tests.support.tiny import ALWAYS, ScheduleKeys

WINDOW = ("--window", 8, "--sinks", 2, "--full-layers", "0::2", "--fa-decode")


@pytest.fixture(scope="module")
def source(tiny_model_factory) -> Path:
    return tiny_model_factory(schedule=ScheduleKeys(16, 2, (ALWAYS,) * 4))


@pytest.fixture
def parts(source, tmp_path) -> list[Path]:
    return write_split(source, tmp_path, "m", 3)


@pytest.mark.parametrize("empty_first", [False, True])
def test_merged_it_is_the_model_that_was_split(source, tmp_path, empty_first):
    first, *_ = write_split(source, tmp_path, "m", 3, empty_first=empty_first)
    out = tmp_path / "out.gguf"
    plan = succeeds("convert", first, "-o", out, "--dry-run")
    assert "copy all tensors of 3 files into one byte for byte" in plan
    succeeds("convert", first, "-o", out)
    assert out.read_bytes() == source.read_bytes()


def test_merged_with_another_schedule_or_none_or_weight_type(source, parts, tmp_path):
    for options, name in ((WINDOW, "w"), (("--no-swaa",), "n"), ((*WINDOW, "--outtype", "q8_0"), "q")):
        of_parts, of_whole = tmp_path / f"{name}.gguf", tmp_path / f"{name}-whole.gguf"
        succeeds("convert", parts[0], "-o", of_parts, *options)
        succeeds("convert", source, "-o", of_whole, *options)
        assert of_parts.read_bytes() == of_whole.read_bytes()


def test_an_alignment_that_the_later_parts_do_not_have(source, tmp_path):
    """gguf-split writes the other parts with the usual 32."""
    first, *_ = write_split(source, tmp_path, "m", 3)
    part = gguf_faults.take_apart(first.read_bytes())
    part.set("general.alignment", gguf_faults.U32, struct.pack("<I", 256))
    offset, data, tensors = 0, b"", []
    ends = [tensor.offset for tensor in part.tensors[1:]] + [len(part.data)]
    for tensor, end in zip(part.tensors, ends, strict=True):
        tensors.append(gguf_faults.Tensor(tensor.name, tensor.dims, tensor.type, offset))
        data += part.data[tensor.offset : end]
        data += bytes(-len(data) % 256)
        offset = len(data)
    part.tensors, part.data = tensors, data
    head = part.encode()[: -len(data)]
    first.write_bytes(head + bytes(-len(head) % 256) + data)
    out = tmp_path / "out.gguf"
    succeeds("convert", first, "-o", out)
    with open_gguf(out) as merged:
        assert merged.alignment == 256
        assert all(tensor.offset % 256 == 0 for tensor in merged.tensors)
    assert greedy(out) == greedy(source)


def greedy(path: Path) -> list[int]:
    llm = Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1)
    tokens = llm.tokenize(b"The quick brown fox")
    out = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(8), strict=False)]
    llm.close()
    return out


def test_inspect_and_llama_take_the_first_part_for_the_model(source, parts):
    whole, split = inspect_gguf(source), inspect_gguf(parts[0])
    assert split.model.n_params == whole.model.n_params
    assert split.model.n_split == 3
    assert split.model.file_bytes == sum(part.stat().st_size for part in parts)
    assert (split.schedule, split.full, split.scheduled) == (whole.schedule, whole.full, whole.scheduled)
    shown = succeeds("inspect", parts[0])
    assert "split      into 3 files, of which this is the first; figures are of all" in shown
    assert json.loads(succeeds("inspect", parts[0], "--json"))["model"]["n_split"] == 3
    assert read_schedule(parts[0]) == read_schedule(source)
    assert greedy(parts[0]) == greedy(source)


def test_a_split_model_is_served_and_chatted_with(parts):
    succeeds("chat", parts[0], "-t", "1", "-c", "256", "-n", "2", "-p", "Hi")
    with serving(parts[0], "-c", "256") as server:
        assert server.post("/completion", {"prompt": "Hi", "n_predict": 2})[0] == 200


@pytest.mark.parametrize(
    "command", [("inspect",), ("convert", "-o", "out.gguf", "--no-swaa"), ("chat", "-p", "Hi"), ("serve",)]
)
def test_a_later_part_names_the_first(parts, tmp_path, command):
    message = fails(command[0], parts[1], *command[1:], cwd=tmp_path)
    assert "m-00002-of-00003.gguf: is part 2 of 3 of a split model; name the first: m-00001-of-00003.gguf" in message


def test_parts_that_are_missing_or_do_not_belong_together(source, parts, tmp_path):
    def message() -> str:
        with pytest.raises(ModelLoadError) as of_llama:
            Llama(str(parts[0]))
        with pytest.raises(GGUFError) as caught:
            read_model_info(parts[0])
        assert str(of_llama.value) == str(caught.value)
        return str(caught.value)

    kept = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    assert "says that it is part 2 of 3, and its name that it is part 3 of 3" in message()
    parts[2].write_bytes(kept[:-40])
    assert "m-00003-of-00003.gguf: truncated" in message()
    other = gguf_faults.take_apart(kept)
    del other.tensors[-1]
    parts[2].write_bytes(other.encode())
    n_tensors = len(gguf_faults.take_apart(source.read_bytes()).tensors)
    assert f"hold {n_tensors - 1} tensors and should hold {n_tensors}" in message()
    parts[2].unlink()
    assert "m-00003-of-00003.gguf: missing, and it is part 3 of 3" in message()


def test_a_first_part_under_another_name(parts, tmp_path):
    renamed = parts[0].rename(tmp_path / "mine.gguf")
    assert "call it mine-00001-of-00003.gguf, and the others mine-00002-of-00003.gguf and so on" in fails(
        "inspect", renamed
    )


@pytest.mark.parametrize("value", [Typed("two", T.STRING), Typed(-2, T.INT32), u32(1 << 20), Typed(True, T.BOOL)])
def test_a_count_that_is_none(tmp_path, value):
    path = write_header_model(tmp_path / "m.gguf", {"split.count": value})
    with pytest.raises(GGUFError, match=r"split\.count is .*expected 0 to 65535"):
        read_model_info(path)


def test_names_of_parts():
    part = PartName.parse("dir/a-b-00002-of-00011.gguf")
    assert part == PartName("dir/a-b", 2, 11)
    assert str(part) == "dir/a-b-00002-of-00011.gguf"
    assert part.all[::10] == ("dir/a-b-00001-of-00011.gguf", "dir/a-b-00011-of-00011.gguf")
    for name in ("a.gguf", "a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-1-of-2.gguf", "a-00001-of-00002.bin"):
        assert PartName.parse(name) is None
    names = ["b.gguf", "a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "c-00002-of-00002.gguf"]
    assert whole_models(names) == {
        "b.gguf": ("b.gguf",),
        "a-00001-of-00002.gguf": ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"),
        "c-00001-of-00002.gguf": ("c-00001-of-00002.gguf", "c-00002-of-00002.gguf"),
    }


def test_a_directory_stands_for_its_only_model(parts, tmp_path, source):
    assert "is a directory with 2 models" in _with_another(source, tmp_path)
    os.remove(tmp_path / "other.gguf")
    (tmp_path / "._m-00001-of-00003.gguf").write_bytes(b"macOS writes these")
    (tmp_path / "m-mmproj-f16.gguf").write_bytes(b"what sees is no model by itself")
    succeeds("chat", tmp_path, "-t", "1", "-c", "256", "-n", "2", "-p", "Hi")


def _with_another(source: Path, folder: Path) -> str:
    (folder / "other.gguf").write_bytes(source.read_bytes())
    return fails("chat", folder, "-p", "Hi")
