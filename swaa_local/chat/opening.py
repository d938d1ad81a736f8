"""How a chat's model is opened: as the options say, or as its conversation had it; and again, with another context.

Knows options, files and `Llama`; what is said of it goes to the terminal.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from swaa_local.chat.request import ChatOptions
from swaa_local.chat.session import Session
from swaa_local.chat.settings import ChatError
from swaa_local.chat.setup import Setup, chosen_settings
from swaa_local.chat.terminal import Terminal
from swaa_local.engine.no_gpu import NoGPUWarning, told_of_a_command
from swaa_local.engine.options import ROPE, EngineOptions
from swaa_local.engine.threads import IdleCPUs
from swaa_local.errors import SWAAError
from swaa_local.llama import Llama
from swaa_local.model_file.adapter import Adapter
from swaa_local.model_file.model_info import read_model_info
from swaa_local.model_file.schedule_keys import read_stored
from swaa_local.prefix_cache.store import PrefixCache
from swaa_local.schedule.choice import ScheduleOptions, StoredSchedule
from swaa_local.schedule.config import Schedule, SWAAConfig
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.sources.find import find_gguf

# Of `EngineOptions`, what is kept in a setup.
_ENGINE = ("n_batch", "n_ubatch", "flash_attn", "type_k", "type_v", *ROPE)


class ModelOpener:
    """Opens one model, by `open` and `open_sized` as `Session` takes them. Raises as `find_gguf` and `Llama`."""

    def __init__(self, options: ChatOptions, terminal: Terminal) -> None:
        idle = IdleCPUs()
        self._path = find_gguf(options.model)
        self._terminal = terminal
        layers = read_model_info(self._path).layers
        self.options, before = _resumed(options, self._path)
        self._swaa, self.full = self._choose(before, layers)
        self._n_ctx = self.options.n_ctx
        self._advice = "pass -c"  # which is over in a conversation
        self._tells_without_gpu = True
        self._engine = _on_idle_cpus(self.options.engine, idle, terminal)

    def _choose(self, before: Setup | None, layers: ModelLayers) -> tuple[SWAAConfig | Schedule | None, bool]:
        """The schedule, None for the file's, and whether it is turned off."""
        asked, path = self.options.schedule, self._path
        said = self.options.said & {field.name for field in fields(ScheduleOptions)}
        if before is None or said:
            earlier = before.schedule if before and not asked.auto else None

            def stored() -> StoredSchedule:
                of_file = read_stored(path)
                return replace(of_file, schedule=earlier) if earlier else of_file

            chosen = asked.config(layers, stored) or None
            self._schedule = chosen.schedule(layers) if chosen else read_stored(path).schedule
            return chosen, asked.no_swaa
        self._schedule = read_stored(path).schedule
        if before.schedule and before.schedule != self._schedule and before.schedule.n_layer == layers.n_layer:
            self._schedule = replace(before.schedule, model=layers)
            return self._schedule, before.full
        return None, before.full

    def open(self, full: bool) -> Llama:
        options, terminal = self.options, self._terminal
        swaa = False if full else self._swaa
        if self._tells_without_gpu:  # now that all else was checked: the engine may take seconds to look for GPUs
            self._tells_without_gpu = False
            if said := told_of_a_command(options.engine):
                terminal.note(said)
        with warnings.catch_warnings(record=True) as caught, terminal.loading(self._path.name):
            warnings.simplefilter("always", UserWarning)  # of all, Python would keep the filter for its exit
            warnings.simplefilter("ignore", NoGPUWarning)
            llm = Llama(str(self._path), swaa=swaa, n_ctx=self._n_ctx, **self._engine.arguments())
        for warning in caught:
            terminal.note(str(warning.message).replace("pass n_ctx", self._advice))
        self._advice = "/set ctx"
        if options.cache_bytes is not None and not llm.rpc_servers:  # else all cells would come over the network
            try:
                llm.set_cache(PrefixCache(max_bytes=options.cache_bytes, note=terminal.note))
            except (SWAAError, OSError) as error:
                terminal.note(f"texts that were read before are read again: {error}")
        return llm

    def open_sized(self, full: bool, n_ctx: int) -> Llama:
        before, self._n_ctx = self._n_ctx, n_ctx
        try:
            return self.open(full)
        except BaseException:
            self._n_ctx = before
            raise

    def setup(self, session: Session) -> Setup:
        """What this session's model runs with."""
        engine, identity = self.options.engine, session.identity
        return Setup(
            model_id=identity.model if identity else "",
            lora=os.path.abspath(engine.lora.path) if engine.lora else None,
            lora_scale=engine.lora.scale if engine.lora else 1.0,
            lora_id=identity.adapter if identity else "",
            schedule=self._schedule,
            full=session.full,
            n_ctx=self._n_ctx,
            settings=chosen_settings(session.settings, session.chosen),
            **{name: getattr(engine, name) for name in _ENGINE},
        )


def _resumed(options: ChatOptions, path: Path) -> tuple[ChatOptions, Setup | None]:
    """The options, with what the conversation ran with where the command line says nothing; and that, for this model.

    Raises `ChatError` if its adapter is gone.
    """
    kept, setup = options.kept, options.kept.setup if options.kept else None
    if kept is None or setup is None:
        return options, None
    settings = {name: value for name, value in (setup.settings or {}).items() if name not in options.said}
    options = replace(options, settings=replace(options.settings, **settings), given=tuple({*options.given, *settings}))
    if os.path.realpath(kept.model) != os.path.realpath(path):
        return options, None  # nothing else would suit another model

    engine: dict[str, Any] = {name: getattr(setup, name) for name in _ENGINE if name not in options.said}
    if "lora" not in options.said:
        if setup.lora is not None and not os.path.exists(setup.lora):
            raise ChatError(
                f"the LoRA adapter of this conversation, {setup.lora}, is not there any more; pass --lora with another"
            )
        engine["lora"] = Adapter(Path(setup.lora), setup.lora_scale) if setup.lora else None
    n_ctx = options.n_ctx if "n_ctx" in options.said else setup.n_ctx
    return replace(options, engine=replace(options.engine, **engine), n_ctx=n_ctx), setup


def _on_idle_cpus(engine: EngineOptions, idle: IdleCPUs, terminal: Terminal) -> EngineOptions:
    """The options with fewer threads, where other programs leave fewer CPUs and the user said nothing."""
    if engine.n_threads is not None:
        return engine
    n_idle, n_cpus = idle.count()
    if n_idle == n_cpus == (os.cpu_count() or 1):
        return engine  # the engine's own defaults
    if n_idle < n_cpus:
        threads = "1 thread is" if n_idle == 1 else f"{n_idle} threads are"
        terminal.note(f"other programs keep {n_cpus - n_idle} of {n_cpus} CPUs busy, so {threads} used; -t takes more")
    to_read = engine.n_threads_batch or n_idle
    return replace(engine, n_threads=min(n_idle, max(1, n_cpus // 2)), n_threads_batch=to_read)
