"""The command that lends this machine: options, the address to give to the other side, the warning of open ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.click_types import PATH, Number
from swaa_local.engine.limits import MAX_THREADS
from swaa_local.engine.workers import DEFAULT_PORT
from swaa_local.text.units import format_bytes


@click.command("worker", short_help="Lend this machine to another one's models.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0 takes a free one."
)
@click.option("--cache", type=PATH, metavar="DIR", help="Keep weights here, so that they are sent once.")
@click.option(
    "-d", "--device", "device", metavar="NAME,...", help="Devices to lend, such as CPU or CUDA0 [the GPUs, or the CPU]."
)
@click.option("-t", "--threads", "n_threads", type=Number("threads", 1, MAX_THREADS), help="Threads [half the CPUs].")
@click.option("-v", "--verbose", is_flag=True, help="Show the server's log.")
def worker_command(device: str | None, cache: Path | None, **options: Any) -> int:
    """Lend this machine's memory and compute to a model on another one.

    It prints its address. On the other machine, chat, serve, bench, eval and calibrate take it with --rpc, and put as
    many of the model's layers here as fit. The model's file is needed there alone. Both need the same version.

    The protocol (llama.cpp's RPC) has no authentication and no encryption: whoever reaches the port can use this
    machine, and read along. Stay with 127.0.0.1 and a tunnel, or use a network of your own. Ctrl-C ends it.

    \b
    swaa-local worker                                  then, on the other machine:
    ssh -N -L 50052:127.0.0.1:50052 this-machine &
    swaa-local chat model.gguf --rpc 127.0.0.1:50052
    """
    from swaa_local.report.terminal import TerminalReporter
    from swaa_local.worker.run import Ready, WorkerOptions, work

    reporter = TerminalReporter()
    names = tuple(name.strip() for name in device.split(",") if name.strip()) if device else ()

    def announce(ready: Ready) -> None:
        for name, description, free in ready.devices:
            size = "" if free is None else f" · {format_bytes(free)} free"
            reporter.note(f"{name} · {description}{size}")
        if ready.is_open:
            reporter.note(
                f"whoever reaches {ready.address} can use this machine and read what is computed: the protocol has no "
                "authentication and no encryption. Stay within a private network, or listen on 127.0.0.1 and reach it "
                f"through a tunnel: ssh -N -L {ready.address.port}:127.0.0.1:{ready.address.port} this-machine"
            )
        reporter.note(f"on the other machine: swaa-local chat MODEL --rpc {ready.address} · Ctrl-C ends this worker")
        if streams.stdout_is_open():
            click.echo(str(ready.address))

    return work(WorkerOptions(devices=names, cache=cache, **options), on_ready=announce, reporter=reporter)
