"""The command that finds a schedule: calibrate. Parses, calls, prints; no logic."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.click_types import FILE, PATH, Numbers, Real, tokens
from swaa_local.cli.engine_options import engine_options, tell_without_gpu
from swaa_local.engine.options import EngineOptions

_UNITS = {"s": 1, "m": 60, "h": 3600}


class _Duration(click.ParamType):
    """Seconds, from 90s, 15m or 1.5h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", str(value).strip())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a time such as 90s, 15m or 1.5h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


def _as_given() -> list[str]:
    return ["swaa-local", *sys.argv[1:]]


@click.command("calibrate", short_help="Find the schedule that keeps a model's answers, on this machine.")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option("-o", "--output", type=PATH, help="The GGUF to write: MODEL with the schedule that is found.")
@click.option(
    "--data", multiple=True, metavar="PATH", help="Your documents: texts, PDFs, folders, patterns. Repeatable."
)
@click.option(
    "--questions",
    type=FILE,
    metavar="FILE",
    help="Your questions: JSON lines with text, question, and answer if known.",
)
@click.option("--length", type=tokens(256), help="Of prompts with their answers [16384, or the model's context].")
@click.option(
    "--budget", "budget_s", type=_Duration(), default="15m", show_default=True, help="Time, such as 90s or 1h."
)
@click.option(
    "--window",
    "windows",
    type=Numbers(1, "windows"),
    metavar="TOKENS",
    help="Windows to choose from [length/16, /8, /4].",
)
@click.option(
    "--keep",
    type=Real(0, 1, min_open=True),
    default=0.98,
    show_default=True,
    help="Of full attention's quality.",
)
@click.option(
    "--memory", is_flag=True, help="Take the smallest KV cache that keeps it, instead of the fastest reading."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@click.option("--log", type=FILE, metavar="FILE", help="Every trial; a run continues from it [MODEL.calibrate.jsonl].")
@click.option("--report", type=PATH, metavar="DIR", help="Write a page with pictures there.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@functools.partial(engine_options, without=("draft_window", "speculate"))
def calibrate_command(
    model: str | None,
    model_option: str | None,
    output: Path | None,
    data: tuple[str, ...],
    report: Path | None,
    as_json: bool,
    force: bool,
    log: Path | None,
    engine: EngineOptions,
    **options: Any,
) -> int:
    """Find the schedule for MODEL that reads fastest and keeps its answers, by asking it about long texts here.

    Asked is about facts hidden in generated prose or in your documents (--data), or what you ask (--questions), always
    beyond the window. Full attention is the measure. What is found is checked with questions that the search has not
    seen, and stored in the output, which then runs like MODEL. Ctrl-C gives the best so far; the same command, with
    --force for the output, goes on.

    \b
    swaa-local calibrate qwen.gguf -o qwen-swaa.gguf
    swaa-local calibrate qwen.gguf -o out.gguf --data ~/reports --length 32768 --budget 30m --report report/
    swaa-local calibrate qwen.gguf -o out.gguf --questions ours.jsonl --keep 0.95 --memory
    """
    streams.need_stdout()
    from swaa_local import __version__
    from swaa_local.calibrate.report import check_report, write_report
    from swaa_local.calibrate.request import CalibrateRequest, default_log
    from swaa_local.calibrate.results import CalibrateError
    from swaa_local.calibrate.run import calibrate
    from swaa_local.calibrate.table import as_json as json_of
    from swaa_local.calibrate.table import markdown, shortfall, stored_line, verdict
    from swaa_local.calibrate.terminal import TerminalWatch
    from swaa_local.convert.plan import make_plan
    from swaa_local.convert.request import Request
    from swaa_local.convert.run import convert
    from swaa_local.needle.model import bundled_model
    from swaa_local.report.terminal import TerminalReporter
    from swaa_local.schedule.config import SWAAConfig
    from swaa_local.sources.find import find_gguf
    from swaa_local.text.units import format_bytes

    if model is not None and model_option is not None:
        raise click.UsageError("MODEL is given twice, by itself and with -m")
    if data and options["questions"] is not None:
        raise click.UsageError("--questions bring their own texts; leave out --data")
    name = model or model_option
    path = bundled_model() if name is None else find_gguf(name)
    if output is not None:  # what would stop the writing is to stop it now
        make_plan(Request(str(path), output, SWAAConfig(1, 0, True), force=force))
    if report is not None:
        check_report(report, force=force)
    request = CalibrateRequest(
        model=path, log=log or default_log(path), data=data, engine=engine, command=shlex.join(_as_given()), **options
    )
    tell_without_gpu(engine)
    with TerminalWatch(request.budget_s) as watch:
        try:
            result = calibrate(request, watch)
        except KeyboardInterrupt:
            watch.note(f"stopped; the same command goes on from {request.log}")
            raise
        watch.note(f"every trial is in {request.log}")
    click.echo((json_of if as_json else markdown)(result).rstrip("\n"))
    reporter = TerminalReporter()
    if report is not None:
        for written in write_report(result, report, force=force):
            reporter.note(f"wrote {written}")
    if result.chosen is None:
        said = verdict(result)
        raise CalibrateError(said[0].lower() + said[1:].rstrip("."))
    if output is not None:
        stored = Request(
            str(path), output, result.chosen.config(), force=force, calibration=stored_line(result, __version__)
        )
        convert(stored, reporter)
        reporter.note(f"wrote {output} ({format_bytes(output.stat().st_size)}); swaa-local chat {output} uses it")
    again = "the same command" + (" with --force" if output is not None and not force else "")
    if result.interrupted:
        reporter.note(f"stopped; {again} goes on from the log")
        return 130
    if not result.keeps:
        raise CalibrateError(
            shortfall(result)
            + (f"; {output} has the best that was found" if output is not None else "")
            + f". A lower --keep accepts it; {again} and a larger --budget goes on from the log"
        )
    return 0
