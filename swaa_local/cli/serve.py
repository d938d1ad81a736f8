"""The command that serves: parses its own options, leaves llama-server's alone, prints the address."""

from __future__ import annotations

import os
from typing import Any

import click

from swaa_local.cli import streams
from swaa_local.cli.cache import cache_options
from swaa_local.cli.click_types import FILE, LORAS, tokens
from swaa_local.cli.schedule_options import schedule_options
from swaa_local.schedule.choice import ScheduleOptions

_EXTRA = "swaa_local.extra"


class _PassThrough(click.Command):
    """A command that takes its own options from anywhere and keeps everything else, in order, for another program.

    click's own way (ignore_unknown_options) reads `-md` as `-m d` and cannot tell an unknown option's value from an
    argument. Here MODEL is the first word, if it is no option.
    """

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[MODEL]", "[OPTIONS]", "[LLAMA-SERVER OPTIONS]"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_value = {
            name: not option.is_flag
            for option in self.params
            if isinstance(option, click.Option)
            for name in (*option.opts, *option.secondary_opts)
        } | dict.fromkeys(ctx.help_option_names, False)
        ours: list[str] = []
        rest: list[str] = []
        words = list(args)
        if words and not words[0].startswith("-"):
            ours.append(words.pop(0))
        while words:
            word = words.pop(0)
            name = word.partition("=")[0] if word.startswith("--") else word
            if name == "--":
                rest += words
                break
            if name in takes_value:
                ours.append(word)
                if takes_value[name] and name == word:
                    ours += words[:1]
                    del words[:1]
            else:
                rest.append(word)
        ctx.meta[_EXTRA] = tuple(rest)
        return super().parse_args(ctx, ours)


def _server_help(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from swaa_local.serve.run import server_help

    click.echo(server_help(), nl=False)
    ctx.exit()


@click.command(
    "serve",
    cls=_PassThrough,
    short_help="Serve a model to OpenAI clients and the browser.",
)
@click.argument("model", required=False)
@click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="LLAMA_ARG_HOST",
    help="Address to listen on; 0.0.0.0 for all.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    envvar="LLAMA_ARG_PORT",
    help="0 takes a free one.",
)
@click.option(
    "--api-key-file",
    type=FILE,
    envvar="LLAMA_ARG_API_KEY_FILE",
    metavar="FILE",
    help="API keys, one a line; or set LLAMA_API_KEY.",
)
@click.option("--lora", type=LORAS, default=(), help="LoRA adapters in GGUF, each scaled by SCALE [1].")
@click.option(
    "--draft-window",
    type=tokens(1),
    help="Draft tokens that see so many, and check several at once [no drafts]. Of llama-server's own options, "
    "--spec-window-n-max says how many, and --spec-type adds other sources.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show the server's log, not its warnings alone.")
@click.option(
    "--server-help",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_server_help,
    help="Show llama-server's own options.",
)
@cache_options
@schedule_options
@click.pass_context
def serve_command(
    ctx: click.Context,
    model: str | None,
    model_option: str | None,
    schedule: ScheduleOptions,
    **options: Any,
) -> int:
    """Serve MODEL to OpenAI clients and the browser.

    MODEL is a GGUF file, or one on the hub: org/name or org/name:file.gguf, which is downloaded once. Without one it is
    the bundled model, which only knows how to answer questions about facts in a text. MODEL comes first, before
    llama-server's options.

    The server is llama.cpp's llama-server: chat, completions, embeddings, tool calls, several requests at once, prompt
    caching, a web page. A text that was read before is not read again, also after a restart.

    Every option that is not listed below goes to it as it is; --server-help lists them. Those that
    are used most are -c (context of all requests together), -np (requests at once), -t, -ngl, -a (the model's name),
    and --rpc with --tensor-split (workers, see swaa-local worker).

    The schedule is the file's; the options below replace it. Ctrl-C or SIGTERM ends the server in order, a second one
    at once; the exit code is the server's.

    \b
    swaa-local serve model.gguf
    swaa-local serve model.gguf --port 9000 -c 65536 -np 4
    swaa-local serve org/name:Q4_K_M --window 2048 --sinks 100 --full-layers 1::2 --fa-decode
    LLAMA_API_KEY=$(cat key) swaa-local serve model.gguf --host 0.0.0.0
    """
    if model is not None and model_option is not None:
        raise click.UsageError("MODEL is given twice, by itself and with -m")
    model = model or model_option or os.environ.get("LLAMA_ARG_MODEL")
    import swaa_local.engine.native  # noqa: F401 first: it says in a sentence why the engine does not load
    from swaa_local.needle.model import NOTE, bundled_model
    from swaa_local.report.terminal import TerminalReporter
    from swaa_local.schedule.text import in_one_line
    from swaa_local.serve.run import Ready, ServeOptions, serve

    reporter = TerminalReporter()
    if model is None:
        model = str(bundled_model())
        reporter.note(NOTE)

    def announce(ready: Ready) -> None:
        requests = "1 request" if ready.n_slots == 1 else f"{ready.n_slots} requests"
        size = f"{requests} at once of up to {ready.n_ctx:,} tokens · " if ready.n_slots else ""
        reporter.note(f"{ready.model.name} · {size}{in_one_line(ready.schedule)}")
        page = f"web page {ready.url}/" if ready.has_page else "no web page (--no-ui)"
        if not ready.has_page and not {"--no-ui", "--no-webui"} & set(ctx.meta[_EXTRA]):
            page = "no web page in this build (that needs Node.js 20 with npm)"
        key = " · needs an API key" if ready.has_key else ""
        reporter.note(f"OpenAI API {ready.url}/v1 · {page}{key} · Ctrl-C ends it")
        if streams.stdout_is_open():
            click.echo(ready.url)

    return serve(
        ServeOptions(model, schedule=schedule, extra=ctx.meta[_EXTRA], **options), on_ready=announce, reporter=reporter
    )
