"""Models on workers: the same logits as the numpy oracle, no cache over the wire, and failures that are errors.

A worker is `swaa-local worker` on the loopback; what goes over the wire is counted by a proxy before it.
"""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from swaa_local import Llama, SWAAConfig
from swaa_local.engine import devices, placement
from swaa_local.engine.workers import PROTOCOL, WorkerAddress, WorkerError, ask_version, check_workers
from swaa_local.errors import DecodeError, ModelLoadError, OutOfRange, StateError
from tests.support.adapters import write_adapter
from tests.support.engine import assert_close, worst_ratio
from tests.support.flash_op import GT, Case, result_bytes
from tests.support.masks import Sched
from tests.support.reference_numpy import forward
from tests.support.tiny import ALWAYS, ARCHES, FULL, PREFILL, TinyShape, random_tokens, tiny_weights
from tests.support.workers import HELLO, Answering, ConvertingDevice, Proxy, Worker, hello, worker, workers

CONFIGS = {
    "full": (SWAAConfig(), Sched(1, 0, (FULL,) * 4)),
    "rings": (SWAAConfig(24, 4), Sched(24, 4, (ALWAYS,) * 4)),
    "FA decode": (SWAAConfig(24, 4, force_fa_decode=True), Sched(24, 4, (PREFILL,) * 4)),
    "all modes": (
        SWAAConfig(24, 4, force_fa_decode=[1, 2], non_sliding_layers=[2]),
        Sched(24, 4, (ALWAYS, PREFILL, FULL, ALWAYS)),
    ),
}
CACHES = {"f32": (False, 0, 1e-3), "f16": (True, 1, 1e-2), "q8_0": (True, 8, 0.1)}
"""Flash attention, the cache's ggml type, and what a logit may be off, in standard deviations of the logits."""

PROMPT, N_TOKENS = 200, 215
TOKENS = random_tokens(N_TOKENS)


@pytest.fixture(scope="module")
def two() -> Iterator[list[Worker]]:
    with workers(2) as started:
        yield started


@pytest.fixture
def load(tiny_model_factory: Callable[..., Path]) -> Iterator[Callable[..., Llama]]:
    opened: list[Llama] = []

    def make(path: Path | None = None, **kwargs: Any) -> Llama:
        defaults = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
        opened.append(Llama(str(path or tiny_model_factory()), **{**defaults, **kwargs}))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def logits(llm: Llama) -> np.ndarray:
    llm.eval(TOKENS[:PROMPT])
    for token in TOKENS[PROMPT:]:
        llm.eval([token], decode=True)
    return llm.scores[:N_TOKENS].copy()


# Parity


# A window, all of a prompt, the window again, other types, and cells that are no multiple of 256.
ASKED = ((512, GT.Q8_0), (4096, GT.Q8_0), (512, GT.Q8_0), (4096, GT.F16), (8192, GT.Q4_0), (300, GT.Q8_0))


def test_a_result_has_the_room_that_its_sources_ask_for():
    """Layers and caches that differ in nothing but the sources of their attention, one after another in one process."""
    result = Case().n_head * Case().head_v * 4
    with ConvertingDevice(PROTOCOL) as lent:
        device, *_ = placement.with_workers(WorkerAddress.parse_list(lent.address))
        for n_kv, kind in ASKED:
            case = Case(n_kv=n_kv, type_k=kind, type_v=kind)
            copies = 0 if kind == GT.F16 else 2 * n_kv * case.n_head_kv * (case.head_k + case.head_v)
            assert result_bytes(case, device) == result + copies, (n_kv, kind)
        assert lent.n_asked == len(set(ASKED))  # once each: to ask is to wait for all that is being computed


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("config", "tail"), [*((config, 0) for config in CONFIGS), ("FA decode", 40), ("all modes", 40)]
)
def test_parity_over_two_workers(load, two, tiny_model_factory, config, cache, tail):
    """Of every mode and cache, against numpy; architectures take turns. Far from the logits of any other schedule."""
    asked, schedule = CONFIGS[config]
    flash, kind, tolerance = CACHES[cache]
    turn = list(CONFIGS).index(config) + list(CACHES).index(cache) + tail
    arch = ARCHES[turn % len(ARCHES)]
    llm = load(
        tiny_model_factory(arch=arch),
        swaa=SWAAConfig(**{**vars(asked), "prompt_tail": tail}),
        rpc_servers=[one.address for one in two],
        tensor_split=[1, 1],
        flash_attn=flash,
        type_k=kind,
        type_v=kind,
        logits_all=True,
    )
    got, shape = logits(llm), TinyShape(arch)
    want = forward(TOKENS, schedule, PROMPT - tail, shape=shape)
    assert_close(got, want, tolerance, config)
    if config != "full":
        assert worst_ratio(got, forward(TOKENS, CONFIGS["full"][1], PROMPT, shape=shape)) > 2 * tolerance


def test_layers_are_where_the_shares_say(load, two):
    """The output counts as a fifth layer. All layers, some of them, and on one device alone."""
    first, second = (one.address for one in two)
    known: dict[str, Any] = {"rpc_servers": [first, second]}
    assert load(tensor_split=[3, 2], **known).layers_in_words == f"layers 0-2 on {first}, 3 on {second}"
    assert load(tensor_split=[0, 1], **known).layers_in_words == f"layers 0-3 on {second}"
    assert load(n_gpu_layers=3, tensor_split=[1, 2], **known).layers_in_words == (
        f"layers 0-1 on this CPU, 2 on {first}, 3 on {second}"
    )
    assert load(split_mode=0, main_gpu=1, **known).layers_in_words == f"layers 0-3 on {second}"
    assert load().layers_in_words == "layers 0-3 on this CPU"


def test_models_on_the_same_workers_do_not_disturb_each_other(load, two):
    addresses = [one.address for one in two]
    exact: dict[str, Any] = {"flash_attn": False, "type_k": 0, "type_v": 0, "logits_all": True}
    config, schedule = CONFIGS["all modes"]
    first = load(swaa=config, rpc_servers=addresses, **exact)
    second = load(swaa=False, rpc_servers=addresses[::-1], **exact)
    for llm, wanted in ((first, schedule), (second, CONFIGS["full"][1])):
        assert_close(logits(llm), forward(TOKENS, wanted, PROMPT), 1e-3)


def test_split_modes_give_the_same(load, two):
    addresses = [one.address for one in two]
    config, schedule = CONFIGS["all modes"]
    exact: dict[str, Any] = {"flash_attn": False, "type_k": 0, "type_v": 0, "logits_all": True, "swaa": config}
    for split in ({"split_mode": 0, "main_gpu": 1}, {"n_gpu_layers": 2}, {"tensor_split": [9, 1]}):
        assert_close(logits(load(rpc_servers=addresses, **exact, **split)), forward(TOKENS, schedule, PROMPT), 1e-3)
    with pytest.raises(WorkerError, match=r"-sm row .* divides matrices between GPUs of one machine"):
        load(rpc_servers=addresses, split_mode=2)
    with pytest.raises(ModelLoadError, match=r"main_gpu: 2 \(available devices: 2\)"):
        load(rpc_servers=addresses, split_mode=0, main_gpu=2)


def test_drafts_another_schedule_and_an_adapter(load, two, tmp_path):
    """What else a context may hold: each with the texts and logits that this machine alone gives."""
    adapter = write_adapter(tmp_path / "adapter.gguf", tiny_weights(TinyShape()))
    shared: dict[str, Any] = {"swaa": CONFIGS["FA decode"][0], "flash_attn": False, "type_k": 0, "type_v": 0}
    texts = []
    for where in ({}, {"rpc_servers": [one.address for one in two], "tensor_split": [1, 1]}):
        llm = load(lora_path=str(adapter), **shared, **where)
        asked: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
        plain, drafted = (llm.create_completion("abcabcabcabc", **asked, speculate=how) for how in (False, True))
        llm.set_schedule(CONFIGS["rings"][0])
        ringed = llm.create_completion("abcabcabcabc", **asked)
        texts.append([found["choices"][0]["text"] for found in (plain, drafted, ringed)])
        llm.close()
    bare = load(**shared).create_completion("abcabcabcabc", max_tokens=24, temperature=0)["choices"][0]["text"]
    assert texts[0] == texts[1]
    assert texts[1][0] == texts[1][1] != bare


# The wire


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("windows", SWAAConfig(64, 4, force_fa_decode=True)),
        ("rings", SWAAConfig(64, 4)),
        ("one full layer", SWAAConfig(64, 4, force_fa_decode=True, non_sliding_layers=[2])),
    ],
)
def test_prefill_does_not_send_the_cache_over_the_wire(load, two, tiny_model_factory, name, config, cache):
    """Bytes of an ubatch stay what they are at any depth, and below the cache's of the tokens before it.

    A full layer adds one row of its mask, which all tokens share: 2 bytes for each token before.
    """
    flash, kind, _ = CACHES[cache]
    n_ubatch, n_ctx = 64, 8192
    with Proxy(two[0].address) as proxy:
        path = tiny_model_factory(n_ctx_train=n_ctx)
        sizes = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch}
        types = {"flash_attn": flash, "type_k": kind, "type_v": kind}
        llm = load(path, swaa=config, rpc_servers=[proxy.address], **sizes, **types)
        wire, tokens = [], random_tokens(n_ctx - 2 * n_ubatch)
        for start in range(0, len(tokens), n_ubatch):
            # the logits of its last token come when all is computed, and so all is counted
            llm.eval(tokens[start : start + n_ubatch], ends_prompt=False)
            wire.append(proxy.sent + proxy.received)
    ubatches = np.diff(wire)
    row = 2 * n_ctx if name == "one full layer" else 0
    # a graph is sent anew where it changes; in both parts there is at least one
    early, late = ubatches[4:20].max(), ubatches[-16:].max()
    assert late <= early + row, (early, late)
    if name != "rings":
        assert late < llm.kv_bytes / 16, (late, llm.kv_bytes)


# Failures


def test_what_is_no_address_is_refused(load):
    for wrong in ("nowhere:port", "host:0", "host:65536", "::1", "a:1,,b:2"):
        with pytest.raises(WorkerError, match="no worker's address"):
            load(rpc_servers=[wrong])
    with pytest.raises(WorkerError, match="given twice"):
        load(rpc_servers=["a:1", "a:1"])


def test_a_worker_that_is_not_there(load):
    with pytest.raises(WorkerError, match=r"no worker listens at 127\.0\.0\.1:9; start one there: swaa-local worker"):
        load(rpc_servers=["127.0.0.1:9"])
    with pytest.raises(WorkerError, match=r"no machine is called 'no\.such\.name\.invalid'"):
        load(rpc_servers=["no.such.name.invalid:50052"])


@pytest.mark.parametrize("version", [(6, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1)])
def test_a_worker_of_another_version(load, version):
    with Answering(hello(version)) as other:
        said = f"{other.address} speaks version {'.'.join(map(str, version))} of the protocol, and this machine 7.0.0"
        with pytest.raises(WorkerError, match=said):
            load(rpc_servers=[other.address])


def test_what_is_no_worker(load):
    with Answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as other:
        with pytest.raises(WorkerError, match=f"what listens at {other.address} is no worker"):
            load(rpc_servers=[other.address])


def test_a_worker_that_serves_another_program_is_not_waited_for(two, tiny_model_factory, load, monkeypatch):
    """It serves one at a time. A connection that says nothing does not count as one for long."""
    address = WorkerAddress.parse(two[0].address)
    with socket.create_connection((address.host, address.port)) as other:
        assert ask_version(address) == PROTOCOL
        assert other.recv(1) == b""
    with socket.create_connection((address.host, address.port)) as other:
        other.sendall(HELLO)
        assert other.recv(1)
        monkeypatch.setattr(placement, "check_workers", functools.partial(check_workers, timeout_s=1.0))
        with pytest.raises(WorkerError, match=r"does not answer within 1 s.*one at a time"):
            load(rpc_servers=[two[0].address])
    load(rpc_servers=[two[0].address])


def test_a_build_without_workers(load, monkeypatch):
    monkeypatch.setattr(devices, "_reg_by_name", lambda name: None)
    with pytest.raises(WorkerError, match=r"has no RPC backend; .* without GGML_RPC=OFF"):
        load(rpc_servers=["127.0.0.1:9"])


def test_more_shares_than_devices(load, two):
    with pytest.raises(OutOfRange, match="tensor_split has 3 shares, for 1 devices"):
        load(rpc_servers=[two[0].address], tensor_split=[1, 1, 1])


@pytest.mark.parametrize("when", ["in the prompt", "at its last part", "in the answer"])
def test_a_worker_that_dies(load, two, when):
    """The call in which it dies fails, and no call after it succeeds; another model loads as soon as it is closed."""
    with worker() as mortal:
        llm = load(rpc_servers=[two[0].address, mortal.address], tensor_split=[1, 1])
        if when == "in the answer":
            llm.eval(TOKENS[:64])
            mortal.kill()
            with pytest.raises(DecodeError, match=f"the worker {mortal.address} is lost: .* start it again"):
                llm.eval([TOKENS[64]], decode=True)
        else:
            at = 32 if when == "in the prompt" else PROMPT - PROMPT % 32
            llm.on_prefill = lambda done, total: mortal.kill() if done == at else None
            with pytest.raises(DecodeError, match=f"the worker {mortal.address} is lost: .* start it again"):
                llm.eval(TOKENS[:PROMPT])
        with pytest.raises(DecodeError, match=mortal.address):
            llm.eval(TOKENS[:10])
        with pytest.raises(DecodeError, match=mortal.address):
            list(llm.create_completion("a", max_tokens=3, stream=True))
    llm.close()
    config, schedule = CONFIGS["FA decode"]
    exact: dict[str, Any] = {"flash_attn": False, "type_k": 0, "type_v": 0, "logits_all": True}
    again = load(rpc_servers=[two[0].address], swaa=config, **exact)
    assert_close(logits(again), forward(TOKENS, schedule, PROMPT), 1e-3)


def test_a_state_is_not_saved_of_a_worker_that_is_gone(load, two):
    with Proxy(two[0].address) as proxy:
        llm = load(rpc_servers=[proxy.address])
        llm.eval(TOKENS[:64])
        llm.synchronize()
        proxy.cut()
        with pytest.raises(StateError, match=f"the worker {proxy.address} is lost"):
            llm.save_state()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_worker_that_dies_while_a_model_is_loaded(load, two, tiny_model, share):
    """At any point of it: an error with its address, or, at the very end, one of the first prompt."""
    with Proxy(two[0].address) as counted:
        load(rpc_servers=[counted.address]).close()
        total = counted.sent
    cut = threading.Event()

    def end(sent: int) -> None:
        if sent > 200 + share * total and not cut.is_set():
            cut.set()
            proxy.cut()

    with Proxy(two[0].address, end) as proxy:
        with pytest.raises((ModelLoadError, DecodeError, WorkerError), match=proxy.address):
            load(rpc_servers=[proxy.address]).eval(TOKENS[:64])
    assert cut.is_set()
    load(rpc_servers=[two[0].address]).eval(TOKENS[:64])


def test_a_worker_without_memory(load, two, tiny_model_factory):
    """Its address space is bounded: the cache of a long context does not fit."""
    path = tiny_model_factory(n_ctx_train=1 << 22)
    with worker() as small:
        [server] = psutil.Process(small.process.pid).children(recursive=True)
        used = server.memory_info().vms
        server.rlimit(psutil.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))
        with pytest.raises(ModelLoadError, match=f"{small.address} has no [0-9.]+ MiB of free memory"):
            load(path, rpc_servers=[small.address], n_ctx=1 << 20, n_batch=64, n_ubatch=32)
        load(path, rpc_servers=[small.address]).eval(TOKENS[:64])
