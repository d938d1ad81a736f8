"""The engine as a benchmark needs it: one model, contexts made from it, tokens that mean nothing, and clocks.

Drives llama.cpp's C interface directly, in batches of n_batch tokens as llama-bench does. A backend may work while
`llama_decode` has returned: clocks are read after `llama_synchronize`, and a prefill is synchronized only at its end.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as _c

from swaa_local.bench.results import BenchError, Setting, Size
from swaa_local.engine import log as engine_log
from swaa_local.engine import memory, model_meta, native, placement, process_memory
from swaa_local.engine.adapter import LoadedAdapter
from swaa_local.engine.interrupt import DeferInterrupt
from swaa_local.engine.kv_types import kv_type_id
from swaa_local.engine.limits import check_numbers
from swaa_local.engine.options import EngineOptions
from swaa_local.engine.schedule import apply_draft, apply_schedule, get_layers, get_schedule
from swaa_local.errors import DecodeError, ModelLoadError
from swaa_local.schedule.config import DRAFT_WINDOW
from swaa_local.schedule.variants import AssumedDrafts
from swaa_local.text.units import format_bytes

_FLASH_ATTN = {
    None: _c.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: _c.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: _c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class BenchModel:
    """A loaded model. Use as a context manager. Raises `ModelLoadError` with llama.cpp's reason.

    threads: as `Llama` takes them: half the CPUs to decode and all of them to prefill, where the user does not say.
    """

    def __init__(self, path: Path, engine: EngineOptions) -> None:
        check_numbers(asdict(engine) | engine.placement())
        self.path = path
        self._verbose = engine.verbose
        n_cpus = os.cpu_count() or 1
        self.n_threads = engine.n_threads or max(1, n_cpus // 2)
        self.n_threads_batch = engine.n_threads_batch or engine.n_threads or n_cpus
        with engine_log.captured(self._verbose) as log, DeferInterrupt() as shield:
            _c.llama_backend_init()
            said = engine.placement()
            placed = placement.Placement(
                engine.rpc_servers, engine.tensor_split, split_mode=said["split_mode"], verbose=self._verbose
            )
            self._devices = placed.devices
            self._free_device = self.free_device_bytes()  # devices are initialized here, and log that
            params = _c.llama_model_default_params()
            params.n_gpu_layers = engine.n_gpu_layers
            placed.fill(params)
            params.split_mode, params.main_gpu = said["split_mode"], said["main_gpu"]
            shares = (ctypes.c_float * _c.llama_max_devices())(*(engine.tensor_split or ()))
            if engine.tensor_split is not None:
                params.tensor_split = shares
            params.progress_callback = _c.llama_progress_callback(lambda _progress, _data: not shield.raises)
            self.model = _c.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ModelLoadError(f"{path}: {placement.advise(log.reason) or 'llama.cpp cannot load it'}")
        self.adapter: LoadedAdapter | None = None
        if engine.lora is not None:
            try:
                self.adapter = LoadedAdapter(self.model, engine.lora.path, engine.lora.scale, verbose=self._verbose)
            except BaseException:
                self.__exit__()
                raise
        self.layers = get_layers(self.model)
        self._is_recurrent = model_meta.is_recurrent(self.model)
        self.n_layer = self.layers.n_layer
        self.n_params = int(_c.llama_model_n_params(self.model))
        self.size_bytes = int(_c.llama_model_size(self.model))
        self.n_vocab = int(_c.llama_vocab_n_tokens(_c.llama_model_get_vocab(self.model)))
        self.n_embd = int(_c.llama_model_n_embd(self.model))
        has_device = self._devices or _c.llama_supports_gpu_offload()
        wanted = engine.n_gpu_layers if has_device and self._free_device is not None else 0
        self.n_gpu_layers = self.n_layer + 1 if wanted < 0 else min(wanted, self.n_layer + 1)
        self.file_schedule = get_schedule(self.model)
        self._draft_window = DRAFT_WINDOW if engine.draft_window is None else engine.draft_window
        self._n_open = 0
        self._base_host: int | None = None
        self._base_device: int | None = None

    def __enter__(self) -> BenchModel:
        return self

    def __exit__(self, *_exc: object) -> None:
        with engine_log.captured(self._verbose):
            if self.adapter is not None:
                self.adapter.free()
            _c.llama_model_free(self.model)

    def _params(self, setting: Setting, n_ctx: int) -> Any:
        params = _c.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = min(setting.n_batch, n_ctx)
        params.n_ubatch = min(setting.n_ubatch, n_ctx)
        params.n_threads = self.n_threads
        params.n_threads_batch = self.n_threads_batch
        params.flash_attn_type = _FLASH_ATTN[setting.flash_attn]
        params.type_k = kv_type_id(setting.type_k)
        params.type_v = kv_type_id(setting.type_v)
        params.swa_full = False  # as llama.cpp's own programs
        return params

    def check_drafts(self, variant: str) -> None:
        """Raise `BenchError` if the model cannot take back what this variant drafts."""
        if self._is_recurrent:
            raise BenchError(
                f"{variant!r} drafts, but the model has recurrent layers, whose state cannot take rejected drafts "
                "back; leave spec out"
            )

    def check_memory(self, setting: Setting, size: Size) -> None:
        """Raise `BenchError` if the KV cache alone is more than the free memory."""
        cost, n_ctx = self._cost(setting, size), setting.n_ctx(size)
        split = self.n_layer - cost.n_gpu_layers
        needed_host, needed_device = cost.kv(n_ctx, range(split)), cost.kv(n_ctx, range(split, self.n_layer))
        for needed, free, where in (
            (needed_host, self.free_host_bytes(), "memory"),
            (needed_device, self.free_device_bytes(), "the devices' memory" if self._devices else "GPU memory"),
        ):
            if free is not None and needed > free:
                raise BenchError(
                    f"{setting.variant} at {size} needs a KV cache of {format_bytes(needed)}, and {format_bytes(free)} "
                    f"of {where} are free; measure fewer tokens, or take a smaller cache: -ctk q8_0 -ctv q8_0"
                )

    def free_device_bytes(self) -> int | None:
        """Memory that is free on the GPUs, or on workers and GPUs together; None if they do not tell."""
        return memory.free_gpu_bytes(self._devices)

    def free_host_bytes(self) -> int | None:
        """Memory that contexts can take while the weights stay; None if the system does not tell."""
        on_host = self.size_bytes * (1 - min(1.0, self.n_gpu_layers / max(1, self.n_layer)))
        return memory.free_host_bytes(mapped=int(on_host))

    def needed_bytes(self, setting: Setting, size: Size) -> tuple[int, int]:
        """What a context takes about, on the host and on GPUs."""
        cost, n_ctx = self._cost(setting, size), setting.n_ctx(size)
        return cost.host(n_ctx), cost.gpu(n_ctx)

    def _cost(self, setting: Setting, size: Size) -> memory.ContextCost:
        return memory.context_cost(
            self.model,
            setting.active_schedule,
            self._params(setting, setting.n_ctx(size)),
            n_ubatch=setting.n_ubatch,
            n_gpu_layers=self.n_gpu_layers,
            logits_all=False,
        )

    @contextmanager
    def context(self, setting: Setting, n_ctx: int) -> Iterator[BenchContext]:
        """A context that is warm and empty. Raises `ModelLoadError` if it cannot be made, for lack of memory say."""
        if self._n_open == 0:
            self._base_host, self._base_device = process_memory.rss_bytes(), self.free_device_bytes()
        others_host = _difference(process_memory.rss_bytes(), self._base_host)
        others_device = _difference(self._base_device, self.free_device_bytes())
        can_tell = process_memory.reset_peak_rss()
        apply_schedule(self.model, setting.active_schedule, None, verbose=self._verbose)
        apply_draft(self.model, self._draft_window if setting.drafts else 0, verbose=self._verbose)
        params = self._params(setting, n_ctx)
        with DeferInterrupt(), engine_log.captured(self._verbose) as log:
            ctx = _c.llama_init_from_model(self.model, params)
        if not ctx:
            raise ModelLoadError(
                f"{setting.variant}: no context of {n_ctx} tokens: {log.reason or 'llama.cpp cannot make it'}; measure "
                "fewer tokens, or take a smaller cache or n_ubatch"
            )
        if self.adapter is not None:
            self.adapter.attach(ctx)
        self._n_open += 1
        batch = _c.llama_batch_init(int(params.n_batch), 0, 1)
        try:
            context = BenchContext(
                ctx, batch, int(params.n_batch), self.n_vocab, self._verbose, setting.active_schedule.active_tail
            )
            context.drafts = setting.drafts
            context.measure_peaks = lambda: (
                _difference(process_memory.peak_rss_bytes() if can_tell else None, others_host),
                _difference(_difference(self._free_device, self.free_device_bytes()), others_device),
            )
            context.warm_up(int(params.n_ubatch), n_ctx)
            yield context
        finally:
            self._n_open -= 1
            with engine_log.captured(self._verbose):
                _c.llama_batch_free(batch)
                _c.llama_free(ctx)


class BenchContext:
    """A context of one sequence, and the tokens in it. drafts: with which it decodes."""

    drafts: AssumedDrafts | None = None

    def __init__(self, ctx: Any, batch: Any, n_batch: int, n_vocab: int, verbose: bool, tail: int) -> None:
        self._ctx = ctx
        self._tail = tail
        self._batch = batch
        self._n_batch = n_batch
        self._n_vocab = n_vocab
        self._verbose = verbose
        self.n_past = 0
        self.measure_peaks: Callable[[], tuple[int | None, int | None]] = lambda: (None, None)
        self._token = np.ctypeslib.as_array(batch.token, shape=(n_batch,))
        self._pos = np.ctypeslib.as_array(batch.pos, shape=(n_batch,))
        self._logits = np.ctypeslib.as_array(batch.logits, shape=(n_batch,))
        # Any tokens do; the same for all, and different ones, so that a mixture's experts all have work.
        self._tokens = np.random.default_rng(0).integers(0, n_vocab, 1 << 16, dtype=np.int32)
        for i in range(n_batch):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0

    @property
    def kv_bytes(self) -> int:
        return int(native.llama_swaa_kv_bytes(self._ctx))

    @cached_property
    def peaks(self) -> tuple[int | None, int | None]:
        """(Peak of the process's resident memory, memory taken on GPUs) in bytes, up to when this is first asked for,
        and as if there were no other context."""
        return self.measure_peaks()

    def clear(self) -> None:
        """Empty the cache."""
        _c.llama_memory_clear(_c.llama_get_memory(self._ctx), False)
        self.n_past = 0

    def rewind(self, n_past: int) -> bool:
        """Drop what follows the first n_past tokens; False, with the cache emptied, if a ring has lost some of them."""
        if _c.llama_memory_seq_rm(_c.llama_get_memory(self._ctx), 0, n_past, -1):
            self.n_past = n_past
            return True
        self.clear()
        return False

    def warm_up(self, n_ubatch: int, n_ctx: int) -> None:
        """One ubatch and one decoded token, so that weights are read and kernels compiled; then empty again."""
        self.prefill(min(n_ubatch, n_ctx - 1))
        self.decode(1)
        self.clear()

    def prefill(
        self, n: int, *, prompt_end: int | None = None, on_tokens: Callable[[int], None] = lambda done: None
    ) -> float:
        """Seconds for n prompt tokens behind those in the cache, all work done. on_tokens: after each batch, with the
        tokens that were given to the engine. prompt_end: where the prompt ends if it goes on after them."""
        end = self.n_past + n if prompt_end is None else prompt_end
        native.llama_swaa_set_prompt_end(self._ctx, 0, max(self.n_past, end - self._tail))
        with self._run(abort=True) as go_on:
            started = time.perf_counter()
            for done in range(0, n, self._n_batch):
                part = min(self._n_batch, n - done)
                self._decode(part, last=done + part == n)
                on_tokens(done + part)
                if not go_on():
                    break
            _c.llama_synchronize(self._ctx)
            return time.perf_counter() - started

    def logits(self) -> np.ndarray[Any, Any]:
        """Of the token after the last one, shape (n_vocab,); valid until the next one is evaluated."""
        return np.ctypeslib.as_array(_c.llama_get_logits_ith(self._ctx, -1), shape=(self._n_vocab,))

    def first_token(self) -> int:
        """The likeliest token after the prompt, as greedy sampling takes it."""
        return int(self.logits().argmax())

    def decode(self, n: int) -> float:
        """Seconds for n tokens, one after the other, each of them done before the next."""
        native.llama_swaa_set_prompt_end(self._ctx, 0, self.n_past)
        end, chance = self.n_past + n, random.Random(0)
        with self._run(abort=False) as go_on:
            started = time.perf_counter()
            while self.n_past < end:
                if self.drafts:
                    self._decode_pass(self.drafts, end - self.n_past, chance)
                else:
                    self._decode(1, last=True)
                _c.llama_synchronize(self._ctx)
                if not go_on():
                    break
            return time.perf_counter() - started

    def _decode_pass(self, drafts: AssumedDrafts, most: int, chance: random.Random) -> None:
        """Draft, check, and keep what chance accepts and one more token, `most` in all. Tokens are not chosen."""
        first, n = self.n_past, min(drafts.n, most - 1)
        if n:
            native.llama_swaa_set_draft_start(self._ctx, 0, first)
            for _ in range(n):
                self._decode(1, last=True)
                _c.llama_synchronize(self._ctx)
            native.llama_swaa_set_draft_start(self._ctx, 0, -1)
            self._go_back(first)
        self._decode(n + 1, last=True, every=True)
        n_accepted = next((i for i in range(n) if chance.random() >= drafts.acceptance), n)
        self._go_back(first + n_accepted + 1)

    def _go_back(self, n_past: int) -> None:
        if n_past < self.n_past and not self.rewind(n_past):
            raise DecodeError("a ring has lost what drafts leave behind; take a larger -ub, or draft fewer tokens")

    @contextmanager
    def _run(self, *, abort: bool) -> Iterator[Callable[[], bool]]:
        """Ctrl-C stops what runs here, and is raised when it has stopped. Yields whether to go on.

        Raises `DecodeError` with the engine's reason.
        """
        with engine_log.captured(self._verbose) as log, DeferInterrupt(abort=self._ctx if abort else None) as shield:
            try:
                yield lambda: not shield.raises
            except DecodeError as error:
                if not shield.raises:
                    raise DecodeError(placement.lost_worker(self._ctx) or log.reason or str(error)) from None

    def _decode(self, n: int, *, last: bool, every: bool = False) -> None:
        """last: the logits of the last token are wanted. every: of all."""
        first = self.n_past
        positions = np.arange(first, first + n, dtype=np.int32)
        self._token[:n] = self._tokens[positions % len(self._tokens)]
        self._pos[:n] = positions
        self._logits[:n] = every
        self._logits[n - 1] = last
        self._batch.n_tokens = n
        code = _c.llama_decode(self._ctx, self._batch)
        if code != 0:
            raise DecodeError(f"llama_decode returned {code}")
        self.n_past += n


def _difference(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b
