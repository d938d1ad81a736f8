"""The schedule on the command line: one decorator for every command that takes one.

Knows click and the rules' names; what the values mean is in `schedule`. A layer list such as `1::2` has no meaning
before the model's depth is known, so a command gets `ScheduleOptions` and asks for `config(n_layer)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from swaa_local.cli.click_types import tokens
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.schedule.presets import PRESETS, Preset, get_preset

AUTO = "auto"
"""Instead of a preset's name."""

Command = TypeVar("Command", bound=Callable[..., Any])


def schedule_options(command: Command) -> Command:
    """Add the schedule's options; the command gets them as `schedule: ScheduleOptions`."""
    options = [
        click.option(
            "--preset",
            metavar="NAME",
            callback=_preset,
            help="A known schedule, see --list-presets; or auto: the calibrated one.",
        ),
        click.option(
            "--window",
            type=tokens(1),
            help="Sliding window W, the token itself included.",
        ),
        click.option("--sinks", type=tokens(0), help="First tokens that stay visible to everyone [0]."),
        click.option(
            "--full-layers",
            metavar="LAYERS",
            help="Layers that keep full attention: 1,3,5 or 0-3 or 1::2, or '' for none [none].",
        ),
        click.option(
            "--fa-decode/--no-fa-decode",
            default=None,
            help="Full attention for generated tokens; the window is for the prompt alone.",
        ),
        click.option(
            "--fa-decode-layers", metavar="LAYERS", help="FA decode in these layers only, same syntax as --full-layers."
        ),
        click.option(
            "--clip-layers", is_flag=True, help="Drop listed layers past the model's last one instead of refusing."
        ),
        click.option(
            "--tail",
            type=tokens(0),
            help="Last tokens of the prompt that are read with full attention, with FA decode [the preset's, or 0].",
        ),
        click.option("--no-swaa", is_flag=True, help="No schedule: full attention, whatever the file says."),
        click.option(
            "--list-presets",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_list_presets,
            help="Show the presets and what is known about them.",
        ),
    ]

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {field.name: kwargs.pop(field.name) for field in fields(ScheduleOptions) if field.name != "auto"}
        auto = given["preset"] == AUTO
        schedule = ScheduleOptions(**{**given, "preset": None if auto else given["preset"]}, auto=auto)
        _check(schedule)
        return command(*args, schedule=schedule, **kwargs)

    decorated: Callable[..., Any] = wrapped
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[return-value]


def _check(options: ScheduleOptions) -> None:
    details = {
        "--sinks": options.sinks is not None,
        "--full-layers": options.full_layers is not None,
        "--fa-decode": options.fa_decode is not None,
        "--fa-decode-layers": options.fa_decode_layers is not None,
        "--clip-layers": options.clip_layers,
    }
    # A tail alone may replace that of the file's schedule.
    said = [name for name, is_given in details.items() if is_given]
    if options.no_swaa and (options.given or said or options.tail is not None):
        raise click.UsageError("--no-swaa means no schedule; leave out the schedule's other options")
    if said and not options.has_window and not options.no_swaa:
        raise click.UsageError(f"{said[0]} needs a window: add --window TOKENS or --preset NAME")
    if options.fa_decode is not None and options.fa_decode_layers is not None:
        raise click.UsageError("--fa-decode means all layers and --fa-decode-layers some; give one of them")


def _preset(ctx: click.Context, _param: click.Parameter, value: str | None) -> Preset | str | None:
    return value if value is None or value == AUTO else get_preset(value)


def _list_presets(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    click.echo("\n\n".join(describe_preset(preset) for preset in PRESETS.values()))
    ctx.exit()


def describe_preset(preset: Preset) -> str:
    """Name, settings and what is known, on several lines."""
    settings = f"--window {preset.window} --sinks {preset.sinks} --full-layers '{preset.full_layers}'"
    settings += " --fa-decode" * preset.fa_decode + f" --tail {preset.tail}" * (preset.tail > 0)
    lines = [preset.name, f"  {preset.description}", f"  {settings}"]
    return "\n".join([*lines, *(f"  - {note}" for note in preset.notes)])
