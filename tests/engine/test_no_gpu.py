"""What is told where layers are wanted on a GPU and there is none: by the command line, and by `Llama`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from swaa_local import Llama
from swaa_local.engine import devices, native, no_gpu
from swaa_local.llama import NoGPUWarning
from tests.support.program import run

ALONE = "the engine is built for CPUs alone, and runs there"
for_cpus_alone = pytest.mark.skipif(bool(devices.built_for()), reason="the installed engine is built for a GPU")


def without(monkeypatch: pytest.MonkeyPatch, built_for: Sequence[str], n_gpu_layers: int) -> str | None:
    monkeypatch.setattr(devices, "built_for", lambda: tuple(built_for))
    monkeypatch.setattr(no_gpu, "has_gpu", lambda _verbose: False)
    return no_gpu.without_gpu(n_gpu_layers, option="-ngl")


@pytest.mark.parametrize("n_gpu_layers", [-1, 99])
def test_an_engine_for_a_gpu_that_finds_none_says_what_to_look_at(monkeypatch, n_gpu_layers):
    said = without(monkeypatch, ["Vulkan"], n_gpu_layers)
    assert said is not None
    assert "built for Vulkan, but finds no such GPU, and runs on the CPU" in said
    assert "`vulkaninfo --summary`" in said
    assert said.endswith("-ngl 0 asks for the CPU")
    assert "nvidia-smi" in str(without(monkeypatch, ["CUDA"], n_gpu_layers))
    assert "built for CUDA and Vulkan" in str(without(monkeypatch, ["CUDA", "Vulkan"], n_gpu_layers))
    assert "built for SYCL, but finds no such GPU" in str(without(monkeypatch, ["SYCL"], n_gpu_layers))


def test_nobody_is_told_who_has_what_they_want(monkeypatch):
    assert without(monkeypatch, ["Vulkan"], 0) is None
    assert without(monkeypatch, [], 0) is None
    assert without(monkeypatch, [], -1) is None  # all there are: none
    monkeypatch.setattr(no_gpu, "has_gpu", lambda _verbose: True)
    assert no_gpu.without_gpu(99, option="-ngl") is None


def test_a_number_of_layers_is_never_dropped_in_silence(monkeypatch):
    said = without(monkeypatch, [], 20)
    assert said is not None
    assert said.startswith(f"-ngl is 20, but {ALONE}")
    assert "docs/install.md" in said


@pytest.mark.parametrize("name", ["libggml-{}.so", "libggml-{}.dylib", "ggml-{}.dll"])
def test_what_an_engine_is_built_for_is_known_by_its_libraries(tmp_path: Path, name: str):
    for part in ("base", "cpu", "cpu-haswell", "rpc", "blas"):
        (tmp_path / name.format(part)).touch()
    assert devices._backends_in(tmp_path) == ()
    (tmp_path / name.format("vulkan")).touch()
    assert devices._backends_in(tmp_path) == ("Vulkan",)
    (tmp_path / name.format("cuda")).touch()
    assert devices._backends_in(tmp_path) == ("CUDA", "Vulkan")


@for_cpus_alone
def test_llama_warns_and_runs_on_the_cpu(tiny_model):
    with pytest.warns(NoGPUWarning, match=rf"n_gpu_layers is 4, but {ALONE}") as caught:
        llm = Llama(str(tiny_model), n_ctx=256, n_gpu_layers=4, n_threads=1)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert llm.layers_in_words == "layers 0-3 on this CPU"
    llm.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoGPUWarning)
        for known in ({}, {"n_gpu_layers": 0}, {"n_gpu_layers": -1}):
            Llama(str(tiny_model), n_ctx=256, n_threads=1, **known).close()


@for_cpus_alone
@pytest.mark.parametrize(
    "command",
    [
        ("chat", "-p", "Hello", "-n", "2", "-c", "512", "--no-cache"),
        ("bench", "-p", "64", "-n", "0", "-r", "1", "--variants", "file"),
        ("demo", "--no-chat", "--questions", "1", "--length", "768"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_tells_it_once(tmp_path: Path, command: tuple[str, ...]):
    done = run(*command, "-t", "1", "-ngl", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"-ngl is 20, but {ALONE}") == 1

    assert "NoGPUWarning" not in done.stderr
    done = run(*command, "-t", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ALONE not in done.stderr


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("libvulkan.so.1: cannot open shared object file: No such file or directory", "apt-get install libvulkan1"),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "install NVIDIA's driver"),
        ("libcudart.so.12: cannot open shared object file: No such file or directory", "install the CUDA toolkit"),
    ],
)
def test_a_driver_s_library_that_is_missing_is_named_with_what_brings_it(reason: str, remedy: str):
    said = native.remedy_of(f"Failed to load shared library '/x/libllama.so': {reason}")
    assert remedy in said
    assert "build without that GPU" in said


def test_another_library_that_is_missing_is_the_build_s_own():
    assert native.remedy_of("libggml-vulkan.so: cannot open shared object file") == native.REMEDY
    assert native.remedy_of("libggml-cuda.so: cannot open shared object file") == native.REMEDY


@for_cpus_alone
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("chat", "a.gguf", "-m", "b.gguf"), 2),
        (("chat", "missing.gguf", "-p", "Hello"), 1),
        (("bench", "missing.gguf"), 1),
        (("bench", "--variants", "full", "--window", "64"), 2),
        (("eval", "missing.gguf"), 1),
        (("eval", "--dataset", "d.jsonl", "--task", "facts"), 2),
        (("calibrate", "--data", ".", "--questions", "q.jsonl"), 2),
        (("calibrate", "-o", "no/such/folder/out.gguf"), 1),
        (("demo", "-m", "missing.gguf"), 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_with_a_command_is_told_before_the_engine_is_asked(
    tmp_path: Path, command: tuple[str, ...], code: int
):
    (tmp_path / "q.jsonl").touch()
    (tmp_path / "d.jsonl").touch()
    done = run(*command, "-t", "1", "-ngl", "20", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "-ngl" not in done.stderr
