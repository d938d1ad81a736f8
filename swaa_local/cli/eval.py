"""The commands that measure answers: eval and demo. Parses, calls, prints; no logic."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.click_types import FILE, Numbers, tokens
from swaa_local.cli.engine_options import engine_options, tell_without_gpu
from swaa_local.engine.options import ROPE, EngineOptions

_COUNT = click.IntRange(1)
_LENGTHS = Numbers(1, "positive numbers")


def _list_tasks(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from swaa_local.tasks import GROUPS, TASKS

    click.echo("\n".join([*(f"{name}: {', '.join(tasks)}" for name, tasks in GROUPS.items()), *TASKS]))
    ctx.exit()


@click.command("eval", short_help="Compare schedules: what they still find in long texts, and how fast.")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option("--task", "tasks", metavar="NAMES", help="Tasks, separated by commas; see --list-tasks [facts].")
@click.option(
    "--length",
    "lengths",
    type=_LENGTHS,
    metavar="TOKENS",
    help="Lengths of prompt and answer [4096].",
)
@click.option("-n", "--samples", type=_COUNT, help="Questions of each task and length [50].")
@click.option(
    "--variants", metavar="LIST", help="Schedules to compare; see above [full,naive,file; or full,quality,speed]."
)
@click.option("--dataset", type=FILE, metavar="FILE", help="Questions of a .jsonl or .parquet file instead of tasks.")
@click.option("--haystack", type=FILE, metavar="FILE", help="The text that the essay tasks hide their needles in.")
@click.option(
    "--think",
    type=click.Choice(["on", "off", "auto"]),
    default="auto",
    help="Think first; auto leaves it to the template.",
)
@click.option("--think-tokens", type=tokens(1), default=2048, show_default=True, help="Tokens of a thought at most.")
@click.option("--max-tokens", type=tokens(1), help="Tokens of an answer, thoughts aside [the task's].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the questions; answers are greedy.")
@click.option(
    "-c", "--ctx-size", "n_ctx", type=tokens(1), help="With --dataset: tokens of context at most [the model's]."
)
@click.option("--skip-long", is_flag=True, help="With --dataset: leave out questions that do not fit.")
@click.option("--results", type=FILE, metavar="FILE", help="Every prompt, answer and score [MODEL.eval.jsonl].")
@click.option(
    "-o", "--output", "form", type=click.Choice(["md", "csv", "json"]), default="md", help="Form of the figures [md]."
)
@click.option("--plot", type=FILE, metavar="FILE", help="Plot accuracy against time: a .png, .svg or .pdf.")
@click.option(
    "--list-tasks", is_flag=True, is_eager=True, expose_value=False, callback=_list_tasks, help="Show the tasks."
)
@functools.partial(engine_options, without=("draft_window", "speculate"))
def eval_command(
    model: str | None,
    model_option: str | None,
    tasks: str | None,
    lengths: list[int] | None,
    samples: int | None,
    dataset: Path | None,
    think: str,
    results: Path | None,
    form: str,
    plot: Path | None,
    engine: EngineOptions,
    **options: Any,
) -> None:
    """Ask MODEL the same questions about long texts under several schedules, and compare.

    Shown are the share of right answers with its 95 % interval, by task, length and depth of the needle, and what
    reading took. Without MODEL it is the bundled one. Every answer goes to the results file at once; the same command
    continues a run that was stopped, and one with more questions or variants adds them.

    \b
    Variants, separated by commas:
      full     full attention
      file     the schedule of the file
      naive    its window and nothing else
      NAME     a preset; see swaa-local convert --list-presets
               file and NAME take another tail: file tail0
      words    a window w2048 (or naive), and any of: sinks k100, FA decode fadec, full layers 1::2, tail
               tail128; sinks and layers by name take what the file has
    Any of them may end in think or direct, which goes before --think.

    \b
    swaa-local eval
    swaa-local eval qwen.gguf --task niah_single_1,vt --length 4096,16384 --variants full,naive,file
    swaa-local eval qwen.gguf --task ruler --length 32768 --variants "full,w2048 k100 fadec,w2048 k100 fadec 1::2"
    swaa-local eval qwen.gguf --dataset longmemeval_24k.parquet --think on -n 100 -o json --plot plot.png
    """
    streams.need_stdout()
    from swaa_local.eval.plot import plot as draw
    from swaa_local.eval.run import EvalRequest, default_results, evaluate
    from swaa_local.eval.table import as_csv, as_json, markdown
    from swaa_local.eval.terminal import TerminalWatch
    from swaa_local.needle.model import bundled_model
    from swaa_local.report.plotting import check_plot
    from swaa_local.sources.find import find_gguf

    if model is not None and model_option is not None:
        raise click.UsageError("MODEL is given twice, by itself and with -m")
    if dataset is not None and (tasks is not None or lengths is not None):
        raise click.UsageError("--dataset brings its own questions; leave out --task and --length")
    if dataset is None and (options["n_ctx"] is not None or options["skip_long"]):
        raise click.UsageError("-c and --skip-long are for --dataset; the length of tasks is --length")
    if plot is not None:
        check_plot(plot)
    name = model or model_option
    path = bundled_model() if name is None else find_gguf(name)
    request = EvalRequest(
        model=path,
        results=results or default_results(path),
        tasks=[task.strip() for task in (tasks or "facts").split(",")],
        lengths=lengths or [4096],
        samples=samples or 50,
        dataset=dataset,
        think={"on": True, "off": False, "auto": None}[think],
        engine=engine,
        **options,
    )
    tell_without_gpu(engine)
    with TerminalWatch() as watch:
        try:
            evaluation = evaluate(request, watch)
        except KeyboardInterrupt:
            watch.note(f"stopped; the same command goes on from {request.results}")
            raise
        watch.note(f"all answers are in {request.results}")
        if plot is not None:
            for target in draw(evaluation, plot):
                watch.note(f"wrote {target}")
    click.echo({"md": markdown, "csv": as_csv, "json": as_json}[form](evaluation).rstrip("\n"))


@click.command("demo", short_help="See what schedules do, on the bundled model, offline.")
@click.option("-n", "--questions", "n_questions", type=_COUNT, default=20, show_default=True, help="Questions to ask.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the document and the questions.")
@click.option(
    "--length", type=tokens(1), metavar="TOKENS", help="Of the document with a question and its answer [7680]."
)
@click.option("-m", "--model", metavar="MODEL", help="Another GGUF with a schedule, made for such questions.")
@click.option("--chat/--no-chat", "may_chat", default=True, help="Offer to talk about the document afterwards.")
@functools.partial(engine_options, without=("lora", "draft_window", "speculate", *ROPE))
def demo_command(
    n_questions: int, seed: int, length: int | None, model: str | None, may_chat: bool, engine: EngineOptions
) -> int:
    """See what sliding windows break, and what each strategy wins back.

    Writes a long document with facts in it and asks a small model, which comes with the package, the same questions
    in nine ways: with full attention, a naive window, each of four strategies alone (sinks, full attention while
    decoding, some full layers, thinking first), and the schedule that its file stores: without its tail, as it is, and
    thinking first. Needs no network and a minute or two.

    \b
    swaa-local demo
    swaa-local demo --questions 50 --seed 7
    """
    streams.need_stdout()
    from swaa_local.demo.chat import offer_chat
    from swaa_local.demo.run import run_demo
    from swaa_local.demo.terminal import TerminalView, conclusion, result
    from swaa_local.needle.model import bundled_model
    from swaa_local.report.terminal import Console
    from swaa_local.sources.find import find_gguf

    path = bundled_model() if model is None else find_gguf(model)
    tell_without_gpu(engine)
    with TerminalView() as view:
        outcome = run_demo(path, n_questions=n_questions, seed=seed, length=length, engine=engine, view=view)
    table = result(outcome)
    if isinstance(table, str):
        click.echo(table)
    else:
        Console(stderr=False).print(table)
    click.echo(f"\n{conclusion(outcome)}")
    return offer_chat(path, outcome.questions, engine) if may_chat else 0
