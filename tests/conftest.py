"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile

# A shell starts what it puts in the background deaf to Ctrl-C, and children inherit that; the tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGQUIT") and signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
# And `nohup` makes them deaf to hanging up.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Before numpy loads its BLAS: with matrices this small, threads that wait for busy cores cost far more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.tiny import write_tiny_gguf

if TYPE_CHECKING:
    from tests.support.engine import EngineContext, EngineModel
    from tests.support.masks import Sched

# What the program keeps of texts and conversations is the user's; the tests have a place of their own.
_OWN = tempfile.TemporaryDirectory(prefix="swaa-tests-")
os.environ["XDG_CACHE_HOME"] = os.path.join(_OWN.name, "cache")
os.environ["XDG_STATE_HOME"] = os.path.join(_OWN.name, "state")


def pytest_sessionstart() -> None:
    """Where layers are wanted on a GPU and there is none, every test would pass on the CPU."""
    layers = os.environ.get("SWAA_TEST_GPU_LAYERS", "0")
    if int(layers) > 0:
        from llama_cpp import llama_cpp

        from swaa_local.engine import devices

        llama_cpp.llama_backend_init()  # loads the backends of a build that has them as modules
        if not devices.usual():
            pytest.exit(f"SWAA_TEST_GPU_LAYERS is {layers}, but the engine finds no GPU", returncode=4)


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_factory(**write_tiny_gguf's keywords) -> Path`; equal keywords give the same file: read only."""
    directory = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(**kwargs: Any) -> Path:
        key = repr(sorted(kwargs.items()))
        if key not in made:
            made[key] = write_tiny_gguf(directory / f"tiny-{len(made)}.gguf", **kwargs)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_model_factory: Callable[..., Path]) -> Path:
    """A four-layer Qwen3 without a schedule."""
    return tiny_model_factory()


@pytest.fixture(scope="session")
def patched_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's sources with the series applied, as the engine is built from them; read only."""
    from source_tree import prepare

    tree = tmp_path_factory.mktemp("patched") / "tree"
    prepare(tree)
    return tree


@pytest.fixture(scope="session")
def engine() -> None:
    """The patched engine; without it every test that needs it fails, for it is a dependency."""
    from tests.support.engine import MISSING_SYMBOLS

    if MISSING_SYMBOLS:
        pytest.fail(
            f"the installed llama-cpp-python lacks {', '.join(MISSING_SYMBOLS)}; run `pip install ./patches`",
            pytrace=False,
        )


@pytest.fixture(scope="session")
def load_model(engine: None, tiny_model_factory: Callable[..., Path]) -> Iterator[Callable[..., EngineModel]]:
    """`load_model(schedule=None, **write_tiny_gguf's keywords) -> EngineModel`, loaded once per argument list.

    The schedule is set through the C interface, so tests must not change the model's schedule.
    """
    from tests.support.engine import EngineModel

    models: dict[str, EngineModel] = {}
    with ExitStack() as stack:

        def load(schedule: Any = None, **kwargs: Any) -> EngineModel:
            key = repr((schedule, sorted(kwargs.items())))
            if key not in models:
                models[key] = stack.enter_context(EngineModel(tiny_model_factory(**kwargs), schedule))
            return models[key]

        yield load


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct, 98 MB, from pytest's cache or by scripts/fetch_model.py; read only.

    Skips where it cannot be had; under SWAA_REQUIRE_MODEL that is a failure.
    """
    from fetch_model import SMOLLM2

    path = Path(request.config.cache.mkdir("models")) / SMOLLM2.name
    script = Path(__file__).resolve().parents[1] / "scripts" / "fetch_model.py"
    done = subprocess.run([sys.executable, str(script), "-o", str(path), "--force"], capture_output=True, text=True)
    if done.returncode == 0:
        return path
    why = done.stderr.strip().splitlines()[-1]
    if os.environ.get("SWAA_REQUIRE_MODEL"):
        pytest.fail(f"SWAA_REQUIRE_MODEL is set, and yet: {why}", pytrace=False)
    pytest.skip(why)


@pytest.fixture
def new_context(load_model: Callable[..., EngineModel]) -> Iterator[Callable[..., EngineContext]]:
    """`new_context(schedule, **EngineContext's keywords) -> EngineContext`, closed when the test ends.

    Exact by default: no flash attention, an F32 cache. The model has as many layers as the schedule; without one, two.
    """
    with ExitStack() as stack:

        def make(schedule: Sched | None, **kwargs: Any) -> EngineContext:
            model = load_model(schedule, n_layer=len(schedule.layer_modes) if schedule else 2)
            defaults = {"n_ctx": 2048, "n_batch": 256, "n_ubatch": 32, "flash": "off", "kv": "F32"}
            return stack.enter_context(model.context(**{**defaults, **kwargs}))

        yield make


def _fail_if_torch_is_required(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Under SWAA_REQUIRE_TORCH, a test that skips for the lack of PyTorch or transformers fails."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if os.environ.get("SWAA_REQUIRE_TORCH") and report.skipped and re.search(r"torch|transformers", reason, re.I):
        report.outcome = "failed"
        report.longrepr = f"SWAA_REQUIRE_TORCH is set, and yet: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_torch_is_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_torch_is_required(report)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The worst figures of the parity test, per cache."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    figures = [value for report in reports for name, value in report.user_properties if name == "parity"]
    for cache in dict.fromkeys(cache for _, cache, *_ in figures):
        worst, _, kind, name, split = max(figure for figure in figures if figure[1] == cache)
        where = f"{kind}; {name}; n_batch/n_ubatch {split}"
        terminalreporter.write_line(f"parity: worst {100 * worst:.3f} % of sigma with {cache} ({where})")
