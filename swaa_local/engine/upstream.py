"""What a `Llama` is before it evaluates anything: loaded as the user and the schedule want it, guarded, and closed.

Knows how upstream's class builds its model and context. With `upstream_adapter`, `upstream_cells`, `upstream_facts` and
`upstream_steps` it is the one place that uses what that class keeps for itself: `RELIED_ON`, to be looked at when
upstream moves. What is evaluated, and in which phase, `llama` knows.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from llama_cpp import llama_cpp as _c
from llama_cpp._internals import LlamaContext

from swaa_local.engine import crash, native, placement, vocabulary
from swaa_local.engine import log as engine_log
from swaa_local.engine.callbacks import Callbacks
from swaa_local.engine.context_length import check_memory, choose_n_ctx, gpu_layers
from swaa_local.engine.draft_control import Speculate, check_speculate
from swaa_local.engine.guard import Guard
from swaa_local.engine.interrupt import DeferInterrupt
from swaa_local.engine.kv_types import KV_TYPE_NAMES
from swaa_local.engine.limits import check_numbers
from swaa_local.engine.message_form import FormedFormatter
from swaa_local.engine.no_gpu import NoGPUWarning, without_gpu
from swaa_local.engine.schedule import (
    ScheduleArgument,
    apply_draft,
    apply_schedule,
    check_schedule_argument,
    get_layers,
    get_schedule,
    resolve_schedule,
)
from swaa_local.engine.upstream_adapter import AdaptedLlama
from swaa_local.engine.upstream_cells import HoldingLlama
from swaa_local.engine.upstream_steps import SteppingLlama
from swaa_local.engine.workers import WorkerAddress
from swaa_local.errors import GGUFError, ModelLoadError, OutOfRange, SWAAError
from swaa_local.model_file.check import check_gguf
from swaa_local.schedule.config import DEFAULT_N_BATCH, DRAFT_WINDOW, LayerMode, Schedule, SWAAConfig, default_n_ubatch
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.sources.find import fetch_matching

_NO_TEMPLATE = "llama-2"  # upstream's format where the GGUF has no template
_ALL_LAYERS = 0x7FFFFFFF  # upstream's for an n_gpu_layers of -1
_VOCAB_N_CTX = 512  # a vocabulary has no context of its own, but upstream makes one of it

RELIED_ON = {
    "_model": "assigned between loading and the context: the moment to set the schedule; the way to the engine",
    "_ctx": "the context, wrapped; assigned once by the constructor; takes cells back",
    "_batch": "the one llama_batch that is filled for each llama_decode",
    "_stack": "what close() frees, in turn",
    "_n_ctx": "tokens of the context, as it was made",
    "_n_vocab": "tokens of the vocabulary",
    "_logits_all": "whether logits of all positions are kept, which drafts turn on",
    "_requires_eval": "whether a prompt that is in the cache must be evaluated again for its logits",
    "_sampler": "of the generation that runs",
    "_seed": "of the next sampler",
    "_chat_handlers": "handlers by format, made of the GGUF's templates",
    "_lora_adapter": "freed by close()",
    "_init_sampler": "overridden: makes the sampler of a generation",
    "_create_completion": "overridden: counts the prompt before generate() sees it",
}
"""What we use of `llama_cpp.Llama` (llama_cpp/llama.py of the pinned version) that is not public, and what for."""

Self = TypeVar("Self", bound="LoadedLlama")


class _Path(str):
    """Upstream encodes a path as UTF-8, which not every file's name is."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


class LoadedLlama(SteppingLlama, HoldingLlama, AdaptedLlama):
    """`llama_cpp.Llama` with a schedule; keywords and errors are described in `llama.Llama`."""

    n_tokens: int
    input_ids: Any
    scores: Any

    def __init__(
        self,
        model_path: str,
        *,
        swaa: ScheduleArgument = None,
        n_ctx: int | None = 0,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        flash_attn: bool | None = None,
        verbose: bool = False,
        on_prefill: Callable[[int, int], None] | None = None,
        speculate: Speculate = "auto",
        draft_window: int | None = None,
        lora_path: str | None = None,
        rpc_servers: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        check_schedule_argument(swaa)
        self.rpc_servers = tuple(rpc_servers)
        if rpc_servers:
            kwargs.setdefault("n_gpu_layers", -1)
        self.speculate = check_speculate(speculate)
        sizes = {"n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_ubatch, "draft_window": draft_window}
        check_numbers({**sizes, **kwargs})
        try:
            check_gguf(model_path)
        except GGUFError as error:
            raise ModelLoadError(str(error)) from error
        for name in ("type_k", "type_v"):
            if kwargs.get(name) is not None and kwargs[name] not in KV_TYPE_NAMES:
                known = ", ".join(f"{number} ({kind})" for number, kind in KV_TYPE_NAMES.items())
                raise ModelLoadError(f"{name} is {kwargs[name]!r}, which is no KV cache type; known are {known}")
        self._guard = Guard()
        self._callbacks = Callbacks(self._guard)
        self._requests = threading.local()
        self._swaa = swaa
        self._flash_attn = flash_attn
        self._requested_n_ctx = n_ctx or 0
        self._requested_draft_window = draft_window
        self._requested_swa_full = kwargs.get("swa_full")
        self._has_draft_model = kwargs.get("draft_model") is not None
        self.draft_window = 0
        self._requested_n_ubatch = n_ubatch
        self._requested_n_batch = n_batch or max(DEFAULT_N_BATCH, n_ubatch or 0)
        self._adapter_path = lora_path
        self.model_layers = ModelLayers.of(1)
        self.schedule: Schedule | None = None
        self.file_schedule: Schedule | None = None
        self.on_prefill = on_prefill
        with ExitStack() as undo:
            undo.callback(self.close)
            loading = crash.step(f"loading {Path(model_path).name}")
            with loading, DeferInterrupt() as self._loading, engine_log.captured(verbose) as log:
                try:
                    workers = WorkerAddress.parse_list(",".join(self.rpc_servers)) if self.rpc_servers else ()
                    self._placement = placement.Placement(
                        workers,
                        kwargs.get("tensor_split"),
                        split_mode=kwargs.get("split_mode", _c.LLAMA_SPLIT_MODE_LAYER),
                        verbose=verbose,
                    )
                    # Upstream would choose the sizes before it knows the model; `_model` does. 1 costs nothing.
                    sizes = {"n_ctx": 1, "n_batch": 1, "n_ubatch": 1}
                    super().__init__(_Path(model_path), flash_attn=bool(flash_attn), verbose=verbose, **sizes, **kwargs)
                    self._attach_adapter()
                    self._form_chats()
                    self.input_ids = np.zeros(self._n_ctx, dtype=np.intc)
                    self.scores = np.zeros((self._n_ctx if self._logits_all else 1, self._n_vocab), dtype=np.single)
                except SWAAError:
                    raise
                except (ValueError, RuntimeError, MemoryError) as error:
                    reason = placement.advise(log.reason)
                    raise ModelLoadError(f"{model_path}: {reason}" if reason else str(error)) from error
                except jinja2.TemplateError as error:  # upstream compiles the GGUF's chat templates
                    raise ModelLoadError(f"{model_path}: the chat template is broken: {error}") from error
            undo.pop_all()
        if kwargs.get("tokenizer") is None:
            self.tokenizer_ = self.tokenizer()

    # Upstream makes the parameters in its constructor; the progress callback is where loading can be stopped.

    @property
    def model_params(self) -> Any:
        return self.__dict__["model_params"]

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.__dict__["model_params"] = params
        self._placement.fill(params)
        loading = self._loading
        params.progress_callback = _c.llama_progress_callback(lambda _progress, _data: not loading.raises)

    # Between loading the model and creating the context, upstream assigns `_model`: the moment to set the schedule. All
    # of upstream's methods come to the engine through `_model` and `_ctx`.

    @property
    def _model(self) -> Any:
        self._guard.check_open()
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        model.tokenize = functools.partial(vocabulary.tokenize, model.vocab)
        params = self.context_params
        params.n_batch = self._requested_n_batch
        if self.model_params.vocab_only:
            params.n_ctx = self._requested_n_ctx or _VOCAB_N_CTX
        else:
            self.model_layers = get_layers(model.model)
            self.file_schedule = get_schedule(model.model)
            self.schedule = apply_schedule(model.model, self._swaa, self.file_schedule, verbose=self.verbose)
            self._choose_parameters()
            self._choose_drafts()
            self._choose_own_cells()
            self._warn_without_gpu()
            params.n_ctx = choose_n_ctx(
                model, self._requested_n_ctx, self.schedule, params, self.model_params, logits_all=self._logits_all
            )
        self.n_batch = params.n_batch = min(params.n_batch, params.n_ctx)
        self._choose_parameters()
        self._load_adapter()

    @property
    def _ctx(self) -> Any:
        self._guard.check_open()
        return self.__dict__["_ctx"]

    @_ctx.setter
    def _ctx(self, ctx: Any) -> None:
        self.__dict__["_ctx"] = ctx

    def _replace_tail(self, swaa: ScheduleArgument) -> bool:
        """Take another tail and keep the context, if that is all that the schedule would change."""
        wanted = resolve_schedule(self.model, swaa, self.file_schedule)
        if self.schedule in (None, wanted) or not wanted.has_cells_of(self.schedule):
            return False
        self.schedule = apply_schedule(self.model, wanted, self.file_schedule, verbose=self.verbose)
        self._swaa = swaa
        return True

    def _replace_context(self, swaa: ScheduleArgument) -> None:
        """Another schedule on the same weights, and an empty context for it; errors as of `Llama.set_schedule`."""
        self.schedule = apply_schedule(self.model, swaa, self.file_schedule, verbose=self.verbose)
        self._swaa = swaa
        self._choose_parameters()
        self._choose_drafts()
        self._choose_own_cells()
        self._ctx.close()  # first, so that there is never memory for two
        with crash.step("making a context"), DeferInterrupt(), engine_log.captured(self.verbose) as log:
            try:
                check_memory(self._model, self._n_ctx, self.schedule, self.context_params, self.model_params)
                self._ctx = LlamaContext(model=self._model, params=self.context_params, verbose=self.verbose)
                self._attach_adapter()
            except SWAAError:
                self.close()
                raise
            except ValueError as error:
                self.close()
                raise ModelLoadError(f"{self.model_path}: {log.reason or error}") from error

    def _choose_parameters(self) -> None:
        """Defaults that depend on the schedule, where the user chose nothing."""
        params, on_gpu = self.context_params, gpu_layers(self.model_params.n_gpu_layers) > 0
        if self._flash_attn is None:
            params.flash_attn_type = _c.LLAMA_FLASH_ATTN_TYPE_AUTO
        n_ubatch = self._requested_n_ubatch
        if n_ubatch is None:
            n_ubatch = default_n_ubatch(self.schedule or Schedule.full(1), gpu=on_gpu)
        params.n_ubatch = min(params.n_batch, n_ubatch or params.n_batch)  # 0 as in llama.cpp

    def _choose_drafts(self) -> None:
        """What drafts see in the next context, where the user chose nothing: they pay where a window is at hand."""
        self.draft_window = self._requested_draft_window or 0
        self._check_drafts(self.speculate)
        reads_windowed = self.schedule is not None and LayerMode.PREFILL in self.schedule.layer_modes
        if self._requested_draft_window is None and reads_windowed and not self.is_recurrent:
            self.draft_window = DRAFT_WINDOW
        apply_draft(self._model.model, self.draft_window, verbose=self.verbose)

    def _choose_own_cells(self) -> None:
        """Whether windows of the model's own keep the cells that they have left behind, where the user chose nothing:
        not beside a schedule, which is there to be fast and small."""
        if self._requested_swa_full is None:
            self.context_params.swa_full = self.schedule is None and self.draft_window == 0

    def _check_drafts(self, speculate: Speculate | None) -> None:
        """Raise `OutOfRange` if this asks for drafts that the model could not take back."""
        if not self.is_recurrent:
            return
        if speculate is True or self._has_draft_model:
            asked = "draft_model is given" if self._has_draft_model else "speculate is True"
            raise OutOfRange(
                f"{asked}, but the model has recurrent layers, whose state cannot take rejected drafts back; "
                'leave it out, or pass speculate="auto" (--speculate auto), which drafts nothing here'
            )

    def _warn_without_gpu(self) -> None:
        asked = self.model_params.n_gpu_layers
        n_gpu_layers = -1 if asked == _ALL_LAYERS else asked
        if not self.rpc_servers and (said := without_gpu(n_gpu_layers, option="n_gpu_layers")):
            warnings.warn(said, NoGPUWarning, stacklevel=5)

    def _form_chats(self) -> None:
        """Make upstream's handlers of the GGUF's templates give contents as each takes them. A blank one is none."""
        for name in list(self._chat_handlers):
            source = self.metadata["tokenizer." + name.removesuffix(".default")]
            if source.strip():
                self._chat_handlers[name] = FormedFormatter.of_model(self, source).to_chat_handler()
            else:
                del self._chat_handlers[name]
                if self.chat_format == name:
                    self.chat_format: str | None = _NO_TEMPLATE

    @property
    def swaa(self) -> SWAAConfig | None:
        """The active schedule in the paper's terms; None: full attention."""
        return self.schedule.config() if self.schedule else None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, by llama.cpp's own accounting."""
        with self._guard.look():
            return int(native.llama_swaa_kv_bytes(self.ctx))

    @property
    def layers_in_words(self) -> str:
        """Where the layers are: `layers 0-13 on 192.168.1.5:50052, 14-27 on this CPU`."""
        with self._guard.look():
            return placement.in_words(placement.layer_devices(self.model)[:-1])

    @classmethod
    def from_pretrained(
        cls: type[Self],
        repo_id: str,
        filename: str,
        additional_files: Sequence[str] | None = None,
        local_dir: str | Path | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Upstream's, for current releases of huggingface-hub, which no longer take `local_dir_use_symlinks`.

        filename, additional_files: names or glob patterns, each of exactly one file of the hub repository.
        """
        patterns = [filename, *(additional_files or ())]
        return cls(str(fetch_matching(repo_id, patterns, local_dir=local_dir, cache_dir=cache_dir)), **kwargs)

    def close(self) -> None:
        """Free the model and the context; also after a failed construction.

        A call that still runs, in another thread or around this one, raises `ClosedError` at its next step; then they
        are freed.
        """
        guard, stack = self.__dict__.get("_guard"), self.__dict__.get("_stack")
        if guard is not None and stack is not None:
            guard.close(stack.close)

    def __getstate__(self) -> dict[str, Any]:
        # Upstream's is of the sizes that were chosen, and they suit the schedule.
        said = {
            "swaa": self._swaa,
            "flash_attn": self._flash_attn,
            "n_ubatch": self._requested_n_ubatch,
            "speculate": self.speculate,
            "draft_window": self._requested_draft_window,
            "swa_full": self._requested_swa_full,
            "rpc_servers": self.rpc_servers,
        }
        return super().__getstate__() | said
