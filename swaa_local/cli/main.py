"""The command line: parses, calls, prints. No logic, and no engine before a command runs.

The only place that prints and exits. Exit codes: 0 done, 1 an error in one line on stderr, 2 wrong usage, 128 + n where
signal n ended the server, 130 Ctrl-C, 141 nobody reads the output.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from swaa_local import __version__
from swaa_local.cli import streams
from swaa_local.cli.bench import bench_command
from swaa_local.cli.cache import cache_command, cache_options
from swaa_local.cli.calibrate import calibrate_command
from swaa_local.cli.click_types import LORA, PATH, Number, Real, tokens
from swaa_local.cli.config import ENV_PREFIX, default_map, name_variables, origin
from swaa_local.cli.engine_options import engine_options
from swaa_local.cli.eval import demo_command, eval_command
from swaa_local.cli.schedule_options import schedule_options
from swaa_local.cli.serve import serve_command
from swaa_local.cli.tune import tune_command
from swaa_local.cli.worker import worker_command
from swaa_local.engine.options import EngineOptions
from swaa_local.errors import SWAAError
from swaa_local.model_file.adapter import Adapter
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.schedule.cost import KV_TYPES
from swaa_local.schedule.presets import PRESETS
from swaa_local.text.printable import printable, printable_json, printable_lines

_CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


_OTHER_NAMES = {"run": "chat"}  # as other programs call it


class _NobodyReads(Exception):
    """A `BrokenPipeError` that click must not see: it would make it exit code 1."""


class _Program(click.Group):
    """Turns every way to stop into an exit code and at most one line on stderr."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _hidden_from_click():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _hidden_from_click():
            return super().invoke(ctx)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        run: Callable[[], Any] = functools.partial(super().main, *args, **(kwargs | {"standalone_mode": False}))
        if not standalone_mode:
            return run()
        streams.prepare()
        try:
            code = _exit_code(lambda: self._run_with_defaults(run))
        except (BrokenPipeError, _NobodyReads):
            # Nobody reads on, for instance `| head`.
            code = 141
        finally:
            streams.finish()
        sys.exit(code)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        return super().resolve_command(ctx, [_OTHER_NAMES.get(args[0], args[0]), *args[1:]])

    def _run_with_defaults(self, run: Callable[..., Any]) -> Any:
        name_variables(self)
        return run(default_map=default_map(self), auto_envvar_prefix=ENV_PREFIX)


@contextmanager
def _hidden_from_click() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _NobodyReads from error


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        code = run()
        sys.stdout.flush()
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        text = shown.getvalue().rstrip("\n") + (origin(error) if isinstance(error, click.UsageError) else "")
        click.echo(printable_lines(text + "\n"), err=True, nl=False)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except SWAAError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except MemoryError:
        return _fail("out of memory")
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = 1) -> int:
    click.echo(f"swaa-local: error: {printable(' '.join(message.split()))}", err=True)
    return code


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        engine = f"llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:
        engine = "llama-cpp-python is not installed"
    click.echo(f"swaa-local {__version__} ({engine})")
    ctx.exit()


@click.group(cls=_Program, context_settings=_CONTEXT)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def main() -> None:
    """Long prompts on your own machine, read faster.

    A schedule (SWAA, arXiv 2512.10411), stored in the GGUF, says which layers see only a sliding window while the
    prompt is read. Other programs still run the same file with full attention.

    \b
    swaa-local convert Qwen/Qwen3-4B-Instruct-2507 -o qwen.gguf --outtype q4_k_m --preset qwen3-4b
    swaa-local inspect qwen.gguf
    swaa-local chat qwen.gguf --file book.txt
    swaa-local serve qwen.gguf
    """


@main.command("inspect", short_help="Show a schedule, and what it costs and saves.")
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


@main.command("list", short_help="List the models on this machine.")
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


@main.command("convert", short_help="Make a GGUF with a schedule from a GGUF, a checkpoint or a hub id.")
@click.argument("source")
@click.option("-o", "--output", type=PATH, help="The GGUF to write.  [required]")
@click.option(
    "--outtype",
    "out_type",
    metavar="TYPE",
    help="Weight type: f32, f16, bf16, q8_0, q4_k_m, ... by llama-quantize's names.",
)
@schedule_options
@click.option("--lora", type=LORA, help="A LoRA adapter in GGUF, to be merged into a checkpoint's weights.")
@click.option("--pre-tokenizer", metavar="NAME", help="Of a BPE tokenizer that upstream's converter does not know.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--allow-requantize", is_flag=True, help="Quantize what is already quantized; loses quality.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and do nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Show the log of upstream's converter.")
@click.option("--in-place", is_flag=True, hidden=True)
def convert_command(
    source: str,
    output: Path | None,
    out_type: str | None,
    schedule: ScheduleOptions,
    lora: Adapter | None,
    pre_tokenizer: str | None,
    force: bool,
    allow_requantize: bool,
    dry_run: bool,
    verbose: bool,
    in_place: bool,
) -> None:
    """Make a GGUF with a schedule.

    SOURCE is a GGUF file, the directory of a Hugging Face checkpoint, or a hub id: org/name, org/name:file.gguf,
    org/name:Q4_K_M, each with an optional @revision behind the name.

    From a GGUF all tensors are copied byte for byte; of a model in several files, name the first, and it becomes one.
    From a checkpoint upstream's converter makes the GGUF, in the 16-bit type that the checkpoint has unless --outtype
    says otherwise; that needs PyTorch and transformers: pip install 'swaa-local[convert]'. Other types go through
    llama.cpp's quantizer. The output appears when it is complete; nothing is overwritten without --force.

    \b
    swaa-local convert model.gguf -o model-swaa.gguf --preset qwen3-4b
    swaa-local convert model.gguf -o out.gguf --window 2048 --sinks 100 --full-layers 1::2 --fa-decode
    swaa-local convert ./my-finetune -o out.gguf --outtype q4_k_m --preset quality --pre-tokenizer qwen2
    swaa-local convert ./checkpoint -o out.gguf --outtype q4_k_m --preset quality --lora adapter.gguf
    swaa-local convert org/name:Q4_K_M -o out.gguf --preset quality --dry-run
    swaa-local convert model-swaa.gguf -o plain.gguf --no-swaa

    Presets (--list-presets shows what is known about them; for an unlisted model, calibrate or quality):

    \b
    {presets}
    """
    if in_place:
        raise click.UsageError("convert never rewrites its source; name another file with -o, and remove the old one")
    if output is None:
        raise click.UsageError("name the GGUF to write: -o OUT.gguf")
    from swaa_local.convert.plan import describe_plan, make_plan
    from swaa_local.convert.request import Request
    from swaa_local.convert.run import convert
    from swaa_local.report.terminal import TerminalReporter
    from swaa_local.text.units import format_bytes

    request = Request(
        source=source,
        output=output,
        schedule=schedule.config if schedule.given else False if schedule.no_swaa else None,
        out_type=out_type,
        pre_tokenizer=pre_tokenizer,
        lora=lora,
        force=force,
        allow_requantize=allow_requantize,
        verbose=verbose,
    )
    if dry_run:
        click.echo(describe_plan(make_plan(request)))
        return
    reporter = TerminalReporter()
    outcome = convert(request, reporter)
    reporter.note(f"wrote {output} ({format_bytes(output.stat().st_size)}); swaa-local inspect {output} shows it")
    if outcome.schedule is not None:
        known = f"; --list-presets says what is known of {schedule.preset.name}" if schedule.preset is not None else ""
        reporter.note(f"a window costs accuracy: measure with swaa-local eval {output} before you rely on it{known}")


convert_command.help = (convert_command.help or "").format(presets="\n    ".join(PRESETS))


@main.command("chat", short_help="Talk to a model about long texts.")
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option(
    "-p", "--prompt", "messages", metavar="TEXT", multiple=True, help="Ask this question and exit. Repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="With -p: a line of JSON for each answer.")
@click.option("-q", "--quiet", is_flag=True, help="Write nothing but answers and errors.")
@click.option(
    "-f", "--file", "files", metavar="PATH", multiple=True, help="A text, directory or pattern; - is stdin. Repeatable."
)
@click.option("-s", "--system", "-sys", metavar="TEXT", help="System message.")
@click.option("--think/--no-think", default=None, help="Let a thinking model think, or not [its template decides].")
@click.option("--hide-thinking", is_flag=True, help="Do not show what it thinks.")
@click.option(
    "-n",
    "--max-tokens",
    "--predict",
    type=int,
    help="Tokens of an answer, thinking included [no limit on a terminal, else 4096; the bundled model: 256].",
)
@click.option(
    "--loop-guard/--no-loop-guard", default=True, help="Stop an answer that repeats itself word for word [on]."
)
@click.option("--temp", type=Real(0), help="Temperature; 0 is greedy [0.8].")
@click.option(
    "--top-k", type=Number("tokens", 0, (1 << 31) - 1), help="Sample from the k likeliest tokens; 0 from all [40]."
)
@click.option("--top-p", type=Real(0, 1), help="Sample from the likeliest that sum to p [0.95].")
@click.option("--min-p", type=Real(0, 1), help="Drop tokens below this share of the likeliest [0.05].")
@click.option("--repeat-penalty", type=Real(0), help="Penalty for repeated tokens [1.0, none].")
@click.option("--seed", type=click.IntRange(-1), help="Seed of the sampling; -1 is random [-1].")
@click.option("-c", "--ctx-size", "n_ctx", type=tokens(0), help="Context in tokens [the model's, or what fits].")
@click.option("--session", metavar="NAME", help="Keep the conversation under this name, or go on with it.")
@click.option("--continue", "continues", is_flag=True, help="Go on with the last conversation.")
@cache_options
@engine_options
@schedule_options
def chat_command(
    model: str | None,
    model_option: str | None,
    system: str | None,
    think: bool | None,
    hide_thinking: bool,
    loop_guard: bool,
    engine: EngineOptions,
    schedule: ScheduleOptions,
    **options: Any,
) -> int:
    """Talk to MODEL about long texts.

    MODEL is a GGUF file, or one on the hub: org/name, org/name:Q4_K_M or org/name:file.gguf, which is downloaded once.
    Without one it is the bundled model, which only knows how to answer questions about facts in a text.

    The schedule is the file's; the options below replace it for this chat. The answer goes to stdout, everything else
    to stderr. With -p, or with a question piped in, there is one answer; otherwise a conversation, where /help lists
    the commands. Sampling defaults in the GGUF win over those below. A text that was read before is not read again.

    \b
    swaa-local chat model.gguf
    swaa-local chat model.gguf --file book.txt -p "Who is the narrator?"
    man bash | swaa-local chat model.gguf -p "How do I read a file line by line?"
    swaa-local chat model.gguf --file "src/**/*.py" -p "What does it do?" -p "Where are its tests?" --json
    swaa-local chat --continue
    swaa-local chat model.gguf --file a.txt --file b.txt --window 2048 --sinks 100 --full-layers 1::2 --fa-decode
    """
    if model is not None and model_option is not None:
        raise click.UsageError("MODEL is given twice, by itself and with -m")
    model = model or model_option
    streams.need_stdout()
    from swaa_local.chat.kept import open_session
    from swaa_local.chat.request import ChatOptions
    from swaa_local.chat.run import chat
    from swaa_local.chat.settings import Settings
    from swaa_local.needle.model import CHAT_SETTINGS, NOTE, bundled_model, is_bundled
    from swaa_local.report.terminal import TerminalReporter

    sampling = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "max_tokens", "seed")
    given = {name: value for name in sampling if (value := options.pop(name)) is not None}
    session = open_session(options.pop("session"), continues=options.pop("continues"))
    kept = session.read() if session is not None else None
    if model is None and kept is not None:
        model = kept.model
    if model is None or is_bundled(Path(model)):
        given = {**CHAT_SETTINGS, **given}
    if model is None:
        model = str(bundled_model())
        if not (options["quiet"] or options["as_json"]):
            TerminalReporter().note(NOTE)
    switches: dict[str, Any] = {"think": think, "hide_thinking": hide_thinking, "loop_guard": loop_guard}
    settings = Settings(**given, **switches, system=system or "")
    given |= {name: value for name, value in switches.items() if value != getattr(Settings(), name)}
    return chat(
        ChatOptions(
            model=model,
            schedule=schedule,
            settings=settings,
            given=tuple(given),
            said=_said(),
            engine=engine,
            session=session,
            kept=kept,
            **options,
        )
    )


def _said() -> frozenset[str]:
    """Names of the parameters that stand on the command line, not in a file or a variable."""
    context = click.get_current_context()
    return frozenset(
        name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    )


main.add_command(cache_command)
main.add_command(bench_command)
main.add_command(calibrate_command)
main.add_command(eval_command)
main.add_command(demo_command)
main.add_command(serve_command)
main.add_command(tune_command)
main.add_command(worker_command)
