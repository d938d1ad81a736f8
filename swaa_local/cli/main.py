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
from typing import Any

import click

from swaa_local import __version__
from swaa_local.cli import streams
from swaa_local.cli.bench import bench_command
from swaa_local.cli.cache import cache_command
from swaa_local.cli.calibrate import calibrate_command
from swaa_local.cli.chat import chat_command
from swaa_local.cli.config import ENV_PREFIX, default_map, name_variables, origin
from swaa_local.cli.convert import convert_command
from swaa_local.cli.eval import demo_command, eval_command
from swaa_local.cli.inspect import inspect_command, list_command
from swaa_local.cli.serve import serve_command
from swaa_local.cli.tune import tune_command
from swaa_local.cli.worker import worker_command
from swaa_local.errors import SWAAError
from swaa_local.text.printable import printable, printable_lines

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
    swaa-local convert unsloth/Qwen3-4B-Instruct-2507-GGUF:Q4_K_M -o qwen.gguf --preset qwen3-4b
    swaa-local inspect qwen.gguf
    swaa-local chat qwen.gguf --file book.txt
    swaa-local serve qwen.gguf
    """


main.add_command(inspect_command)
main.add_command(list_command)
main.add_command(convert_command)
main.add_command(chat_command)
main.add_command(cache_command)
main.add_command(bench_command)
main.add_command(calibrate_command)
main.add_command(eval_command)
main.add_command(demo_command)
main.add_command(serve_command)
main.add_command(tune_command)
main.add_command(worker_command)
