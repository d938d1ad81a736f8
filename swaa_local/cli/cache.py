"""The options of the cache of texts that were read, and the command that lists and clears it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import click

from swaa_local.cli.click_types import BYTES
from swaa_local.text.printable import printable, printable_json
from swaa_local.text.units import format_bytes

Command = TypeVar("Command", bound=Callable[..., Any])


def cache_options(command: Command) -> Command:
    """Add --cache-size and --no-cache; the command gets `cache_bytes`: the bound, None without a cache."""

    @click.option(
        "--cache-size",
        type=BYTES,
        default="10G",
        show_default=True,
        metavar="SIZE",
        help="Disk for texts that were read, so that they are not read again.",
    )
    @click.option("--no-cache", is_flag=True, help="Neither use what was read before nor keep what is read.")
    @functools.wraps(command)
    def wrapped(*args: Any, cache_size: int, no_cache: bool, **kwargs: Any) -> Any:
        return command(*args, cache_bytes=None if no_cache or not cache_size else cache_size, **kwargs)

    return wrapped  # type: ignore[return-value]


@click.group("cache", short_help="List or clear the texts that were read.")
def cache_command() -> None:
    """What chat and serve keep on disk of the texts that they read, so that they are not read again.

    The files hold the texts themselves, as tokens and as what the model made of them; only you can read them.
    """


@cache_command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def list_command(as_json: bool) -> None:
    """What is kept, the most recently used first: when, how much, and of which model and schedule."""
    from swaa_local.prefix_cache.store import PrefixCache
    from swaa_local.report.terminal import TerminalReporter

    cache = PrefixCache(note=TerminalReporter().note)
    states = cache.states()
    if as_json:
        rows = [
            {
                "file": str(state.path),
                "kind": "conversation" if state.is_conversation else "text",
                "model": state.header.model,
                "schedule": state.header.schedule,
                "n_tokens": state.header.n_tokens,
                "n_bytes": state.n_bytes,
                "used": datetime.fromtimestamp(state.used_s).astimezone().isoformat(timespec="seconds"),
            }
            for state in states
        ]
        click.echo(printable_json({"directory": str(cache.directory), "states": rows}, indent=2))
        return
    for state in states:
        used = datetime.fromtimestamp(state.used_s).strftime("%Y-%m-%d %H:%M")
        kind = "conversation" if state.is_conversation else "text"
        click.echo(
            f"{used}  {state.header.n_tokens:>9,} tokens  {format_bytes(state.n_bytes):>9}  {kind:<12}  "
            f"{printable(state.header.model)}  {printable(state.header.schedule)}"
        )
    total = format_bytes(sum(state.n_bytes for state in states))
    click.echo(f"{_counted(len(states))}, {total} in {printable(cache.directory)}")


@cache_command.command("clear")
def clear_command() -> None:
    """Remove everything that is kept. Programs that run are not disturbed."""
    from swaa_local.prefix_cache.store import PrefixCache

    n_states, n_bytes = PrefixCache().clear()
    click.echo(f"removed {_counted(n_states)}, {format_bytes(n_bytes)}")


def _counted(n_states: int) -> str:
    return "1 state" if n_states == 1 else f"{n_states} states"
