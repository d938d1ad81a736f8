"""`swaa-local worker`: llama.cpp's RPC server, from the patched build, started, watched and ended.

Knows the server's options and what it prints; nothing of models, which are the other side's.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from swaa_local.engine import devices
from swaa_local.engine import log as engine_log
from swaa_local.engine.native import engine_program
from swaa_local.engine.native import llama_cpp as _engine
from swaa_local.engine.workers import DEFAULT_PORT, WorkerAddress, WorkerError, ask_version
from swaa_local.files.server_process import ServerProcess, claim_port
from swaa_local.report.progress import SILENT, Reporter

_LESS_MEMORY = "give this worker fewer layers with --tensor-split there, or take a smaller context or model"
# What the server prints of itself, and of every connection, ours among them.
_NOISE = re.compile(r"Accepted client|Client connection closed|Starting RPC|Devices:|  |\[set_tensor\] saved")
_PROBE_S = 2.0
_EVERY_ADDRESS = "0.0.0.0"
_ELSEWHERE = ("192.0.2.1", 9)  # of the addresses that are for documentation


@dataclass(frozen=True)
class WorkerOptions:
    """The command's options. cache: folder in which weights are kept between runs; devices: none named: the GPUs, or
    else the CPU."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    cache: Path | None = None
    devices: tuple[str, ...] = ()
    n_threads: int | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Ready:
    """A worker that answers. address: for the other side. devices: name, description and free bytes of each."""

    address: WorkerAddress
    devices: tuple[tuple[str, str, int | None], ...]
    is_open: bool
    """Whether other machines may reach it."""


def work(options: WorkerOptions, *, on_ready: Callable[[Ready], None], reporter: Reporter = SILENT) -> int:
    """Run a worker until SIGINT or SIGTERM ends it; then 0, else the server's exit code. Raises `SWAAError`."""
    program = engine_program("ggml-rpc-server", "GGML_RPC")
    lent = _choose_devices(options)
    address = _resolve(options)
    command = [str(program), "--host", address.host, "--port", str(address.port)]
    command += ["--device", ",".join(devices.name_of(device) for device in lent)]
    if options.n_threads is not None:
        command += ["--threads", str(options.n_threads)]
    env = dict(os.environ)
    if options.cache is not None:
        _make_private(options.cache)
        command.append("--cache")
        env["LLAMA_CACHE"] = str(options.cache.absolute())
    server = ServerProcess(
        command,
        env,
        echo=options.verbose,
        what="the worker",
        less_memory=_LESS_MEMORY,
        is_noise=lambda line: _NOISE.match(line) is not None,
    )
    with server:
        with reporter.step("starting"):
            is_ready = server.wait_ready(lambda: _answers(address))
        if is_ready:
            shown = tuple(
                (devices.name_of(device), devices.description_of(device), devices.free_bytes([device]))
                for device in lent
            )
            on_ready(Ready(_for_others(address), shown, not ipaddress.ip_address(address.host).is_loopback))
        code = server.wait() if is_ready else 0
        return 0 if server.was_asked_to_end else code


def _choose_devices(options: WorkerOptions) -> list[int]:
    """Raises `WorkerError` for a device that this machine does not have."""
    with engine_log.captured(options.verbose):
        _engine.llama_cpp.llama_backend_init()
        _engine.llama_cpp.llama_supports_gpu_offload()  # loads the backends of a build that has them as modules
        there = {devices.name_of(device): device for device in devices.this_machines()}
    for name in options.devices:
        if name not in there:
            raise WorkerError(f"this machine has no device {name!r}; it has {', '.join(there)}")
    if options.devices:
        return [there[name] for name in dict.fromkeys(options.devices)]
    return devices.gpus() or [there["CPU"]]


def _resolve(options: WorkerOptions) -> WorkerAddress:
    """The IPv4 address to listen on, and a port that is free. Raises `WorkerError` and `ServerError`."""
    try:
        host = socket.getaddrinfo(options.host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        raise WorkerError(
            f"{options.host!r} is no IPv4 address of this machine, nor a name of one; {_EVERY_ADDRESS} is all of them"
        ) from None
    return WorkerAddress(str(host), claim_port(str(host), options.port))


def _for_others(address: WorkerAddress) -> WorkerAddress:
    """How another machine reaches it: of all addresses, the one that connections to elsewhere have."""
    if address.host != _EVERY_ADDRESS:
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)  # sends nothing
        except OSError:  # there is no network
            return replace(address, host="127.0.0.1")
        return replace(address, host=probe.getsockname()[0])


def _make_private(folder: Path) -> None:
    """Weights are nobody else's business, and whoever may write here chooses what is computed."""
    (folder / "rpc").mkdir(mode=0o700, parents=True, exist_ok=True)


def _answers(address: WorkerAddress) -> bool:
    try:
        ask_version(
            replace(address, host="127.0.0.1") if address.host == _EVERY_ADDRESS else address, timeout_s=_PROBE_S
        )
    except WorkerError:
        return False
    return True
