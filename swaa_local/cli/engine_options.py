"""How the engine runs, on the command line: one decorator for every command that loads a model.

Names are llama.cpp's. Knows click and the constructor of `Llama`; nothing of schedules.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, TypeVar

import click

from swaa_local.cli.click_types import LORA, ON_OFF_AUTO, SPLIT, WORKERS, Factor, Number, tokens
from swaa_local.engine import crash
from swaa_local.engine.limits import MAX_LAYERS, MAX_THREADS
from swaa_local.engine.options import ROPE_SCALES, ROPE_SCALINGS, SPLIT_MODES, EngineOptions
from swaa_local.schedule.cost import KV_TYPES

Command = TypeVar("Command", bound=Callable[..., Any])

_KV_TYPE = click.Choice(list(KV_TYPES), case_sensitive=False)
_THREADS, _LAYERS = Number("threads", 1, MAX_THREADS), Number("layers", -1, MAX_LAYERS, words={"all": -1, "auto": -1})


def tell_without_gpu(engine: EngineOptions) -> None:
    """Once for a command; what it then does with `Llama` warns no more. It starts the engine, which may take seconds:
    to be called when nothing of the command line is left to be checked."""
    from swaa_local.engine.no_gpu import NoGPUWarning, told_of_a_command
    from swaa_local.report.terminal import TerminalReporter

    warnings.simplefilter("ignore", NoGPUWarning)
    if said := told_of_a_command(engine):
        TerminalReporter().note(said)


def engine_options(command: Command, *, without: Collection[str] = ()) -> Command:
    """Add the engine's options; the command gets them as `engine: EngineOptions`. without: fields to leave out.

    The engine is loaded first, and from then on a signal that ends the process is reported (`crash`).
    """
    options = {
        "n_gpu_layers": click.option(
            "-ngl",
            "--gpu-layers",
            "--n-gpu-layers",
            "n_gpu_layers",
            type=_LAYERS,
            default=-1,
            help="Layers on the GPU [all].",
        ),
        "rpc_servers": click.option(
            "--rpc",
            "rpc_servers",
            type=WORKERS,
            default=(),
            envvar="LLAMA_ARG_RPC",
            help="Workers that hold and compute layers, started with `swaa-local worker`.",
        ),
        "split_mode": click.option(
            "-sm",
            "--split-mode",
            type=click.Choice(SPLIT_MODES),
            help="How layers are divided between workers and GPUs [layer].",
        ),
        "tensor_split": click.option(
            "-ts",
            "--tensor-split",
            type=SPLIT,
            help="Shares of the layers: the workers' in their order, then the GPUs' [by free memory].",
        ),
        "main_gpu": click.option(
            "-mg", "--main-gpu", type=click.IntRange(0), metavar="N", help="The only device, with -sm none [0]."
        ),
        "n_threads": click.option(
            "-t", "--threads", "n_threads", type=_THREADS, help="Threads [half the CPUs; all to read]."
        ),
        "n_threads_batch": click.option(
            "-tb", "--threads-batch", "n_threads_batch", type=_THREADS, help="Threads to read the prompt [-t]."
        ),
        "n_batch": click.option("-b", "--batch-size", "n_batch", type=tokens(1), help="Tokens of a batch [2048]."),
        "n_ubatch": click.option(
            "-ub",
            "--ubatch-size",
            "n_ubatch",
            type=tokens(1),
            help="Tokens of a part of a batch [512; 1024 for windows on a GPU].",
        ),
        "flash_attn": click.option(
            "-fa",
            "--flash-attn",
            type=ON_OFF_AUTO,
            default=None,
            help="Flash attention; auto is on where the device can [auto].",
        ),
        "type_k": click.option(
            "-ctk", "--cache-type-k", "type_k", type=_KV_TYPE, help="Type of the cached keys [f16]."
        ),
        "type_v": click.option(
            "-ctv", "--cache-type-v", "type_v", type=_KV_TYPE, help="Type of the cached values [f16]."
        ),
        "rope_scaling": click.option(
            "--rope-scaling",
            type=click.Choice(ROPE_SCALINGS),
            help="How to meet more tokens than the model was trained on [the model's].",
        ),
        "rope_scale": click.option(
            "--rope-scale",
            type=Factor(*ROPE_SCALES),
            help="By what to stretch the length that it was trained on, such as 4 [the model's].",
        ),
        "yarn_orig_ctx": click.option(
            "--yarn-orig-ctx", type=tokens(1), help="What it was trained on, for yarn [the model's]."
        ),
        "lora": click.option("--lora", type=LORA, help="A LoRA adapter in GGUF, for this run, scaled by SCALE [1]."),
        "draft_window": click.option(
            "--draft-window",
            type=tokens(0),
            help="Tokens that drafts see; 0 for none [512 with a schedule that has FA decode, else 0].",
        ),
        "speculate": click.option(
            "--speculate",
            type=click.Choice(["on", "off", "auto"]),
            default="auto",
            help="Draft tokens and check several at once; auto is where it is measured to pay [auto].",
        ),
        "verbose": click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
    }

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        said = {field.name: kwargs.pop(field.name) for field in fields(EngineOptions) if field.name not in without}
        if "speculate" in said:
            said["speculate"] = {"on": True, "off": False, "auto": "auto"}[said["speculate"]]
        crash.watch(f"running {click.get_current_context().info_name}", keep_backtrace=said.get("verbose", False))
        return command(*args, engine=EngineOptions(**said), **kwargs)

    decorated: Callable[..., Any] = wrapped
    for name, option in reversed(options.items()):
        if name not in without:
            decorated = option(decorated)
    return decorated  # type: ignore[return-value]
