"""`swaa-local serve`: llama.cpp's own server, from the patched build, with a schedule.

Chooses defaults, starts the program, waits until it is ready, and ends as it ends. Knows the names of
some of llama-server's options; nothing of requests, slots and batches, which are the server's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swaa_local.engine import native
from swaa_local.engine.context_length import has_gpu
from swaa_local.engine.workers import WorkerAddress, check_workers
from swaa_local.errors import SWAAError
from swaa_local.files.server_process import ServerProcess
from swaa_local.files.signals import ended_by
from swaa_local.files.user_input import user_path
from swaa_local.model_file.adapter import Adapter, adapter_remarks, read_adapter
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.schedule_keys import read_stored
from swaa_local.needle.model import bundled_template, is_bundled
from swaa_local.report.progress import SILENT, Reporter
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.schedule.config import Schedule, default_n_ubatch
from swaa_local.schedule.text import letters_of
from swaa_local.serve.address import Address
from swaa_local.serve.api_keys import handed_over, keys_of_file, keys_of_variable
from swaa_local.serve.disk_cache import disk_cache_environment
from swaa_local.serve.limits import RPC, context_arguments
from swaa_local.sources.find import find_gguf

_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_MAX_OVERRIDE = 127  # characters of a string in llama.h's llama_model_kv_override
_LESS_MEMORY = "take a smaller context (-c), fewer requests at once (-np) or a smaller model"
_WARNINGS = "2"  # of llama-server's --verbosity
# Of its warnings, what tells of a default that is as it should be, and of a token that it has set right by itself.
_NOISE = re.compile(
    r"(?:[\d.]+ W )?(?:"
    r"srv +init: chat template supports preserving reasoning, it is enabled by default \(may use more tokens, .*\)"
    r"|load: control-looking token: +\d+ '.*' was not control-type; .* its type will be overridden"
    r")"
)
_COLOUR = re.compile(r"\x1b\[[\d;]*m")

# What our own defaults depend on, as llama-server spells it: options, then the environment.
_GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS")
_N_UBATCH = ("-ub", "--ubatch-size", "LLAMA_ARG_UBATCH")
_VERBOSITY = ("-lv", "--verbosity", "--log-verbosity", "LLAMA_ARG_LOG_VERBOSITY")
_OVERRIDE = ("--override-kv",)
_API_PREFIX = ("--api-prefix", "LLAMA_ARG_API_PREFIX")
_ALIAS = ("-a", "--alias", "LLAMA_ARG_ALIAS")
_CACHE_RAM = ("-cram", "--cache-ram", "LLAMA_ARG_CACHE_RAM")
_CORS = ("--cors-origins", "LLAMA_ARG_CORS_ORIGINS")
_HOSTS = ("--allowed-hosts", "LLAMA_ARG_ALLOWED_HOSTS")
_TEMPLATE = ("--chat-template", "--chat-template-file", "LLAMA_ARG_CHAT_TEMPLATE", "LLAMA_ARG_CHAT_TEMPLATE_FILE")
_TLS_KEY = ("--ssl-key-file", "LLAMA_ARG_SSL_KEY_FILE")
_OTHER_MODELS = (
    *("-hf", "-hfr", "--hf-repo", "LLAMA_ARG_HF_REPO"),
    *("-mu", "--model-url", "LLAMA_ARG_MODEL_URL"),
    *("-dr", "--docker-repo", "LLAMA_ARG_DOCKER_REPO"),
    *("--models-dir", "LLAMA_ARG_MODELS_DIR", "--models-preset", "LLAMA_ARG_MODELS_PRESET"),
)
_KEY = "LLAMA_API_KEY"
_GIVEN_AS_ARGUMENTS = ("LLAMA_ARG_MODEL", "LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_API_KEY_FILE", _KEY)


class ServeError(SWAAError):
    """The server cannot be started as asked; the message says what to do."""


@dataclass(frozen=True)
class ServeOptions:
    """The command's options. extra: llama-server's own, as the user gave them."""

    model: str
    schedule: ScheduleOptions = ScheduleOptions()  # noqa: RUF009 frozen
    host: str = "127.0.0.1"
    port: int = 8080
    api_key_file: Path | None = None
    verbose: bool = False
    cache_bytes: int | None = None
    """Bound on what is kept on disk of prompts that were read; None: nothing is."""
    draft_window: int | None = None
    """Tokens that a drafted one sees; None: the model drafts nothing."""
    extra: tuple[str, ...] = ()
    lora: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Ready:
    """A server that answers."""

    url: str
    model: Path
    schedule: Schedule | None
    n_ctx: int
    """Tokens of a request at most."""
    n_slots: int
    """Requests at once."""
    has_page: bool
    has_key: bool


def serve(options: ServeOptions, *, on_ready: Callable[[Ready], None], reporter: Reporter = SILENT) -> int:
    """Run a server until it ends; its exit code, 128 + n if signal n ended it.

    SIGINT and SIGTERM go on to the server, which then ends in order (SIGHUP does the same); a second one kills it.
    Raises `SWAAError` with the server's own reason if it does not start.
    """
    program = native.engine_program("llama-server", "LLAMA_BUILD_SERVER")
    _refuse_other_models(options.extra, os.environ)
    if "swaa." in (value_of(_OVERRIDE, options.extra, {}) or ""):
        raise ServeError(
            "a schedule is not given by --override-kv swaa.*; "
            "take --preset, or --window, --sinks, --full-layers and --fa-decode"
        )
    workers = value_of(RPC, options.extra, os.environ)
    if workers is not None:
        check_workers(WorkerAddress.parse_list(workers))
    keys = find_keys(options, os.environ)
    path = find_gguf(options.model)
    schedule, arguments = schedule_arguments(path, options.schedule)
    arguments += lora_arguments(path, options.lora, schedule, reporter)
    extra = options.extra
    arguments += context_arguments(
        read_model_info(path), schedule, lambda names: value_of(names, extra, os.environ), reporter
    )
    if workers is not None and value_of(_CACHE_RAM, extra, os.environ) is None:
        arguments += ["--cache-ram", "0"]  # what is kept beside the context would come over the network
    gpu = has_gpu(options.verbose)
    arguments += default_arguments(schedule, extra, os.environ, gpu=gpu)
    if options.draft_window is not None:
        if not gpu:
            reporter.note("on CPUs, drafts through a window rarely pay; compare with a run without --draft-window")
        arguments += ["--spec-type", "window", "--spec-window-size", str(options.draft_window)]
    if value_of(_ALIAS, extra, os.environ) is None:
        arguments += ["--alias", _csv_field(path.stem if path == user_path(options.model) else options.model)]
    if is_bundled(path) and value_of(_TEMPLATE, extra, os.environ) is None:
        arguments += ["--chat-template-file", str(bundled_template())]
    if not options.verbose and value_of(_VERBOSITY, extra, os.environ) is None:
        arguments += ["--verbosity", _WARNINGS]
    address = Address(
        options.host.split(",")[0].strip(),
        options.port,
        prefix=value_of(_API_PREFIX, extra, os.environ) or "",
        tls=value_of(_TLS_KEY, extra, os.environ) is not None,
    ).claim()
    arguments += ["--host", options.host, "--port", str(address.port)]
    arguments += browser_arguments(extra, os.environ, has_key=bool(keys))
    is_local = options.host in _LOCAL_HOSTS or address.is_socket
    if not keys and not is_local:
        reporter.note(f"no API key is set, so whoever reaches {options.host}:{address.port} can use this server")
    env = {name: value for name, value in os.environ.items() if name not in _GIVEN_AS_ARGUMENTS}
    env |= disk_cache_environment(
        path,
        schedule,
        [*_said_of(options.lora), *extra],
        env,
        max_bytes=None if workers else options.cache_bytes,
        note=reporter.note,
    )
    with contextlib.ExitStack() as stack:
        pass_fds = [stack.enter_context(handed_over(keys))] if keys else []
        arguments += [word for fd in pass_fds for word in ("--api-key-file", f"/dev/fd/{fd}")]
        command = [str(program), "--model", str(path), *arguments, *extra]
        server = stack.enter_context(
            ServerProcess(
                command,
                env,
                echo=options.verbose,
                pass_fds=pass_fds,
                less_memory=_LESS_MEMORY,
                is_noise=lambda line: _NOISE.fullmatch(_COLOUR.sub("", line)) is not None,
            )
        )
        with reporter.step(f"loading {path.name}"):
            is_ready = server.wait_ready(address.is_ready)
        if is_ready:
            on_ready(_ask_what_it_is(address, path, schedule, keys))
        return server.wait()


def server_help() -> str:
    """What llama-server says of its own options."""
    done = subprocess.run(
        [str(native.engine_program("llama-server", "LLAMA_BUILD_SERVER")), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise ServeError(ended_by(-done.returncode, "llama-server --help"))
    return done.stdout


def find_keys(options: ServeOptions, env: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of which clients need one; none: they need none.

    Raises `ServeError` where one would be shown, and `KeyFileError` where one is meant and cannot be read.
    """
    # With = it is no option of llama-server's, whose error would show it.
    if any(word.replace("_", "-").partition("=")[0] == "--api-key" for word in options.extra):
        raise ServeError(
            "a key on the command line can be read by every user of this machine; "
            "put it into a file (--api-key-file FILE) or into the environment (LLAMA_API_KEY)"
        )
    of_variable = keys_of_variable(_KEY, env[_KEY]) if _KEY in env else ()
    of_file = keys_of_file(options.api_key_file) if options.api_key_file is not None else ()
    return of_variable + of_file


def _refuse_other_models(extra: Sequence[str], env: Mapping[str, str]) -> None:
    """Raises `ServeError` for options that name a model to llama-server, whose schedule would not be known here."""
    for name in _OTHER_MODELS:
        if value_of((name,), extra, env) is not None:
            raise ServeError(
                f"{name} names another model than MODEL; leave it out and give the one to serve as MODEL: "
                "a GGUF file, or org/name:Q4_K_M from the hub"
            )


def schedule_arguments(path: Path, wanted: ScheduleOptions) -> tuple[Schedule | None, list[str]]:
    """The schedule that the server will run, and the arguments that make it so where the file says otherwise."""
    layers = read_model_info(path).layers
    stored = read_stored(path)
    of_file = stored.schedule
    config = wanted.config(layers, lambda: stored)
    if config is None:
        return of_file, []
    full = Schedule.full(layers)
    schedule = config.schedule(layers) if config else full
    if schedule == (of_file or full):
        return of_file, []
    letters = letters_of(schedule.layer_modes)
    if len(letters) > _MAX_OVERRIDE:
        raise ServeError(
            f"the model has {layers.n_layer} layers and llama-server takes a schedule for {_MAX_OVERRIDE} at most; "
            f"put it into the file instead: swaa-local convert {path} -o OUT.gguf"
        )
    values = (
        "swaa.version=int:1",
        f"swaa.window=int:{schedule.window}",
        f"swaa.sinks=int:{schedule.sinks}",
        f"swaa.layer_modes=str:{letters}",
        f"swaa.tail=int:{schedule.tail}",
    )
    return None if schedule.is_full else schedule, ["--override-kv", ",".join(values)]


def _said_of(adapters: Sequence[Adapter]) -> list[str]:
    return [word for adapter in adapters for word in (str(adapter.path), repr(adapter.scale))]


def lora_arguments(path: Path, adapters: Sequence[Adapter], schedule: Schedule | None, reporter: Reporter) -> list[str]:
    """The adapters as llama-server takes them; notes those that were tuned on another model or for another schedule.

    Raises `GGUFError` for a file that is no adapter.
    """
    for adapter in adapters:
        for remark in adapter_remarks(read_adapter(adapter.path), path, [schedule]):
            reporter.note(remark)
    if not adapters:
        return []
    if all(adapter.scale == 1 for adapter in adapters):
        return ["--lora", ",".join(_csv_field(str(adapter.path)) for adapter in adapters)]
    for adapter in adapters:
        if ":" in str(adapter.path):
            raise ServeError(f"llama-server takes no scale for {adapter.path}, whose name has a colon; rename it")
    return ["--lora-scaled", ",".join(_csv_field(f"{adapter.path}:{adapter.scale!r}") for adapter in adapters)]


def default_arguments(
    schedule: Schedule | None, extra: Sequence[str], env: Mapping[str, str], *, gpu: bool
) -> list[str]:
    """What `chat` would choose too, where the user said nothing and llama-server would choose otherwise."""
    if value_of(_N_UBATCH, extra, env) is not None:
        return []
    gpu = gpu and value_of(_GPU_LAYERS, extra, env) != "0"
    return ["--ubatch-size", str(default_n_ubatch(schedule or Schedule.full(1), gpu=gpu))]


def browser_arguments(extra: Sequence[str], env: Mapping[str, str], *, has_key: bool) -> list[str]:
    """Which web pages may use the server where the user said nothing: those that know a key, or else its own alone.

    Without either, every page that the user visits could use it through the browser.
    """
    if has_key:
        return []
    return [
        word for names in (_CORS, _HOSTS) if value_of(names, extra, env) is None for word in (names[0], "localhost")
    ]


def _csv_field(text: str) -> str:
    """As one field of llama-server's lists, whatever it holds."""
    return '"' + text.replace('"', '""') + '"' if {",", '"'} & set(text) else text


def value_of(names: Sequence[str], extra: Sequence[str], env: Mapping[str, str]) -> str | None:
    """What llama-server will find under one of these names: the last on the command line, or the environment's."""
    for index in range(len(extra) - 1, -1, -1):
        word = extra[index]
        if (word.replace("_", "-") if word.startswith("--") else word) in names:
            return "".join(extra[index + 1 : index + 2])
    return next((env[name] for name in names if name in env), None)


def _ask_what_it_is(address: Address, path: Path, schedule: Schedule | None, keys: Sequence[str]) -> Ready:
    try:
        status, body = address.get("/props", key=keys[0] if keys else None)
        if status in (401, 403):
            raise ServeError(f"the server started, but refuses its own command (HTTP {status}); -v shows its log")
        props = json.loads(body) if status == 200 else {}
        has_page = address.get("/")[0] == 200
    except (OSError, ValueError, http.client.HTTPException):  # it is busy already, or gone
        props, has_page = {}, True
    n_ctx = props.get("default_generation_settings", {}).get("n_ctx", 0)
    return Ready(address.url, path, schedule, n_ctx, props.get("total_slots", 0), has_page, bool(keys))
