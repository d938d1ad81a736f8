"""Numbers that the engine cannot take, and contexts that the memory cannot hold: refused in words, before memory is
touched. Whatever might work is let through."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import psutil
import pytest

from swaa_local import Llama, SWAAConfig, SWAAError
from swaa_local.engine import context_length, memory
from swaa_local.engine.limits import MAX_THREADS
from swaa_local.errors import ClosedError, ContextTooLarge, DecodeError, GrammarError, ModelLoadError, OutOfRange
from swaa_local.llama import TrainedLengthWarning
from swaa_local.model_file.model_info import read_model_info
from swaa_local.schedule.config import MAX_TOKENS, Schedule
from tests.support.program import environment, fails, run
from tests.support.tiny import ALWAYS, random_tokens

pytestmark = pytest.mark.usefixtures("engine")

KWARGS: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}
RING = SWAAConfig(sliding_window_size=24, keep_first=4)
TOKENS = random_tokens(60)


@pytest.fixture
def load(tiny_model: Path) -> Iterator[Callable[..., Llama]]:
    opened: list[Llama] = []

    def make(path: Path = tiny_model, **kwargs: Any) -> Llama:
        opened.append(Llama(str(path), **{"n_ctx": 512, **KWARGS, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


# Numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_ctx", value) for value in (-1, MAX_TOKENS + 1, 1 << 31, 1 << 32, (1 << 32) + 256)),
        *(("n_batch", value) for value in (-1, 0, MAX_TOKENS + 1, (1 << 32) + 5)),
        *(("n_ubatch", value) for value in (-1, (1 << 32) + 7)),
        *((name, value) for name in ("n_threads", "n_threads_batch") for value in (-2, MAX_THREADS + 1, 1 << 33)),
        *(("n_gpu_layers", value) for value in (1 << 31, -(1 << 40))),
        *(("seed", value) for value in (-2, 1 << 40)),
        *((name, 1 << 40) for name in ("main_gpu", "last_n_tokens_size", "yarn_orig_ctx")),
        *((name, 77) for name in ("split_mode", "pooling_type", "attention_type", "rope_scaling_type")),
    ],
)
def test_a_number_that_would_wrap_around_is_named(tiny_model: Path, name: str, value: int) -> None:
    with pytest.raises(OutOfRange, match=rf"^{name} is {value}; it must be between -?\d+ and \d+$") as caught:
        Llama(str(tiny_model), **{"n_ctx": 256, **KWARGS, name: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", ["4096", 4096.5, True])
def test_what_is_no_whole_number_is_named(tiny_model: Path, value: Any) -> None:
    with pytest.raises(OutOfRange, match=f"^n_ctx must be a whole number, not {value!r}$"):
        Llama(str(tiny_model), n_ctx=value)


@pytest.mark.parametrize("extreme", ["least", "most"])
def test_the_bounds_themselves_are_taken(load: Callable[..., Llama], extreme: str) -> None:
    numbers = {
        "least": {"n_threads": -1, "n_gpu_layers": -((1 << 31) - 1), "seed": -1, "n_ubatch": 0, "n_batch": 1},
        "most": {"n_gpu_layers": (1 << 31) - 1, "seed": 1 << 32, "n_ubatch": MAX_TOKENS, "n_batch": MAX_TOKENS},
    }
    llm = load(**numbers[extreme])
    assert llm(TOKENS, max_tokens=2)["usage"]["completion_tokens"] > 0


def test_numbers_of_calls(load: Callable[..., Llama], capfd: pytest.CaptureFixture[str]) -> None:
    llm = load()
    vocabulary = llm.n_vocab()
    for token in (-1, vocabulary, 1 << 40, (1 << 32) + 300):
        with pytest.raises(DecodeError, match=f"^invalid token {token}; the vocabulary has {vocabulary}$"):
            llm.eval([300, token])
        with pytest.raises(OutOfRange, match=f"^invalid token {token}; the vocabulary has {vocabulary}$"):
            llm.detokenize([300, token])
    assert llm.n_tokens == 0
    with pytest.raises(OutOfRange, match="seed is 1099511627776"):
        llm(TOKENS, max_tokens=1, seed=1 << 40)
    with pytest.raises(DecodeError, match="has no logits"):
        llm.sample()
    llm.eval(TOKENS)
    for position in (0, len(TOKENS) - 2, len(TOKENS), -1):
        with pytest.raises(DecodeError, match=f"^position {position} has no logits: of the 60 tokens in the context, "):
            llm.sample(idx=position)
    assert llm.sample(temp=0.0, idx=len(TOKENS) - 1) == llm.sample(temp=0.0)
    capfd.readouterr()
    with pytest.raises(GrammarError, match="cannot read the grammar"):
        llm(TOKENS, max_tokens=3, grammar=llama_cpp.LlamaGrammar.from_string("root ::= missing"))
    assert "missing" in capfd.readouterr().err
    with pytest.raises(IndexError):
        llm(TOKENS, max_tokens=1, logit_bias={vocabulary: 1.0})


# Memory


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """The host could have no more than this, in bytes."""
    most = 400 << 20
    monkeypatch.setattr(memory, "most_host_bytes", lambda: most)
    return most


def test_a_context_that_the_memory_cannot_hold_is_refused_before_it_is_made(
    load: Callable[..., Llama], tiny_model: Path, little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_args: object) -> None:
        raise AssertionError("a context was made")

    with monkeypatch.context() as patched:
        patched.setattr(llama_cpp.llama_cpp, "llama_init_from_model", made)
        with pytest.raises(
            ContextTooLarge, match=r"^a context of 1048576 tokens needs a KV cache of 1.1 GiB, and"
        ) as e:
            load(n_ctx=1 << 20)
    error = e.value
    assert (error.n_ctx, error.free_bytes) == (1 << 20, little)
    assert f"at most 400.0 MiB of memory can be had; ask for at most {error.n_ctx_fits} tokens" in str(error)
    assert isinstance(error, ModelLoadError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainedLengthWarning)
        assert load(n_ctx=error.n_ctx_fits).kv_bytes < little


def test_what_takes_no_memory_may_be_as_long_as_positions_go(load: Callable[..., Llama], little: int) -> None:
    with pytest.warns(TrainedLengthWarning):
        llm = load(n_ctx=MAX_TOKENS, swaa=RING)
    assert llm.n_ctx() == MAX_TOKENS
    llm.eval(TOKENS)
    with pytest.raises(ContextTooLarge):  # the same context, of which every layer would hold everything
        llm.set_schedule(False)
    with pytest.raises(ClosedError):
        llm.n_ctx()


def test_a_cache_that_is_not_a_plain_one_is_let_through(
    load: Callable[..., Llama], little: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take much less than it seems to, as that of recurrent layers does."""
    own = "architecture 'x' has recurrent layers"
    monkeypatch.setattr(context_length, "read_model_info", lambda path: replace(read_model_info(path), unsupported=own))
    monkeypatch.setattr(memory, "most_host_bytes", lambda: 1 << 20)
    assert load(n_ctx=4096).n_ctx() == 4096


@pytest.mark.skipif(not psutil.LINUX, reason="the figures are faked as Linux tells them")
@pytest.mark.parametrize(
    ("meminfo", "arc", "group", "most"),
    [
        ({"MemTotal": 1000, "MemAvailable": 600, "SwapFree": 0}, None, None, 600 + 50),
        ({"MemTotal": 1000, "MemAvailable": 600, "SwapFree": 300}, None, None, 600 + 300 + 50),
        ({"MemTotal": 1000, "MemAvailable": 600, "SwapFree": 0}, 200, None, 600 + 200 + 50),
        ({"MemTotal": 1000, "MemAvailable": 600, "SwapFree": 300}, None, 100, 100 + 300 + 50),
        ({"MemTotal": 1000, "MemAvailable": 600, "SwapFree": 0}, None, 900, 600 + 50),
    ],
    ids=["free", "and swap", "and ZFS's cache", "a container's limit", "a container with a larger limit"],
)
def test_what_can_be_had_is_what_is_free_and_can_be_freed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    meminfo: dict[str, int],
    arc: int | None,
    group: int | None,
    most: int,
) -> None:
    figures = {"MemFree": 100, "SwapTotal": 500, **meminfo}
    (tmp_path / "meminfo").write_text("".join(f"{key}: {n} kB\n" for key, n in figures.items()))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    files = {}
    if arc is not None:
        files["/proc/spl/kstat/zfs/arcstats"] = f"name type data\nc_max 4 9999999\nsize 4 {arc * 1024}\n"
    if group is not None:
        files["/sys/fs/cgroup/memory.max"] = f"{(group + 40) * 1024}\n"
        files["/sys/fs/cgroup/memory.current"] = f"{70 * 1024}\n"
        files["/sys/fs/cgroup/memory.stat"] = f"anon 1\nfile {30 * 1024}\n"

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(memory.Path, "read_text", read_text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # psutil says which other figures it did not find
        assert memory.most_host_bytes() == most * 1024
        assert memory.free_host_bytes() == min(600, group or 600) * 1024
        assert memory.free_host_bytes(mapped=50 * 1024) == (min(600, group or 600) - 50) * 1024
        assert memory.free_host_bytes(mapped=1 << 30) == 0


@pytest.mark.skipif(not psutil.LINUX, reason="the figures are faked as Linux tells them")
@pytest.mark.filterwarnings("error")
def test_a_system_that_tells_nothing_limits_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    monkeypatch.setattr(memory, "_cgroup", lambda: None)
    assert (memory.free_host_bytes(), memory.most_host_bytes()) == (None, None)


@pytest.mark.skipif(not psutil.LINUX, reason="the figures are faked as Linux tells them")
def test_a_container_that_hides_figures_of_its_memory_warns_of_none(tmp_path: Path) -> None:
    """psutil warns of figures of swapping, which nobody asked for."""
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 600 kB\nSwapFree: 0 kB\n")
    code = (
        "import psutil, sys\n"
        "from swaa_local.engine import memory\n"
        "psutil.PROCFS_PATH = sys.argv[1]\n"
        "print(memory.free_host_bytes() // 1024, memory.most_host_bytes() // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("600 650\n", "")


@pytest.mark.parametrize("flash_attn", [None, False])
@pytest.mark.parametrize("swaa", [False, SWAAConfig(256, 4, True), SWAAConfig(256, 4, True, [1, 3]), RING], ids=str)
def test_the_estimate_of_a_context_is_no_less_than_what_llama_cpp_reserves(
    load: Callable[..., Llama], capfd: pytest.CaptureFixture[str], swaa: Any, flash_attn: bool | None
) -> None:
    import re

    n_ctx = 65536
    with pytest.warns(TrainedLengthWarning):
        llm = load(swaa=swaa, flash_attn=flash_attn, n_ctx=n_ctx, verbose=True)
    sizes = re.findall(r"(?:compute|KV) buffer size = +([\d.]+) MiB", capfd.readouterr().err)
    assert len(sizes) >= 2
    reserved = sum(float(size) for size in sizes) * (1 << 20)
    cost = memory.context_cost(
        llm.model,
        llm.schedule,
        llm.context_params,
        n_ubatch=llm.context_params.n_ubatch,
        n_gpu_layers=0,
        logits_all=False,
    )
    assert reserved <= cost.host(n_ctx) + memory._OVERHEAD


def test_a_context_of_ten_million_tokens_fits_only_where_its_compute_buffer_does(
    load: Callable[..., Llama], tiny_model_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 GiB of cache, and a mask of 512 rows that is larger."""
    monkeypatch.setattr(memory, "free_host_bytes", lambda **_: 16 << 30)
    made: list[int] = []

    def shorter(_model: object, params: Any) -> None:
        made.append(params.n_ctx)

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_init_from_model", shorter)
    with pytest.warns(UserWarning, match="10000000 tokens does not fit the free memory; using"):
        with pytest.raises(ModelLoadError):
            load(tiny_model_factory(n_ctx_train=10_000_000), n_ctx=0)
    assert made[0] * (1024 + 512 * 2) < 16 << 30


def test_a_long_context_needs_no_more_addresses_than_it_has_tokens(tiny_model: Path) -> None:
    """A batch once had room for each of its tokens in every sequence: 4 n_ctx n_batch bytes."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from swaa_local import Llama, SWAAConfig\n"
        "llm = Llama(sys.argv[1], swaa=SWAAConfig(24), n_ctx=1 << 27, n_threads=1, n_threads_batch=1)\n"
        "llm.eval(list(range(300, 340)))\n"
        "print(llm.n_tokens)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tiny_model)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "40\n"), done.stderr


# Beyond what the model was trained on


def test_a_longer_context_than_the_model_was_trained_on_warns_where_it_is_made(load: Callable[..., Llama]) -> None:
    with pytest.warns(TrainedLengthWarning, match="^5000 tokens are more than the 4096 that the model was") as caught:
        load(n_ctx=5000)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(n_ctx=4096)
        load(n_ctx=0)
        load(n_ctx=8192, vocab_only=True)
        load(n_ctx=8192, rope_freq_scale=0.5)  # whoever says so stretches it on purpose
        load(n_ctx=8192, rope_scaling_type=llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN, yarn_orig_ctx=4096)


BEYOND = "{} tokens are more than the 4096 that the model was trained on"


def test_every_command_says_so(tiny_model: Path, tmp_path: Path) -> None:
    chat = run("chat", tiny_model, "-c", 5000, "-p", "hello", "-n", 1, "-t", 1)
    assert (chat.returncode, chat.stderr.count(BEYOND.format(5000))) == (0, 1)
    results = tmp_path / "results.jsonl"
    evaluated = run(
        *("eval", tiny_model, "--length", 5000, "-n", 1, "--variants", "w8", "--max-tokens", 1, "-t", 1),
        *("--results", results),
    )
    assert (evaluated.returncode, evaluated.stderr.count(BEYOND.format(5000))) == (0, 1)
    assert "Warning" not in evaluated.stderr
    measured = run("bench", tiny_model, "-p", 5000, "-n", 0, "-r", 1, "--variants", "w8", "--no-limit", "-t", 1)
    assert (measured.returncode, measured.stderr.count(BEYOND.format(5000))) == (0, 1)


# The command line


@pytest.fixture(scope="module")
def large(tiny_model_factory: Callable[..., Path]) -> Path:
    """A tiny model with so large a cache that no machine holds all positions of it: 9 TB."""
    return tiny_model_factory(n_layer=32)


@pytest.mark.parametrize(
    "command",
    [
        ("chat", "-p", "hello", "-c"),
        ("eval", "-n", "1", "--results", "never.jsonl", "--length"),
        ("serve", "--port", "0", "-c"),
    ],
    ids=lambda command: command[0],
)
def test_a_context_that_no_memory_holds_is_an_error_with_sizes(large: Path, tmp_path: Path, command: Any) -> None:
    name, *options = command
    said = fails(name, large, *options, 1_000_000_000, cwd=tmp_path)
    assert "a context of 1000000000 tokens needs a KV cache of 7.5 TiB, and at most" in said
    assert "ask for at most" in said
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_that_no_memory_holds_is_an_error_with_sizes(large: Path) -> None:
    said = fails("bench", large, "-p", 1_000_000_000, "-n", 1, "-t", 1)
    assert "needs a KV cache of 7.5 TiB" in said


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("chat", "-p", "hello", "-c", 2_000_000_000), 2),
        (("chat", "-p", "hello", "-c", (1 << 32) + 256), 2),
        (("chat", "-p", "hello", "-b", 1 << 32), 2),
        (("chat", "-p", "hello", "-ub", 1 << 32), 2),
        (("chat", "-p", "hello", "-t", 100_000), 2),
        (("chat", "-p", "hello", "-ngl", 1 << 32), 2),
        (("chat", "-p", "hello", "--top-k", 1 << 32), 2),
        (("bench", "-p", 2_000_000_000), 2),
        (("bench", "-d", (1 << 32) + 1), 2),
        (("bench", "-ub", 1 << 32), 2),
        (("bench", "-p", MAX_TOKENS, "-n", 1), 1),
        (("eval", "--length", 2_000_000_000), 2),
        (("eval", "--dataset", "x.jsonl", "-c", 2_000_000_000), 2),
        (("inspect", "-c", 2_000_000_000), 2),
        (("inspect", "-ub", 1 << 32), 2),
        (("serve", "-c", 2_000_000_000), 1),
        (("serve", "-c", -5), 1),
        (("serve", "-t", 100_000), 1),
        (("serve", "-ub", 2_000_000_000), 1),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_number_that_no_engine_takes_is_a_wrong_usage(tiny_model: Path, command: Any, code: int) -> None:
    name, *options = command
    said = fails(name, tiny_model, *options, code=code)
    assert str(max((abs(option) for option in options if isinstance(option, int)), key=int)) in said


def test_serve_makes_no_longer_a_context_than_fits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server looks at how much memory there is, not at how much of it is free."""
    from swaa_local.serve import limits

    notes: list[str] = []

    class Notes:
        def note(self, text: str) -> None:
            notes.append(text)

    def arguments(*extra: str, schedule: Schedule | None = None, n_ctx_train: int = 1 << 20, **facts: Any) -> list[str]:
        from swaa_local.serve.run import value_of

        info = replace(read_model_info(tiny_model), n_ctx_train=n_ctx_train, **facts)
        said = lambda names: value_of(names, extra, {})  # noqa: E731
        return limits.context_arguments(info, schedule, said, Notes())  # type: ignore[arg-type]

    monkeypatch.setattr(limits, "free_host_bytes", lambda **_: 1 << 30)
    option, n_ctx = arguments()
    assert option == "--ctx-size"
    assert memory.MIN_N_CTX < int(n_ctx) < 1 << 19
    assert notes == [
        f"the model's context of 1048576 tokens does not fit the free memory; using {n_ctx} (pass -c to choose)"
    ]
    assert arguments(n_ctx_train=32768) == []
    assert arguments("-c", "1048576") == arguments("-c", "0") == arguments("--fit", "off") == []
    assert arguments(schedule=Schedule(24, 4, (ALWAYS,) * 4)) == []  # type: ignore[arg-type]
    # States of 50 MiB for each of 4 slots, and 32 checkpoints of each where nothing is said: of 650 MiB, for the rest.
    states: dict[str, Any] = {"state_bytes": (25 << 20, 0, 25 << 20, 0)}
    assert int(arguments(**states)[1]) == memory.MIN_N_CTX
    none = ("--ctx-checkpoints", "0")
    of_slots = [int(arguments("-np", n, *none, "-kvu", **states)[1]) for n in ("-1", "4", "2", "1")]
    assert memory.MIN_N_CTX < of_slots[0] == of_slots[1] < of_slots[2] < of_slots[3] < int(n_ctx)
    apart = int(arguments("-np", "4", *none, **states)[1])  # a mask is as wide as one slot's cells
    assert of_slots[0] < apart
    with_four = int(arguments("-np", "1", "--ctx-checkpoints", "4", **states)[1])
    assert memory.MIN_N_CTX < with_four < of_slots[3]


def test_errors_can_be_told_apart_and_pickled() -> None:
    import pickle

    error = ContextTooLarge(1000, 2 << 30, 1 << 30, 256)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.n_ctx_fits) == (str(error), 256)
    assert isinstance(error, SWAAError)
    assert "free some memory" in str(ContextTooLarge(1000, 2 << 30, 1 << 20, 0))
