"""The command that fine-tunes: parses, calls, prints; no logic."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.click_types import FILE, PATH, Real, tokens
from swaa_local.cli.schedule_options import schedule_options
from swaa_local.schedule.choice import ScheduleOptions

_COUNT = click.IntRange(1)


@click.command("tune", short_help="Fine-tune a model for a schedule, a LoRA adapter.")
@click.argument("model")
@click.option("-o", "--output", type=PATH, required=True, help="The adapter to write, a GGUF.")
@click.option("--data", type=FILE, metavar="FILE", help="Prompts and answers, as JSON lines.")
@click.option("--distill", type=PATH, metavar="PATH", help="A text or a folder of texts, to make prompts of.")
@click.option("--prompts", type=_COUNT, default=64, show_default=True, help="Prompts to make of the texts.")
@schedule_options
@click.option("--steps", type=_COUNT, default=300, show_default=True, help="Steps of training.")
@click.option(
    "--length", type=tokens(16), default=8192, show_default=True, metavar="TOKENS", help="Of a row, prompt and answer."
)
@click.option("--skip-long", is_flag=True, help="Leave out examples that are longer than a row.")
@click.option("--held-out", type=_COUNT, help="Examples to measure on [a tenth, 2 to 16].")
@click.option("--rank", type=_COUNT, default=16, show_default=True, help="Rank of the adapter.")
@click.option("--alpha", type=Real(0, min_open=True), default=128.0, show_default=True, help="Its scale: alpha/rank.")
@click.option(
    "--targets",
    default="q,k,v",
    show_default=True,
    help="What it changes: q, k, v, o, gate, up, down, or modules' names.",
)
@click.option("--learning-rate", type=Real(0, min_open=True), default=1e-4, show_default=True, help="At its highest.")
@click.option("--accumulate", type=_COUNT, default=1, show_default=True, help="Rows of one step.")
@click.option("--full-share", type=Real(0, 1), default=0.0, show_default=True, help="Of rows under full attention.")
@click.option("--think/--no-think", default=None, help="Render prompts to think, or not [the template decides].")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu", "mps"]), default="auto", help="Where to train [auto]."
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "flash", "sdpa"]),
    default="auto",
    help="Flash attention, which skips what windows hide, or masked SDPA; auto is flash on CUDA [auto].",
)
@click.option(
    "--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, show_default=True, help="Of all that is random."
)
@click.option(
    "--gguf", type=FILE, metavar="FILE", help="The model as it will run, to measure the adapter in the engine."
)
@click.option("--plot", type=FILE, metavar="FILE", help="Plot the loss: a .png, .svg or .pdf.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def tune_command(model: str, schedule: ScheduleOptions, **options: Any) -> int:
    """Fine-tune MODEL under the masks of a schedule, so that it answers as with full attention.

    MODEL is the directory of a Hugging Face checkpoint, a hub id, or a GGUF that transformers can read. What comes out
    is a LoRA adapter, as a GGUF for --lora of chat, serve, bench and eval, and as PEFT's folder beside it (.peft).
    That needs PyTorch: pip install 'swaa-local[tune]'.

    The data are JSON lines with prompt and answer, or with messages; the loss is on the answers alone. --distill makes
    prompts of your own texts instead, and lets full attention's answers be the target. Nothing leaves the machine.
    Ctrl-C ends the training after its step; the same command with --resume goes on.

    \b
    swaa-local tune ./checkpoint -o a.gguf --data qa.jsonl --window 2048 --sinks 100 --fa-decode --tail 128
    swaa-local tune model-swaa.gguf -o a.gguf --distill ./books --length 8192 --steps 200
    swaa-local chat model-swaa.gguf --lora a.gguf
    """
    streams.need_stdout()
    from swaa_local.report.terminal import TerminalReporter
    from swaa_local.tune.request import TuneRequest, require_extra

    require_extra()
    from swaa_local.tune.run import TuneStopped, tune
    from swaa_local.tune.terminal import TerminalWatch, table

    request = TuneRequest(model=model, schedule=schedule, command=_typed(), **options)
    watch = TerminalWatch()
    try:
        result = tune(request, watch)
    except TuneStopped as stop:
        watch.note(f"stopped after step {stop.steps} of {request.steps}; the same command with --resume goes on")
        return 130
    click.echo(table(result))
    TerminalReporter().note(f"wrote {request.output} and {request.peft}")
    return 0


def _typed() -> str:
    """The command, without where the program is."""
    return shlex.join(["swaa-local", *sys.argv[1:]])
