"""One loaded model, questions about texts, and what a schedule makes of them: probabilities, answers, times.

The engine's side of a calibration. What is tried, and in which order, `search` knows.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from swaa_local.calibrate.prompts import ROOM_TO_ANSWER, Ask, Text
from swaa_local.calibrate.results import Generated, Scale, Trial
from swaa_local.engine.adapter import AdapterWarning
from swaa_local.engine.context_length import TrainedLengthWarning, gpu_layers
from swaa_local.engine.options import EngineOptions
from swaa_local.generation.template import ChatTemplate
from swaa_local.llama import Llama
from swaa_local.schedule.config import Schedule
from swaa_local.tasks.scoring import score

TEMPERATURE = 0.3
"""Of the sampling that `Trial.chance` is about."""
_WARM_UP_TOKENS, _GPU_WARM_UP_TOKENS = 64, 2048  # a GPU loads each kernel when it first needs it
_TIMED_TOKENS = 6
_OWN_ANSWER_TOKENS = 40


@dataclass(frozen=True)
class Prompted:
    """A question as tokens, and those of its answer. references: one of these makes a generated answer right."""

    kind: str
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]


class Bench:
    """A loaded model to measure with; to be closed. n_ctx: tokens; None: the vocabulary alone, to make questions."""

    def __init__(
        self,
        model: Path,
        n_ctx: int | None,
        engine: EngineOptions,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        with warnings.catch_warnings():
            # the request was checked
            warnings.simplefilter("ignore", TrainedLengthWarning)
            warnings.simplefilter("ignore", AdapterWarning)
            if n_ctx is None:
                self.llm = Llama(str(model), vocab_only=True, n_ctx=512, **engine.arguments())
            else:
                # The model's own windows are kept as under a schedule, so that this alone makes the difference.
                options = {"swaa": False, "swa_full": False, "on_prefill": on_prefill, **engine.arguments()}
                self.llm = Llama(str(model), n_ctx=n_ctx, **options)
        self._on_prefill = on_prefill
        self._n_warm_up = _GPU_WARM_UP_TOKENS if gpu_layers(engine.n_gpu_layers) > 0 else _WARM_UP_TOKENS
        self._template = ChatTemplate(self.llm)
        self.has_template = not self._template.is_fallback

    def close(self) -> None:
        self.llm.close()

    def count(self, text: str) -> int:
        """Tokens of a piece of text."""
        return len(self.llm.tokenize(text.encode(errors="replace"), add_bos=False, special=False))

    def count_prompt(self, message: str) -> int:
        """Tokens of the prompt that a message makes."""
        return len(self._begin(message))

    def _begin(self, message: str) -> list[int]:
        """The prompt of a message up to where the answer begins: a model that thinks is made to have done so."""
        llm = self.llm
        prompt = self._template.prompt(llm, [{"role": "user", "content": message}], think=False)
        if prompt.closing is None:
            return prompt.tokens
        return prompt.tokens + llm.tokenize(f"\n{prompt.closing}\n\n".encode(), add_bos=False, special=True)

    def prompted(self, text: Text, *, bare: frozenset[str] = frozenset()) -> list[Prompted]:
        """The questions of a text with references, as tokens. bare: kinds whose answers get no beginning."""
        return [self._prompted(text, ask, ask.kind in bare) for ask in text.asks if ask.reference is not None]

    def _prompted(self, text: Text, ask: Ask, bare: bool) -> Prompted:
        assert ask.reference is not None
        begin = self._begin(text.message(ask))
        if bare or not ask.prefix:
            answer = self._tokens(ask.reference)
            return Prompted(ask.kind, tuple(begin), tuple(answer), (ask.reference,))
        # Words may share tokens where they meet.
        prefix, whole = self._tokens(ask.prefix), self._tokens(f"{ask.prefix} {ask.reference}")
        n = 0
        while n < min(len(prefix), len(whole) - 1) and prefix[n] == whole[n]:
            n += 1
        return Prompted(ask.kind, (*begin, *whole[:n]), tuple(whole[n:]), (ask.reference,))

    def _tokens(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(errors="replace"), add_bos=False, special=False)

    def own_answers(self, text: Text) -> list[Prompted]:
        """The user's questions with full attention's own greedy answers as what must be kept.

        Left out are questions whose given answer it does not give.
        """
        found = []
        self.llm.set_schedule(False)
        for ask in text.asks:
            tokens = self._begin(text.message(ask))
            answer = self._generate(tokens, _OWN_ANSWER_TOKENS)
            said = self._text(answer)
            if answer and (ask.reference is None or score(said, [ask.reference], "contains").correct):
                references = (ask.reference,) if ask.reference is not None else (said,)
                found.append(Prompted("own", tuple(tokens), tuple(answer), references))
        return found

    def trial(
        self, schedule: Schedule, scale: Scale, number: int, prompts: Sequence[Prompted], *, timed: bool = True
    ) -> Trial:
        """Score the answers of one text. Where the cache has the text and only the tail is another, it is not read
        again, and reading is not timed; nor is it if nobody needs the times."""
        started = time.perf_counter()
        reads = self._apply(schedule, prompts[0], anew=timed and (self.llm.schedule or schedule) == schedule)
        prefill_s, decode_token_s = self._time(prompts[0]) if reads else (None, None)
        nll, chance, right = [], [], []
        for prompt in prompts:
            found = self.llm.score(prompt.tokens, prompt.answer, reuse=True, temperatures=(1.0, TEMPERATURE))
            nll.append(-float(found.logprobs[0].mean()))
            chance.append(math.exp(found.logprobs[1].sum()))
            right.append(bool(found.greedy.all()))
        return Trial(
            schedule,
            scale,
            number,
            tuple(nll),
            tuple(chance),
            tuple(right),
            prefill_s,
            decode_token_s,
            self.llm.kv_bytes,
            time.perf_counter() - started,
        )

    def generate(self, schedule: Schedule, number: int, prompts: Sequence[Prompted]) -> Generated:
        """Generate the answers of one text, each up to where it is known to be right."""
        started = time.perf_counter()
        self._apply(schedule, prompts[0], anew=True)
        prefill_s, decode_token_s = self._time(prompts[0])
        answers, right = [], []
        for prompt in prompts:
            # Brings the cache to where a cold reading would be.
            self.llm.score(prompt.tokens, prompt.answer[:1], reuse=True)
            limit = min(ROOM_TO_ANSWER, len(prompt.answer) + 8)
            said = self._text(self._generate(prompt.tokens, limit, partial(_is_right, prompt)))
            answers.append(said)
            right.append(_is_right(prompt, said))
        return Generated(
            schedule,
            number,
            tuple(answers),
            tuple(right),
            prefill_s,
            decode_token_s,
            self.llm.kv_bytes,
            time.perf_counter() - started,
        )

    def _apply(self, schedule: Schedule, prompt: Prompted, *, anew: bool = False) -> bool:
        """Take a schedule; True if the prompt must be read."""
        llm = self.llm
        active = llm.schedule or Schedule.full(schedule.model)
        begin = list(prompt.tokens[: max(0, len(prompt.tokens) - 512)])
        has_text = llm.n_tokens > len(begin) and llm.input_ids[: len(begin)].tolist() == begin
        if not anew and has_text and schedule.has_cells_of(active):
            if schedule != active:
                llm.set_schedule(schedule)
            return False
        llm.set_schedule(False if schedule.is_full else schedule)
        # A new context's first evaluation also reads weights and compiles kernels.
        llm.on_prefill = None
        llm.reset()
        llm.eval(prompt.tokens[: self._n_warm_up])
        llm.synchronize()
        llm.reset()
        llm.on_prefill = self._on_prefill
        return True

    def _time(self, prompt: Prompted) -> tuple[float, float]:
        """Read a prompt, and write a few tokens: seconds, and seconds for a token."""
        llm = self.llm
        started = time.perf_counter()
        llm.eval(prompt.tokens)
        llm.synchronize()
        prefill_s = time.perf_counter() - started
        token = [prompt.answer[0]]
        llm.eval(token, decode=True)
        llm.synchronize()
        started = time.perf_counter()
        for _ in range(_TIMED_TOKENS):
            llm.eval(token, decode=True)
            llm.synchronize()
        return prefill_s, (time.perf_counter() - started) / _TIMED_TOKENS

    def _generate(
        self, tokens: Sequence[int], limit: int, is_enough: Callable[[str], bool] = lambda _said: False
    ) -> list[int]:
        answer: list[int] = []
        for token in self.llm.generate(list(tokens), temp=0.0, speculate=False):  # whatever the clock says
            if self.llm.is_end(token):
                break
            answer.append(token)
            if len(answer) == limit or is_enough(self._text(answer)):
                break
        return answer

    def _text(self, tokens: Sequence[int]) -> str:
        return b"".join(self.llm.token_bytes(token) for token in tokens).decode(errors="replace").strip()


def _is_right(prompt: Prompted, said: str) -> bool:
    return any(score(said, [reference], "all").correct for reference in prompt.references)
