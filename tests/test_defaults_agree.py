"""What nobody asked for is the same everywhere: the documents, `Llama`, chat, bench, serve and inspect.

n_ubatch is the one that shows: rings are sized by it, progress comes with it, and speed depends on it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.bench.run import BenchRequest, _choices
from swaa_local.inspect.run import inspect_gguf
from swaa_local.schedule.config import Schedule
from swaa_local.serve.run import default_arguments
from swaa_local.text.units import format_bytes
from tests.support.program import ROOT, run, succeeds
from tests.support.serving import serving
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

KEYS = ScheduleKeys(window=8, sinks=2, layer_modes=[FULL, PREFILL, ALWAYS, ALWAYS])
SCHEDULE = Schedule(8, 2, tuple(KEYS.layer_modes))  # type: ignore[arg-type]


@pytest.fixture
def model(tiny_model_factory: Callable[..., Path]) -> Path:
    return tiny_model_factory(schedule=KEYS)


def inspected(model: Path, *args: object) -> dict[str, Any]:
    return json.loads(succeeds("inspect", model, "--json", *args))


def documented() -> tuple[int, int]:
    """n_batch and n_ubatch as docs/python.md says them, and n_ubatch as every command's help says it."""
    text = (ROOT / "docs" / "python.md").read_text()
    n_batch, n_ubatch = re.findall(r"^\| `n_batch`, `n_ubatch` \| (\d+), (\d+)", text, re.MULTILINE)[0]
    for command in ("chat", "bench", "eval", "inspect"):
        said = " ".join(succeeds(command, "--help", COLUMNS="200").split())
        assert f"[{n_ubatch}; 1024 for windows on a GPU]" in said, command
    return int(n_batch), int(n_ubatch)


def test_without_a_word_about_it_all_run_with_the_documented_ubatch(model: Path) -> None:
    n_batch, n_ubatch = documented()
    plain = inspected(model, "-c", 4096)
    assert plain["n_ubatch"] == n_ubatch
    # Llama, with the model's own context and with another
    for n_ctx in (0, 4096):
        llm = Llama(str(model), n_ctx=n_ctx, n_threads=1, n_threads_batch=1)
        assert (llm.n_batch, llm.context_params.n_ubatch) == (n_batch, n_ubatch)
        assert llm.kv_bytes == plain["scheduled"]["kv_bytes"]
        done: list[int] = []
        llm.on_prefill = lambda n, total, done=done: done.append(n)  # type: ignore[misc]
        llm.eval(random_tokens(1300))
        assert done == [0, n_ubatch, 2 * n_ubatch, 1300]
        llm.set_schedule(SWAAConfig(8, 2))
        assert llm.context_params.n_ubatch == n_ubatch
        llm.close()
    # chat, which says what its cache takes
    said = run("chat", model, "-p", "hello", "-n", 2, "-t", 1, "-v").stderr
    assert re.findall(r"n_ubatch += (\d+)", said) == [str(n_ubatch)]
    assert f"KV {format_bytes(plain['scheduled']['kv_bytes'])}" in said
    # bench
    for n_prompt in (100, 700):
        rows = json.loads(
            succeeds(
                *("bench", model, "-p", n_prompt, "-n", 1, "-r", 1, "-t", 1, "-fa", "on", "--no-limit"),
                *("--variants", "file", "-o", "json"),
            )
        )["results"]
        assert [row["n_ubatch"] for row in rows] == [n_ubatch]
        n_ctx = -(-(n_prompt + 1) // 256) * 256
        assert [row["kv_bytes"] for row in rows] == [inspected(model, "-c", n_ctx)["scheduled"]["kv_bytes"]]
    # serve, one request at once: a ring takes more for several
    with serving(model, "-c", 4096, "-np", 1, "-v", "-lv", 4) as server:
        assert re.findall(r"n_ubatch += (\d+)", server.log) == [str(n_ubatch)]
        ring = re.findall(r"ring KV cache, size = (\d+) cells", server.log)
        assert ring == [str(plain["scheduled"]["kv_cells"][-1])]


@pytest.mark.parametrize("n_ubatch", [64, 1000])
def test_what_was_said_is_what_all_run_with(model: Path, n_ubatch: int) -> None:
    plain = inspected(model, "-c", 4096, "-ub", n_ubatch)
    llm = Llama(str(model), n_ubatch=n_ubatch)
    assert (llm.context_params.n_ubatch, llm.kv_bytes) == (n_ubatch, plain["scheduled"]["kv_bytes"])
    llm.close()
    said = run("chat", model, "-p", "hello", "-n", 2, "-t", 1, "-ub", n_ubatch).stderr
    assert f"KV {format_bytes(plain['scheduled']['kv_bytes'])}" in said


@pytest.mark.parametrize(("swaa", "expected"), [(SCHEDULE, 1024), (False, 512)], ids=["windows", "full attention"])
def test_windows_on_a_gpu_take_larger_ubatches_everywhere(
    model: Path, monkeypatch: pytest.MonkeyPatch, swaa: Any, expected: int
) -> None:
    """There is no GPU here; the engine only has to say so for the choice to be made."""
    from llama_cpp import llama_cpp as c

    monkeypatch.setattr(c, "llama_supports_gpu_offload", lambda: True)
    schedule = swaa or Schedule.full(4)
    for n_ctx in (0, 4096):
        llm = Llama(str(model), swaa=swaa, n_ctx=n_ctx, n_gpu_layers=-1, n_threads=1)
        assert llm.context_params.n_ubatch == expected
        llm.set_schedule(SCHEDULE)
        assert llm.context_params.n_ubatch == 1024
        llm.close()
    assert _choices(BenchRequest(model)).n_ubatches(schedule) == (expected,)
    assert default_arguments(swaa or None, [], {}, gpu=c.llama_supports_gpu_offload()) == [
        "--ubatch-size",
        str(expected),
    ]
    if swaa:
        assert inspect_gguf(model).n_ubatch == expected
    on_cpu = Llama(str(model), swaa=swaa, n_gpu_layers=0, n_threads=1)
    assert on_cpu.context_params.n_ubatch == 512
    on_cpu.close()


def test_inspect_needs_no_engine(model: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise ImportError('not installed')")
    said = succeeds("inspect", model, "--json", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert json.loads(said)["n_ubatch"] == 512
