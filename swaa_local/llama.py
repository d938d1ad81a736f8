"""`Llama`: `llama_cpp.Llama` with an attention schedule, phases, and defaults for long prompts.

Everything that takes a `llama_cpp.Llama` takes this one. Knows how upstream's class builds its model and context and
when its generator evaluates; the rules of schedules are in `config`, what memory allows in `context_length`.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as _c
from llama_cpp._internals import LlamaContext

from swaa_local import engine_log, memory, native
from swaa_local.config import Schedule, SWAAConfig, SWAAError, default_n_ubatch
from swaa_local.context_length import ContextFitWarning, fitting_n_ctx, wanted_gpu_layers
from swaa_local.engine_schedule import Wanted, apply_schedule, check_wanted, get_schedule
from swaa_local.errors import ContextFull, DecodeError, ModelLoadError, PromptTooLong, StateError, TextTooLong
from swaa_local.interrupt import Shield
from swaa_local.model_path import fetch_matching
from swaa_local.run_stats import RunClock, RunStats

__all__ = [
    "ContextFitWarning",
    "ContextFull",
    "DecodeError",
    "Llama",
    "ModelLoadError",
    "PromptTooLong",
    "RunStats",
    "StateError",
]

DEFAULT_N_BATCH = 2048


class _Path(str):
    """Upstream encodes a path as UTF-8, which not every file's name is."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` plus a schedule; keywords that are not listed here are upstream's.

    swaa: None takes the GGUF's schedule, False full attention, an `SWAAConfig` (or a resolved `Schedule`) overrides the
        GGUF's. `set_schedule` changes it.
    n_ctx: tokens. 0 or None: the model's own context, or the longest that the free memory holds (then a
        `ContextFitWarning` names both, and it is never below 4096). A given number is taken as it is.
    n_batch, n_ubatch: tokens of a `llama_decode` call and of its parts. Default 2048 (or n_ubatch) and
        `config.default_n_ubatch`.
    flash_attn: None leaves it to llama.cpp, as its own tools do.
    verbose: llama.cpp's log on stderr; off by default, unlike upstream.
    on_prefill: called with (tokens done, tokens to do) before the first and after each n_ubatch tokens of a prompt. It
        may raise to stop; what was evaluated stays in the cache. Not pickled.

    Raises `ModelLoadError` with llama.cpp's own reason, `ScheduleError` for a schedule that does not fit the model.
    """

    n_tokens: int
    input_ids: Any
    scores: Any
    _ctx: Any

    def __init__(
        self,
        model_path: str,
        *,
        swaa: Wanted = None,
        n_ctx: int | None = 0,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        flash_attn: bool | None = None,
        verbose: bool = False,
        on_prefill: Callable[[int, int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        check_wanted(swaa)
        for name in ("type_k", "type_v"):
            if kwargs.get(name) is not None and kwargs[name] not in memory.KV_TYPE_NAMES:
                known = ", ".join(f"{number} ({kind})" for number, kind in memory.KV_TYPE_NAMES.items())
                raise ModelLoadError(f"{name} is {kwargs[name]!r}, which is no KV cache type; known are {known}")
        self._swaa = swaa
        self._flash_attn = flash_attn
        if kwargs.get("vocab_only") and not n_ctx:
            n_ctx = 512  # a vocabulary has no context of its own, but upstream makes one of it
        self._fit_n_ctx = not n_ctx
        self.schedule: Schedule | None = None
        self.file_schedule: Schedule | None = None
        self.on_prefill = on_prefill
        self._prompt_end = 0
        self._clock: RunClock | None = None
        self._generating = False
        self._sampler_to_keep: Any = None
        if n_batch is None:
            n_batch = max(DEFAULT_N_BATCH, n_ubatch or 0)
        self._said_n_ubatch = n_batch if n_ubatch == 0 else n_ubatch  # 0 as in llama.cpp
        with Shield() as self._loading, engine_log.captured(verbose) as log:
            try:
                super().__init__(
                    _Path(model_path),
                    n_ctx=n_ctx or 0,
                    n_batch=n_batch,
                    n_ubatch=self._said_n_ubatch or n_batch,
                    flash_attn=bool(flash_attn),
                    verbose=verbose,
                    **kwargs,
                )
            except SWAAError:
                raise
            except (ValueError, RuntimeError) as error:
                raise ModelLoadError(f"{model_path}: {log.reason}" if log.reason else str(error)) from error
            except jinja2.TemplateError as error:  # upstream compiles the GGUF's chat templates
                raise ModelLoadError(f"{model_path}: the chat template is broken: {error}") from error
        self._model.__dict__.pop("n_ctx_train", None)
        # llama.cpp rounds a context up, upstream's buffers don't follow.
        if len(self.input_ids) < self._n_ctx:
            self.input_ids = np.zeros(self._n_ctx, dtype=np.intc)
        # Upstream keeps n_batch rows of logits that it never fills unless all are asked for.
        rows = self._n_ctx if self._logits_all else 1
        if self.scores.shape[0] != rows:
            self.scores = np.zeros((rows, self._n_vocab), dtype=np.single)

    # Upstream makes the parameters in its constructor; the progress callback is where loading can be stopped.

    @property
    def model_params(self) -> Any:
        return self.__dict__["model_params"]

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.__dict__["model_params"] = params
        loading = self._loading
        params.progress_callback = _c.llama_progress_callback(lambda _progress, _data: not loading.raises)

    # Between loading the model and creating the context, upstream assigns `_model`: the moment to set the schedule.

    @property
    def _model(self) -> Any:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        if not self.model_params.vocab_only:
            self.file_schedule = get_schedule(model.model)
            self.schedule = apply_schedule(model.model, self._swaa, self.file_schedule, verbose=self.verbose)
            self._choose_parameters()
            if self._fit_n_ctx:
                n_ctx = fitting_n_ctx(
                    model,
                    self.schedule,
                    self.context_params,
                    self.model_params,
                    n_ubatch=self.context_params.n_ubatch,
                    logits_all=self._logits_all,
                )
                # n_ctx=0 makes upstream ask the model for its context, right after this and only once.
                model.n_ctx_train = lambda: n_ctx

    def set_schedule(self, swaa: Wanted) -> None:
        """Change the schedule without loading the model again; `swaa` as in the constructor.

        The context is made anew, of the same length, and so is empty. Raises `ScheduleError`, with nothing changed, and
        `ModelLoadError` if the new context cannot be made; this object is closed then.
        """
        check_wanted(swaa)
        self._live_ctx()
        self.schedule = apply_schedule(self.model, swaa, self.file_schedule, verbose=self.verbose)
        self._swaa = swaa
        self._choose_parameters()
        self._ctx.close()  # first, so that there is never memory for two
        with Shield(), engine_log.captured(self.verbose) as log:
            try:
                self._ctx = LlamaContext(model=self._model, params=self.context_params, verbose=self.verbose)
                if self._lora_adapter is not None:
                    adapters = (_c.llama_adapter_lora_p_ctypes * 1)(self._lora_adapter)
                    scales = (ctypes.c_float * 1)(self.lora_scale)
                    if _c.llama_set_adapters_lora(self._ctx.ctx, adapters, 1, scales):
                        raise ValueError(f"the LoRA adapter {self.lora_path} cannot be set")
            except ValueError as error:
                self.close()
                raise ModelLoadError(f"{self.model_path}: {log.reason or error}") from error
        self.n_tokens, self._prompt_end, self._clock = 0, 0, None
        self._requires_eval = True

    def _choose_parameters(self) -> None:
        """What the user did not say and the schedule decides, among others."""
        params, on_gpu = self.context_params, wanted_gpu_layers(self.model_params) > 0
        schedule = self.schedule or Schedule.full(1)
        if self._flash_attn is None:
            params.flash_attn_type = _c.LLAMA_FLASH_ATTN_TYPE_AUTO
        if self._said_n_ubatch is None:
            params.n_ubatch = min(params.n_batch, default_n_ubatch(schedule, gpu=on_gpu))

    @property
    def swaa(self) -> SWAAConfig | None:
        """The active schedule in the paper's terms; None: full attention."""
        return self.schedule.config() if self.schedule else None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, by llama.cpp's own accounting."""
        return int(native.llama_swaa_kv_bytes(self._live_ctx()))

    @property
    def last_run(self) -> RunStats | None:
        """Figures of the last `generate`, and so of every completion; None before the first."""
        return self._clock.stats() if self._clock else None

    def _live_ctx(self) -> Any:
        ctx = self._ctx.ctx
        if ctx is None:
            raise SWAAError("this Llama is closed")
        return ctx

    def tokenize(self, *args: Any, **kwargs: Any) -> list[int]:
        """Upstream's `tokenize`, with which every completion begins."""
        self._live_ctx()
        return super().tokenize(*args, **kwargs)

    def eval(self, tokens: Sequence[int], decode: bool = False) -> None:
        """Evaluate tokens after those in the cache: prompt tokens, or generated ones if `decode`.

        If a ring has overwritten what the cache must still hold, everything is evaluated again.
        Raises `PromptTooLong` or `ContextFull`, with nothing evaluated, and `DecodeError`.
        """
        ctx = self._live_ctx()
        clock = self._clock if self._generating else None
        decode = decode or (clock is not None and clock.decoding)
        tokens = [int(token) for token in tokens]
        start = self.n_tokens
        if start + len(tokens) > self._n_ctx:
            raise ContextFull(self._n_ctx) if decode else PromptTooLong(start + len(tokens), self._n_ctx)
        prompt_end = min(self._prompt_end, start) if decode else start + len(tokens)
        if not self._ctx.kv_cache_seq_rm(-1, start, -1):
            tokens = [*self.input_ids[:start].tolist(), *tokens]
            self._forget()
        if clock and not decode:
            clock.cached_tokens = self.n_tokens
        self._prompt_end = prompt_end
        native.llama_swaa_set_prompt_end(ctx, 0, prompt_end)
        n_prompt = max(0, prompt_end - self.n_tokens)
        with engine_log.captured(self.verbose) as log:
            if prompt := tokens[:n_prompt]:
                # Steps of n_ubatch give the parts that llama.cpp would make of n_batch anyway.
                report = self.on_prefill or (lambda done, total: None)
                report(0, n_prompt)
                for done in self._evaluate(prompt, self.context_params.n_ubatch, log):
                    report(done, n_prompt)
            for _ in self._evaluate(tokens[n_prompt:], self.n_batch, log):
                pass

    def _evaluate(self, tokens: list[int], step: int, log: engine_log.EngineLog) -> Iterator[int]:
        """Evaluate in parts of `step` tokens, as llama.cpp divides a batch; yields the tokens done after each."""
        for first in range(0, len(tokens), self.n_batch):
            batch = tokens[first : first + self.n_batch]
            for begin in range(0, len(batch), step):
                part = batch[begin : begin + step]
                done = first + begin + len(part)
                self._decode(part, log, last=done == len(tokens))
                yield done

    def _decode(self, tokens: list[int], log: engine_log.EngineLog, *, last: bool) -> None:
        """One `llama_decode` call and its bookkeeping, which Ctrl-C does not divide."""
        n_past, n = self.n_tokens, len(tokens)
        self._batch.set_batch(batch=tokens, n_past=n_past, logits_all=self._logits_all)
        if not (last or self._logits_all or self.context_params.embeddings):
            self._batch.batch.logits[n - 1] = False
        with Shield(abort=self.ctx if n > 1 else None):
            code = _c.llama_decode(self.ctx, self._batch.batch)
            if code == 0:
                self.input_ids[n_past : n_past + n] = tokens
                if self._logits_all:
                    logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n * self._n_vocab,))
                    self.scores[n_past : n_past + n] = logits.reshape(n, self._n_vocab)
                self.n_tokens = n_past + n
                self._requires_eval = False
            else:
                self._requires_eval = True
                if not self._ctx.kv_cache_seq_rm(-1, n_past, -1):
                    self._forget()
        if code != 0:
            raise DecodeError(log.reason or f"llama_decode returned {code}")

    def _forget(self) -> None:
        self._ctx.kv_cache_seq_rm(-1, 0, -1)
        self.n_tokens = 0
        self._requires_eval = True

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """Upstream's `generate`, same arguments: the prompt is evaluated as prefill, all that follows as decode.

        Tokens given to `send()` are appended after the token just yielded, and count as generated.
        """
        arguments = inspect.signature(super().generate).bind(list(tokens), *args, **kwargs)
        clock = RunClock(len(arguments.arguments["tokens"]))
        upstream = super().generate(*arguments.args, **arguments.kwargs)
        n_before = None  # tokens before the one just yielded
        while True:
            self._clock, self._generating = clock, True
            started = time.perf_counter()
            try:
                token = next(upstream)
            except StopIteration:
                return
            finally:
                clock.add_time(time.perf_counter() - started)
                self._generating = False
                self._sampler_to_keep = None
            clock.generated_tokens += 1
            n_before = self.n_tokens if n_before is None else n_before + 1
            sent = yield token
            if not sent:
                continue
            # Upstream takes sent tokens for a draft and samples over them: start it anew behind them, with its sampler.
            self._sampler_to_keep = self._sampler
            self.n_tokens, n_before = n_before, None
            arguments.arguments.update(tokens=[token, *sent], reset=False)
            upstream = super().generate(*arguments.args, **arguments.kwargs)

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self._sampler_to_keep or super()._init_sampler(*args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            # Upstream counts the prompt itself, before generate() sees it.
            counts = re.match(r"Requested tokens \((\d+)\) exceed context window", str(error))
            if counts and not isinstance(error, SWAAError):
                raise PromptTooLong(int(counts[1]), self._n_ctx) from None
            raise

    def embed(self, input: str | list[str], normalize: bool = False, truncate: bool = False, **kwargs: Any) -> Any:
        """Upstream's `embed`; all tokens are prompt. A text is cut to n_batch tokens only if `truncate` asks for it."""
        # A text comes in one batch, so that the automatic phase is right; a prompt end left by `eval` is not.
        native.llama_swaa_set_prompt_end(self._live_ctx(), 0, -1)
        try:
            return super().embed(input, normalize, truncate, **kwargs)
        except ValueError as error:
            counts = re.match(r"Requested tokens \((\d+)\) exceed batch size", str(error))
            if counts:
                raise TextTooLong(int(counts[1]), self.n_batch) from None
            raise

    def save_state(self) -> Any:
        """Upstream's `save_state`; the state also knows where the prompt ended."""
        self._live_ctx()
        state = super().save_state()
        state.swaa_prompt_end = self._prompt_end
        return state

    def load_state(self, state: Any) -> None:
        """Restore a saved state. Raises `StateError`, with the context emptied, if it does not fit."""
        ctx = self._live_ctx()
        if state.n_tokens > self._n_ctx:
            raise StateError(f"the state holds {state.n_tokens} tokens but the context is {self._n_ctx}")
        data = (ctypes.c_uint8 * state.llama_state_size).from_buffer_copy(state.llama_state)
        with Shield(), engine_log.captured(self.verbose) as log:
            read = _c.llama_state_set_data(ctx, data, state.llama_state_size)
        if read != state.llama_state_size:
            self._forget()
            raise StateError(f"cannot restore the state: {log.reason or 'it is of another model or context'}")
        self.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.n_tokens = state.n_tokens
        self._prompt_end = getattr(state, "swaa_prompt_end", state.n_tokens)
        self._requires_eval = True
        self._seed = state.seed
        if self._logits_all:
            kept = min(state.n_tokens, len(state.scores))
            self.scores[:kept] = state.scores[:kept]

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str,
        additional_files: Sequence[str] | None = None,
        local_dir: str | Path | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> Llama:
        """Upstream's, for current releases of huggingface-hub, which no longer take `local_dir_use_symlinks`.

        filename, additional_files: names or glob patterns, each of exactly one file of the hub repository.
        """
        patterns = [filename, *(additional_files or ())]
        return cls(str(fetch_matching(repo_id, patterns, local_dir=local_dir, cache_dir=cache_dir)), **kwargs)

    def close(self) -> None:
        """Free the model and the context; also after a failed construction."""
        if stack := self.__dict__.get("_stack"):
            stack.close()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"swaa": self._swaa, "flash_attn": self._flash_attn}
