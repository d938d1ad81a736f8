"""The command that measures speed: bench. Parses, calls, prints; no logic."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.click_types import FILE, Numbers
from swaa_local.cli.engine_options import engine_options, tell_without_gpu
from swaa_local.cli.schedule_options import schedule_options
from swaa_local.engine.options import ROPE, EngineOptions
from swaa_local.schedule.choice import ScheduleOptions

_FROM_0, _FROM_1 = Numbers(0, "numbers from 0 on,"), Numbers(1, "numbers from 1 on,")


class _Pair(click.ParamType):
    """Prompt and generated tokens: 4096,512."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            n_prompt, n_gen = (int(part) for part in value.split(","))
        except ValueError:
            n_prompt = n_gen = 0
        if n_prompt < 1 or n_gen < 1:
            self.fail(f"{value!r} is not a pair of positive numbers such as 4096,512", param, ctx)
        return n_prompt, n_gen


@click.command("bench", short_help="Compare schedules: how fast they read and write.")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option("-p", "--n-prompt", "prompts", type=_FROM_0, metavar="TOKENS", help="Prompt lengths [4096].")
@click.option("-n", "--n-gen", "gens", type=_FROM_0, metavar="TOKENS", help="Tokens to decode after them [32].")
@click.option("-pg", "pairs", type=_Pair(), multiple=True, metavar="PP,TG", help="A whole request; may be repeated.")
@click.option(
    "-d", "--n-depth", "depths", type=_FROM_0, metavar="TOKENS", help="Tokens in the cache before, untimed [0]."
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Of all, variants in turn."
)
@click.option("--variants", metavar="LIST", help="What to compare; see above [full and the file's schedule].")
@click.option("--limit/--no-limit", default=True, help="Measure the speed that no schedule can beat [yes].")
@click.option(
    "-ub",
    "--ubatch-size",
    "n_ubatch",
    type=_FROM_1,
    metavar="TOKENS",
    help="Tokens of a part of a batch; several are all measured [512; 1024 for windows on a GPU].",
)
@click.option(
    "-o",
    "--output",
    "form",
    type=click.Choice(["md", "csv", "json", "jsonl"]),
    default="md",
    help="Form of the figures [md].",
)
@click.option("--plot", type=FILE, metavar="FILE", help="Plot speed and time against length: a .png, .svg or .pdf.")
@functools.partial(engine_options, without=("n_ubatch", "speculate", *ROPE))
@schedule_options
def bench_command(
    model: str | None,
    model_option: str | None,
    prompts: list[int] | None,
    gens: list[int] | None,
    pairs: tuple[tuple[int, int], ...],
    depths: list[int] | None,
    repetitions: int,
    variants: str | None,
    limit: bool,
    n_ubatch: list[int] | None,
    form: str,
    plot: Path | None,
    engine: EngineOptions,
    schedule: ScheduleOptions,
) -> None:
    """Measure how fast MODEL reads and writes with its schedule and with full attention, in one run.

    The weights are loaded once. In every repetition the variants take turns, so that a busy machine hits all alike, and
    ratios are taken within a repetition. Each prompt of -p is read into an empty cache (or behind -d tokens), then -n
    tokens are decoded behind it. -d alone decodes at that depth. Without MODEL it is the bundled one.

    Full attention runs with or without flash attention, whichever a short test finds faster; -fa decides it for all.
    The limit is full attention on prompts of 2(W+k) tokens, which have the same average attention span.

    \b
    Variants, separated by commas:
      full     full attention
      file     the schedule of the file
      NAME     a preset; see --list-presets
      words    a window w2048, and any of: sinks k100, FA decode fadec, full layers 1::2, tail tail128
    Any of them may be followed by fa or nofa (flash attention), by a type of the KV cache, such as q8_0, and by
    spec4@0.9: 4 tokens are drafted for each pass, and 0.9 of them taken to be accepted.

    \b
    swaa-local bench model.gguf
    swaa-local bench model.gguf -p 4096,16384,32768 -n 16 --plot speed.png
    swaa-local bench model.gguf -p 8192 --variants "full,w2048 k100 fadec,w2048 k100 fadec 1::2,w2048 k100"
    swaa-local bench model.gguf -ub 512,2048 -pg 131072,512 --window 2048 --sinks 100 --full-layers 1::2
    swaa-local bench model.gguf -n 32 -d 2048,32768 --variants "full fa,full nofa,file,file q8_0" -o csv
    """
    streams.need_stdout()
    from swaa_local.bench.plot import plot as draw
    from swaa_local.bench.run import BenchFailed, BenchInterrupted, BenchRequest, bench
    from swaa_local.bench.table import as_csv, as_json, as_jsonl, markdown
    from swaa_local.bench.terminal import TerminalWatch
    from swaa_local.model_file.model_info import read_model_info
    from swaa_local.needle.model import NOTE, bundled_model
    from swaa_local.report.plotting import check_plot
    from swaa_local.sources.find import find_gguf

    if model is not None and model_option is not None:
        raise click.UsageError("MODEL is given twice, by itself and with -m")
    given = schedule.given or schedule.no_swaa
    if variants is not None and given:
        raise click.UsageError("--variants names all schedules; leave out the schedule's other options")
    if plot is not None:
        check_plot(plot)
    name = model or model_option
    path = bundled_model() if name is None else find_gguf(name)
    own = None
    if given:
        from swaa_local.model_file.schedule_keys import read_stored
        from swaa_local.schedule.config import SWAAConfig

        layers = read_model_info(path).layers
        own = (schedule.config(layers, lambda: read_stored(path)) or SWAAConfig()).schedule(layers)
    # -d and -pg say themselves what is measured; the default prompts are for those who say nothing.
    nothing_said = not depths and not pairs
    request = BenchRequest(
        model=path,
        variants=variants,
        schedule=own,
        prompts=prompts if prompts is not None else [4096] if nothing_said else [],
        gens=gens if gens is not None else [32] if not pairs else [],
        depths=depths or [],
        pairs=pairs,
        repetitions=repetitions,
        n_ubatch=n_ubatch or [],
        limit=limit,
        engine=engine,
    )
    tell_without_gpu(engine)
    failed: BaseException | None = None
    with TerminalWatch() as watch:
        if name is None:
            watch.note(NOTE)
        try:
            result = bench(request, watch)
        except (BenchInterrupted, BenchFailed) as error:
            result, failed = error.bench, error
            watch.end()
            if not result.rows:
                raise
            watch.note("stopped; these are the figures so far")
        if plot is not None:
            for target in draw(result, plot):
                watch.note(f"wrote {target}")
    forms = {"md": markdown, "csv": as_csv, "json": as_json, "jsonl": as_jsonl}
    click.echo(forms[form](result).rstrip("\n"))
    if failed is not None:
        raise failed
