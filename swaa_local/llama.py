"""`Llama`: `llama_cpp.Llama` with an attention schedule, phases, and defaults for long prompts.

Everything that takes a `llama_cpp.Llama` takes this one. Knows when upstream's generator evaluates, and so which tokens
are prompt and which are generated; how the model is loaded, `engine.upstream` knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as _c

from swaa_local.engine import crash, native, placement
from swaa_local.engine import log as engine_log
from swaa_local.engine.adapter import AdapterWarning
from swaa_local.engine.answer_score import AnswerScore, token_scores
from swaa_local.engine.context_length import ContextFitWarning, TrainedLengthWarning
from swaa_local.engine.draft_control import Costs, Speculate
from swaa_local.engine.generating import GeneratingLlama
from swaa_local.engine.interrupt import DeferInterrupt
from swaa_local.engine.message_form import Form, in_form
from swaa_local.engine.no_gpu import NoGPUWarning
from swaa_local.engine.run_stats import RunStats
from swaa_local.engine.schedule import ScheduleArgument, check_schedule_argument
from swaa_local.errors import (
    BusyError,
    ClosedError,
    ContextChanged,
    ContextFull,
    ContextTooLarge,
    DecodeError,
    ModelLoadError,
    PromptTooLong,
    StateError,
    TemplateError,
    TextTooLong,
)

__all__ = [
    "AdapterWarning",
    "AnswerScore",
    "BusyError",
    "ClosedError",
    "ContextChanged",
    "ContextFitWarning",
    "ContextFull",
    "ContextTooLarge",
    "DecodeError",
    "Llama",
    "ModelLoadError",
    "NoGPUWarning",
    "PromptTooLong",
    "RunStats",
    "StateError",
    "TemplateError",
    "TrainedLengthWarning",
]

_SCORED_AT_ONCE = 64
"""Tokens of an answer whose logits, a row of the vocabulary's length each, are held at a time."""


class Llama(GeneratingLlama):
    """`llama_cpp.Llama` plus a schedule; keywords that are not listed here are upstream's.

    swaa: None takes the GGUF's schedule, False full attention, an `SWAAConfig` (or a resolved `Schedule`) overrides the
        GGUF's. `set_schedule` changes it.
    n_ctx: tokens. 0 or None: the model's own context, or the longest that the free memory holds (then a
        `ContextFitWarning` names both, and it is never below 4096). A given number is taken as it is, with a
        `TrainedLengthWarning` if it is more than the model was trained on.
    n_batch, n_ubatch: tokens of a `llama_decode` call and of its parts. Default 2048 (or n_ubatch) and
        `config.default_n_ubatch`.
    flash_attn: None leaves it to llama.cpp, as its own tools do.
    n_gpu_layers: where there is no GPU for them, a `NoGPUWarning` says so and why, and they are on the CPU.
    verbose: llama.cpp's log on stderr; off by default, unlike upstream.
    lora_path, lora_scale: a LoRA adapter in GGUF and the factor of what it adds. An `AdapterWarning` names both, where
        it was tuned on another model or for another schedule.
    rpc_servers: addresses of workers, HOST:PORT, that hold and compute layers, all of them or the last n_gpu_layers;
        see docs/worker.md.
    tensor_split: shares of the layers, the workers' in their order, then those of this machine's GPUs; None: by free
        memory.
    on_prefill: called with (tokens done, tokens to do) before the first and after each n_ubatch tokens of a prompt. It
        may raise to stop; what was evaluated stays in the cache. Not pickled.
    speculate: whether generated tokens are drafted and then checked several at once: "auto" (the default) where it is
        measured to pay, True wherever there is something to draft, or False. A keyword of every generating method,
        too, and then for that call. The text is the one that there is without, for every sampler and seed: to the bit
        on x86 CPUs with flash attention and most quantized weights, and elsewhere as far as rounding that differs with
        the size of a batch does not tip a close choice. See docs/speculate.md.
    draft_window: tokens that drafts see, in every layer that keeps the whole text. Default 512 with a schedule that has
        layers windowed while prefilling, else 0: nothing is drafted but what the text repeats.

    Raises `ModelLoadError` with llama.cpp's own reason, `ContextTooLarge` for a given n_ctx that the memory cannot
    hold, `WorkerError` for a worker that cannot be used, `OutOfRange`, and `ScheduleError` for a schedule that does not
    fit the model.

    One thread at a time: a call while another thread's runs raises `BusyError`, and so does a callback that would
    change the context. After `close()`, what needs the engine raises `ClosedError`. See `guard`.
    """

    def set_schedule(self, swaa: ScheduleArgument) -> None:
        """Change the schedule without loading the model again; `swaa` as in the constructor.

        The context is made anew, of the same length, and so is empty, unless only the tail changes. Raises
        `ScheduleError`, with nothing changed, and `ModelLoadError` if the new context cannot be made; this object is
        closed then.
        """
        check_schedule_argument(swaa)
        with self._guard.step(), DeferInterrupt():
            if not self._replace_tail(swaa):
                self._replace_context(swaa)
                self._forget(cells=False)
                self._prompt_end, self._clock = 0, None
                self._costs = Costs()
            self._warn_of_adapter(stacklevel=3)

    def reset(self) -> None:
        """Upstream's `reset`: start over, but reuse what the next prompt has in common with the cache."""
        with self._guard.step():
            super().reset()
            self._forget(cells=False)

    def eval(self, tokens: Sequence[int], decode: bool = False, *, ends_prompt: bool = True) -> None:
        """Evaluate tokens after those in the cache: prompt tokens, or generated ones if `decode`.

        ends_prompt: the last of these tokens are the last of the prompt, and so its tail; False for a piece that is not
        the last. If a ring has overwritten what the cache must still hold, everything is evaluated again.
        Raises `PromptTooLong` or `ContextFull`, with nothing evaluated, and `DecodeError`.
        """
        with self._guard.step():
            self._eval([int(token) for token in tokens], decode, ends_prompt)

    def _tail_of_prompt(self) -> int:
        """Tokens that the next prompt ends with and that read all of it."""
        if self.schedule is None:
            return 0
        own = self._prompt_tail if self._generating else None
        schedule = self.schedule if own is None else replace(self.schedule, tail=own)
        return schedule.active_tail

    def _eval(self, tokens: list[int], decode: bool, ends_prompt: bool) -> None:
        clock = self._clock if self._generating else None
        decode = decode or (clock is not None and clock.decoding)
        start, n_ctx = self.n_tokens, self.n_ctx()
        end = start + len(tokens)
        if end > n_ctx:
            raise ContextFull(n_ctx) if decode else PromptTooLong(end, n_ctx)
        self._check_tokens(tokens)
        self._changes += 1
        control = self._control if clock and clock.decoding and len(tokens) == 1 else None
        if self._take_ahead(tokens, control):
            return
        kept = self._go_back(start)
        if kept < start:
            tokens = [*self.input_ids[kept:start].tolist(), *tokens]
        if clock and not decode:
            clock.cached_tokens = self.n_tokens
        if decode:
            prompt_end = min(self._prompt_end, start)
        else:
            # What is in the cache was read before, and is not read again for the tail.
            tail = self._tail_of_prompt() if ends_prompt else 0
            prompt_end = max(self.n_tokens, end - tail)
        self._prompt_end = prompt_end
        native.llama_swaa_set_prompt_end(self.ctx, 0, prompt_end)
        n_windowed = max(0, prompt_end - self.n_tokens)
        n_prompt = n_windowed if decode else len(tokens)
        doing = f"reading a prompt of {n_prompt} tokens" if n_prompt else "generating"
        if self.prefixes:
            self.prefixes.begin_read(self.n_tokens)
        with crash.step(doing), engine_log.captured(self.verbose) as log:
            if n_prompt:
                # Steps of n_ubatch give the parts that llama.cpp would make of n_batch anyway.
                report = self.on_prefill or (lambda done, total: None)
                report(0, n_prompt)
                ends = self._ends_of_parts(n_windowed)
                for done in self._evaluate(tokens[:n_prompt], self.context_params.n_ubatch, ends, log):
                    report(done, n_prompt)
            if clock and clock.decoding:
                clock.passes += 1
            if control and len(tokens) == 1:
                self._decode_ahead(tokens[0], control, log)
                return
            for _ in self._evaluate(tokens[n_prompt:], self.n_batch, [], log):
                pass

    def score(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        *,
        reuse: bool = False,
        temperatures: Sequence[float] = (1.0,),
    ) -> AnswerScore:
        """How likely the answer's tokens are behind the prompt, each after the ones before it (teacher-forced).

        The prompt is read as a whole prompt is, tail included, and the answer as if it were generated; logits are
        computed for the answer alone. reuse: keep what the cache has of the prompt, up to where its tail begins, so
        that many questions about one text cost one reading; the score is that of a cold reading. Raises
        `PromptTooLong`, with nothing evaluated, and `DecodeError`, also for an empty prompt or answer.
        """
        prompt, answer = [int(token) for token in prompt], [int(token) for token in answer]
        with self._guard.step():
            if not prompt or not answer:
                raise DecodeError(f"nothing to score: {len(prompt)} tokens of prompt and {len(answer)} of answer")
            if len(prompt) + len(answer) > self.n_ctx():
                raise PromptTooLong(len(prompt) + len(answer), self.n_ctx())
            self._check_tokens([*prompt, *answer])
            kept = self._common_prefill(prompt) if reuse else 0
            if kept:
                self._go_back(kept)
            else:
                self._forget()
            self._eval(prompt[self.n_tokens :], decode=False, ends_prompt=True)
            scores = [token_scores(self.ctx, -1, answer[:1], self.n_vocab(), temperatures)]
            with crash.step("scoring an answer"), engine_log.captured(self.verbose) as log:
                done = 0
                for end in self._evaluate(answer[:-1], min(_SCORED_AT_ONCE, self.n_batch), [], log, all_logits=True):
                    scores.append(token_scores(self.ctx, 0, answer[done + 1 : end + 1], self.n_vocab(), temperatures))
                    done = end
            return AnswerScore.joined(scores)

    def synchronize(self) -> None:
        """Wait for the device: it may still work when `eval` has returned, which matters to whoever reads a clock."""
        with self._guard.look():
            _c.llama_synchronize(self.ctx)

    def _check_tokens(self, tokens: list[int]) -> None:
        n_vocab = self.n_vocab()
        if tokens and not (min(tokens) >= 0 and max(tokens) < n_vocab):
            wrong = next(token for token in tokens if not 0 <= token < n_vocab)
            raise DecodeError(f"invalid token {wrong}; the vocabulary has {n_vocab}")

    def _common_prefill(self, prompt: list[int]) -> int:
        """Tokens of this prompt that are in the cache and were read as it would read them: before its tail."""
        most = min(self.n_tokens, self._prompt_end, len(prompt) - max(1, self._tail_of_prompt()))
        if most <= 0:
            return 0
        differing = np.flatnonzero(self.input_ids[:most] != np.array(prompt[:most]))
        return int(differing[0]) if len(differing) else most

    def _ends_of_parts(self, n_windowed: int) -> list[int]:
        """Where parts of the next tokens must end: at the ends of documents, and where the phase changes."""
        start = self.n_tokens
        return [end - start for end in self._document_ends if start < end < start + n_windowed] + [n_windowed]

    def _evaluate(
        self,
        tokens: list[int],
        step: int,
        ends: list[int],
        log: engine_log.EngineLog,
        *,
        all_logits: bool = False,
    ) -> Iterator[int]:
        """Evaluate in parts of `step` tokens, as llama.cpp divides a batch; yields the tokens done after each.

        ends: numbers of tokens, rising, after which a part ends too. all_logits: have those of every token of the part,
        and not only of the last token of all.
        """
        bounds = [0]
        for first, last in pairwise([0, *ends, len(tokens)]):
            for batch in range(first, last, self.n_batch):
                for begin in range(batch, min(batch + self.n_batch, last), step):
                    bounds.append(min(begin + step, batch + self.n_batch, last))
        # What the next prompt has in common with this one ends at a document, or near its end. And who stops goes on.
        often = bounds[:: max(1, self.n_batch // step)]
        worth_keeping = {*ends, *often, *bounds[-3:-1]} - {0, len(tokens)} if self.is_recurrent else set()
        for begin, done in pairwise(bounds):
            n_logits = done - begin if all_logits else int(done == len(tokens))
            self._decode(tokens[begin:done], log, n_logits)
            if done in worth_keeping:
                self._checkpoints.keep(self.ctx, self.n_tokens)
            if self.prefixes:
                keeping_s = self.prefixes.has_read(self._prompt_end)
                if self._clock and self._generating:
                    self._clock.add_time(-keeping_s)  # it is no time of reading
            yield done

    def _decode(self, tokens: list[int], log: engine_log.EngineLog, n_logits: int, n_ahead: int = 0) -> None:
        """One `llama_decode` call and its bookkeeping, which Ctrl-C does not divide. n_logits: 0, 1 or all of them.

        n_ahead: so many of the last tokens are not in the context yet, though they have cells and logits.
        """
        n_past, n = self.n_tokens, len(tokens)
        batch = self._make_batch(tokens, n_past, n_logits)
        with DeferInterrupt(abort=self.ctx if n > n_ahead + 1 else None):
            code = _c.llama_decode(self.ctx, batch)
            self._n_logits = (n if self.has_all_logits else n_logits) - n_ahead
            self._rows_ahead = n_ahead
            if code == 0:
                self.input_ids[n_past : n_past + n] = tokens
                if self.has_all_logits:
                    logits = np.ctypeslib.as_array(_c.llama_get_logits(self.ctx), shape=(n * self.n_vocab(),))
                    self.scores[n_past : n_past + n] = logits.reshape(n, self.n_vocab())
                self.n_tokens = n_past + n - n_ahead
                if self.prefixes:
                    self.prefixes.count_read(n_past, self._prompt_end)
                self._require_eval(False)
            else:
                self._require_eval(True)
                self._n_logits = 0
                self._go_back(n_past)
        if code != 0:
            raise DecodeError(placement.lost_worker(self.ctx) or log.reason or f"llama_decode returned {code}")

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """Upstream's `sample`. Raises `DecodeError` if there are no logits of this position."""
        with self._guard.step(), DeferInterrupt():
            position = self.n_tokens - 1 if idx is None else idx
            if not self.n_tokens - self._n_logits <= position < self.n_tokens:
                raise DecodeError(
                    f"position {position} has no logits: of the {self.n_tokens} tokens in the context, the last "
                    f"{self._n_logits} have some; evaluate one first"
                )
            token = int(super().sample(*args, idx=position - self._rows_ahead, **kwargs))
            self._callbacks.raise_error()
            return token

    def __call__(self, *args: Any, speculate: Speculate | None = None, **kwargs: Any) -> Any:
        """Upstream's `__call__`; speculate: as in the constructor, for this call."""
        with self._asking(speculate):
            return super().__call__(*args, **kwargs)

    def create_completion(self, *args: Any, speculate: Speculate | None = None, **kwargs: Any) -> Any:
        """Upstream's `create_completion`; speculate: as in the constructor, for this call."""
        with self._asking(speculate):
            return super().create_completion(*args, **kwargs)

    def create_chat_completion(
        self, messages: Sequence[Any], *args: Any, speculate: Speculate | None = None, **kwargs: Any
    ) -> Any:
        """Upstream's `create_chat_completion`. Contents may be texts or lists of parts, whatever the template takes.

        speculate: as in the constructor, for this call.

        Raises `TemplateError` if it refuses the messages, or would leave out what the user says.
        """
        with self._guard.work(), self._asking(speculate):
            if not self._has_template_handler():
                messages = [in_form(message, Form.TEXT) for message in messages]  # upstream's own formats
            answer = super().create_chat_completion(messages, *args, **kwargs)
            return self._steps(answer) if isinstance(answer, Iterator) else answer

    def embed(self, input: str | list[str], normalize: bool = False, truncate: bool = False, **kwargs: Any) -> Any:
        """Upstream's `embed`; all tokens are prompt. A text is cut to n_batch tokens only if `truncate` asks for it."""
        with self._guard.work():
            # A text comes in one batch, so that the automatic phase is right; a prompt end left by `eval` is not.
            native.llama_swaa_set_prompt_end(self.ctx, 0, -1)
            try:
                return super().embed(input, normalize, truncate, **kwargs)
            except ValueError as error:
                counts = re.match(r"Requested tokens \((\d+)\) exceed batch size", str(error))
                if counts:
                    raise TextTooLong(int(counts[1]), self.n_batch) from None
                raise
            finally:
                if self.context_params.embeddings:
                    self._forget(cells=False)  # the cache was emptied, also where a later text failed
