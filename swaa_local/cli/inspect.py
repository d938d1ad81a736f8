"""The commands that show files: `inspect` one, `list` those of this machine. Options and printing; no engine."""

from __future__ import annotations

from pathlib import Path

import click

from swaa_local.cli.click_types import PATH, tokens
from swaa_local.schedule.cost import KV_TYPES
from swaa_local.text.printable import printable, printable_json


@click.command("inspect", short_help="Show a schedule, and what it costs and saves.")
@click.argument("file", type=PATH)
@click.option("-c", "--ctx-size", "n_ctx", type=tokens(1), help="Context in tokens [the model's, at most 32768].")
@click.option(
    "-ub",
    "--ubatch-size",
    "n_ubatch",
    type=tokens(1),
    help="Tokens of a part of a batch [512; 1024 for windows on a GPU].",
)
@click.option(
    "-ctk", "--cache-type-k", type=click.Choice(list(KV_TYPES), case_sensitive=False), default="f16", show_default=True
)
@click.option(
    "-ctv", "--cache-type-v", type=click.Choice(list(KV_TYPES), case_sensitive=False), default="f16", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(
    file: Path, n_ctx: int | None, n_ubatch: int | None, cache_type_k: str, cache_type_v: str, as_json: bool
) -> None:
    """Show a GGUF's schedule, layer by layer, and what it costs and saves.

    KV bytes and attention work are worked out from the metadata for one sequence of -c tokens; nothing is loaded or
    measured.

    \b
    swaa-local inspect model.gguf
    swaa-local inspect model.gguf -c 131072 -ctk q8_0 -ctv q8_0
    swaa-local inspect model.gguf --json | jq .schedule.swaa_config
    """
    from swaa_local.inspect.run import inspect_gguf
    from swaa_local.inspect.table import as_dict, report

    inspection = inspect_gguf(file, n_ctx=n_ctx, n_ubatch=n_ubatch, type_k=cache_type_k, type_v=cache_type_v)
    if as_json:
        click.echo(printable_json(as_dict(inspection), indent=2))
    else:
        click.echo(report(inspection))


@click.command("list", short_help="List the models on this machine.")
@click.argument("places", nargs=-1, metavar="[DIRECTORY]...")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def list_command(places: tuple[str, ...], as_json: bool) -> None:
    """List the models in each DIRECTORY and below; without one, those here and in the hub's cache.

    For each model: the name that chat takes, its size, what it is, and its schedule.

    \b
    swaa-local list
    swaa-local list ~/models
    """
    from swaa_local.inspect.listing import list_models
    from swaa_local.inspect.table import listed, listed_as_dict

    models = list_models(places)
    if as_json:
        click.echo(printable_json([listed_as_dict(model) for model in models], indent=2))
    elif models:
        click.echo(listed(models))
    else:
        advice = "name a directory, or get one: swaa-local chat org/name:Q4_K_M"
        where = ", ".join(map(printable, places))
        click.echo(f"no models in {where}" if places else f"no models here or in the hub's cache; {advice}", err=True)
