"""A conversation with a model: turns, sampling, and one reply at a time.

Knows models and templates; nothing of terminals or files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from swaa_local.chat.document import Document, compose_message, marked
from swaa_local.engine.run_stats import RunStats
from swaa_local.errors import PromptTooLong, SWAAError
from swaa_local.generation.stream import Stream
from swaa_local.generation.template import ChatTemplate
from swaa_local.generation.thinking import Piece
from swaa_local.llama import Llama
from swaa_local.prefix_cache.rates import ReadingRates
from swaa_local.schedule.text import in_words

_INT_MAX = (1 << 31) - 1

MAX_QUESTION_TAIL = 512
"""Tokens of a question that are its prompt's tail, where the schedule's own is shorter; more would be a pasted book."""


class ChatError(SWAAError):
    """Something that the conversation does not allow now; the message says what to do."""


@dataclass(frozen=True)
class Turn:
    """One message. thinking: of the assistant. documents: those that came with the user's words."""

    role: Literal["user", "assistant"]
    text: str
    thinking: str = ""
    documents: tuple[Document, ...] = ()

    def message(self) -> dict[str, str]:
        """As chat templates take it. Templates that know thoughts of earlier turns decide about them themselves."""
        if self.role == "user":
            return {"role": "user", "content": compose_message(self.text, self.documents)}
        thinking = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"role": "assistant", "content": self.text} | thinking


@dataclass(frozen=True)
class Settings:
    """How replies are made. Sampling defaults are llama.cpp's; a GGUF may bring its own (`with_defaults_of`).

    max_tokens: of a reply, thinking included; 0 or less: until the context is full. seed: -1 is a new one each time.
    think: None leaves it to the model's template.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    max_tokens: int = -1
    seed: int = -1
    think: bool | None = None
    hide_thinking: bool = False
    system: str = ""

    def __post_init__(self) -> None:
        if self.top_k > _INT_MAX:  # ctypes would take a part of it
            raise ChatError(f"top-k must be at most {_INT_MAX}, not {self.top_k}")

    def with_defaults_of(self, metadata: Mapping[str, str], given: Sequence[str] = ()) -> Settings:
        """The sampling that the model's makers recommend in the GGUF, but for the fields `given` by the user.

        Raises `ChatError` for a recommendation that is no number.
        """
        keys = {"temp": float, "top_k": int, "top_p": float, "min_p": float, "penalty_repeat": float}
        found: dict[str, Any] = {}
        for key, kind in keys.items():
            field = "repeat_penalty" if key == "penalty_repeat" else key
            if field not in given and (value := metadata.get(f"general.sampling.{key}")) is not None:
                try:
                    found[field] = kind(float(value))
                except (ValueError, OverflowError):
                    option = "--" + field.replace("_", "-")
                    raise ChatError(
                        f"the model's general.sampling.{key} is {value!r}, which is no number; pass {option}"
                    ) from None
        return replace(self, **found)


SETTING_NAMES = tuple(field.name for field in fields(Settings))

Finish = Literal["stop", "length", "context", "interrupted"]


class Session:
    """A conversation. `open_llm(full)` loads the model: with its schedule, or with full attention.

    turns: the conversation so far; replace it to start over or to load one. pending: documents that the next message
    will carry. finish: how the last reply ended, and replied: whether there is one at all.
    """

    def __init__(
        self,
        open_llm: Callable[[bool], Llama],
        settings: Settings,
        *,
        full: bool = False,
        rates_path: Path | None = None,
    ) -> None:
        """rates_path: where it is kept how long reading takes; None: nowhere."""
        self._open_llm, self._rates_path = open_llm, rates_path
        self.full = full
        self.llm = open_llm(full)
        self.rates = self._rates()
        self.template = ChatTemplate(self.llm)
        self.settings = settings
        self.turns: list[Turn] = []
        self.pending: list[Document] = []
        self.finish: Finish = "stop"
        self.replied = False
        self.stats: RunStats | None = None
        self._dice = random.Random(settings.seed if settings.seed >= 0 else None)

    def set(self, **changes: Any) -> None:
        """Change settings from the next reply on."""
        self.settings = replace(self.settings, **changes)
        if "seed" in changes:
            self._dice = random.Random(self.settings.seed if self.settings.seed >= 0 else None)

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        return system + [turn.message() for turn in self.turns]

    def ask(self, text: str) -> Iterator[Piece]:
        """Say something, with the pending documents, and get the reply piece by piece.

        Ctrl-C (KeyboardInterrupt, or closing the iterator) ends the reply and keeps what there is of it. If there is
        nothing yet, or the message cannot be evaluated, it is taken back and its documents are pending again.
        Raises `PromptTooLong` and `TemplateError`.
        """
        asked = Turn("user", text, documents=tuple(self.pending))
        self.turns.append(asked)
        self.pending, self.replied = [], False
        try:
            yield from self._reply()
        finally:
            if not self.replied:
                self.turns.pop()
                self.pending = [*asked.documents, *self.pending]

    def regenerate(self) -> Iterator[Piece]:
        """Reply anew to the last message. The old reply is kept if the new one does not come about."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise ChatError("there is no answer yet to regenerate")
        old = self.turns.pop()
        try:
            yield from self._reply()
        finally:
            if not self.replied:
                self.turns.append(old)

    def _reply(self) -> Iterator[Piece]:
        """Generate the assistant's turn and append it."""
        self.finish, self.replied, self.stats = "interrupted", False, None
        llm, settings = self.llm, self.settings
        tail = llm.schedule.active_tail if llm.schedule else 0
        question = self.turns[-1].text if tail else None
        documents = [marked(document) for turn in self.turns for document in turn.documents]
        if not (llm.schedule and llm.schedule.has_ring):
            documents = documents[-1:]  # what is kept up to there serves for all before it
        prompt = self.template.prompt(
            llm, self.messages(), think=settings.think, question=question, documents=documents
        )
        if len(prompt.tokens) >= llm.n_ctx():
            raise PromptTooLong(len(prompt.tokens), llm.n_ctx())
        llm.set_seed(self._dice.getrandbits(31))
        stream = Stream(
            llm,
            prompt,
            max_tokens=settings.max_tokens if settings.max_tokens > 0 else None,
            # A question of any length has its tail behind these, so that what was read up to there serves all.
            document_ends=[end - tail for end in prompt.document_ends if end > tail],
            prompt_tail=max(tail, min(prompt.n_question or 0, MAX_QUESTION_TAIL)),
            temp=settings.temp,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repeat_penalty=settings.repeat_penalty,
        )
        try:
            yield from stream
        except KeyboardInterrupt:
            pass
        finally:
            self.finish = stream.finish or "interrupted"
            self.stats = llm.last_run
            self.replied = self.finish != "interrupted" or bool(stream.text or stream.thinking)
            if self.replied:
                self.turns.append(Turn("assistant", stream.text.rstrip(), stream.thinking.rstrip()))

    def clear(self) -> None:
        """Forget the conversation and its documents; the system message and the settings stay."""
        self.turns, self.pending = [], []

    def switch(self, full: bool) -> None:
        """Go on with full attention or with the schedule: another context, the same conversation.

        If the new one cannot be made, or Ctrl-C stops it, the old one is restored and the error raised.
        """
        if full == self.full:
            return
        self.llm.close()
        try:
            self.llm = self._open_llm(full)
        except BaseException:
            self.llm = self._open_llm(self.full)
            raise
        self.full = full
        self.rates = self._rates()
        self.template = ChatTemplate(self.llm)

    def _rates(self) -> ReadingRates:
        llm = self.llm
        schedule = in_words(replace(llm.schedule, tail=0)) if llm.schedule else ""
        key = f"{llm.description()} {schedule} -tb {llm.n_threads_batch} -ub {llm.context_params.n_ubatch}"
        return ReadingRates(self._rates_path, key)

    def close(self) -> None:
        self.llm.close()
