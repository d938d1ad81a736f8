"""The command to talk to a model: its options, and which of them somebody said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.cache import cache_options
from swaa_local.cli.click_types import Number, Real, tokens
from swaa_local.cli.engine_options import engine_options
from swaa_local.cli.schedule_options import schedule_options
from swaa_local.engine.options import EngineOptions
from swaa_local.schedule.choice import ScheduleOptions


@click.command("chat", short_help="Talk to a model about long texts.")
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
@click.option("-sys", "--system", "--system-prompt", metavar="TEXT", help="System message.")
@click.option("--think/--no-think", default=None, help="Let a thinking model think, or not [its template decides].")
@click.option("--hide-thinking", is_flag=True, help="Do not show what it thinks.")
@click.option(
    "-n",
    "--max-tokens",
    "--predict",
    "--n-predict",
    type=Number("tokens", -1, (1 << 31) - 1),
    help="Tokens of an answer, thinking included; -1: no limit, 0: the prompt is read, and that is all "
    "[-1 on a terminal, else 4096; the bundled model: 256].",
)
@click.option(
    "--loop-guard/--no-loop-guard", default=True, help="Stop an answer that repeats itself word for word [on]."
)
@click.option("--temp", "--temperature", type=Real(0), help="Temperature; 0 is greedy [0.8].")
@click.option(
    "--top-k", type=Number("tokens", 0, (1 << 31) - 1), help="Sample from the k likeliest tokens; 0 from all [40]."
)
@click.option("--top-p", type=Real(0, 1), help="Sample from the likeliest that sum to p [0.95].")
@click.option("--min-p", type=Real(0, 1), help="Drop tokens below this share of the likeliest [0.05].")
@click.option("--repeat-penalty", type=Real(0), help="Penalty for repeated tokens [1.0, none].")
@click.option("-s", "--seed", type=click.IntRange(-1), help="Seed of the sampling; -1 is random [-1].")
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
