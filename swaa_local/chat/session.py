"""A conversation with a model: turns, sampling, and one reply at a time.

Knows models and templates; nothing of terminals or files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from swaa_local.chat.settings import ChatError, Settings
from swaa_local.chat.setup import Setup
from swaa_local.engine.prefixes import HeldCells, Identity, identity_of
from swaa_local.engine.run_stats import RunStats
from swaa_local.errors import PromptTooLong, SWAAError
from swaa_local.files.document import Document, compose_message, marked
from swaa_local.generation.stream import Stream
from swaa_local.generation.template import ChatTemplate
from swaa_local.generation.thinking import Piece
from swaa_local.llama import Llama
from swaa_local.prefix_cache.rates import ReadingRates
from swaa_local.schedule.config import LayerMode
from swaa_local.schedule.text import in_words

_MEASURED_TOKENS = 48  # more than what the engine has other kernels for, and too few to be shown as progress

MAX_QUESTION_TAIL = 512
"""Tokens of a question that are its prompt's tail, where the schedule's own is shorter; more would be a pasted book."""


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


Finish = Literal["stop", "length", "context", "loop", "interrupted"]


class Session:
    """A conversation. `open_llm(full)` loads the model: with its schedule, or with full attention.

    turns: the conversation so far; replace it to start over or to load one. pending: documents that the next message
    will carry. identity: fingerprints of the model's files, None if they could not be read. finish: how the last reply
    ended, and replied: whether there is one at all.
    """

    def __init__(
        self,
        open_llm: Callable[[bool], Llama],
        settings: Settings,
        *,
        full: bool = False,
        open_sized: Callable[[bool, int], Llama] | None = None,
        rates_path: Path | None = None,
        setup: Callable[[Session], Setup] | None = None,
    ) -> None:
        """open_sized(full, n_ctx): loads the model with another context. rates_path: where it is kept how long reading
        takes; None: nowhere. setup: what is kept with the conversation of how the model runs."""
        self._open_llm, self._open_sized, self._rates_path = open_llm, open_sized, rates_path
        self._setup = setup
        self.full = full
        self.llm = open_llm(full)
        self.identity = _identity(self.llm)
        self.rates = self._rates()
        self.template = ChatTemplate(self.llm)
        self.settings = settings
        self.chosen: set[str] = set()  # names of the settings that somebody chose
        self.measures_first = False  # before the first long prompt, so that there is an estimate from its beginning
        self.turns: list[Turn] = []
        self.pending: list[Document] = []
        self.finish: Finish = "stop"
        self.replied = False
        self.stats: RunStats | None = None
        self.loop_tokens: int | None = None
        self._dice = random.Random(settings.seed if settings.seed >= 0 else None)

    def set(self, **changes: Any) -> None:
        """Change settings from the next reply on."""
        self.settings = replace(self.settings, **changes)
        self.chosen |= changes.keys()
        if "seed" in changes:
            self._dice = random.Random(self.settings.seed if self.settings.seed >= 0 else None)

    @property
    def setup(self) -> Setup | None:
        """What the model runs with, as far as anybody asked for it; None where nobody keeps that."""
        return self._setup(self) if self._setup else None

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        return system + [turn.message() for turn in self.turns]

    def ask(self, text: str) -> Iterator[Piece]:
        """Say something, with the pending documents, and get the reply piece by piece.

        Ctrl-C (KeyboardInterrupt, or closing the iterator) ends the reply and keeps what there is of it. If there is
        nothing yet, as always with a limit of 0 tokens, or the message cannot be evaluated, it is taken back and its
        documents are pending again.
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
        if not llm.serves_whole:
            documents = documents[-1:]  # what is kept up to there serves for all before it
        prompt = self.template.prompt(
            llm, self.messages(), think=settings.think, question=question, documents=documents
        )
        if len(prompt.tokens) >= llm.n_ctx():
            raise PromptTooLong(len(prompt.tokens), llm.n_ctx())
        if self.measures_first and len(prompt.tokens) > llm.context_params.n_ubatch:
            self._measure(prompt.tokens)
        llm.set_seed(self._dice.getrandbits(31))
        stream = Stream(
            llm,
            prompt,
            max_tokens=settings.max_tokens if settings.max_tokens >= 0 else None,
            # A question of any length has its tail behind these, so that what was read up to there serves all.
            document_ends=[end - tail for end in prompt.document_ends if end > tail],
            prompt_tail=max(tail, min(prompt.n_question or 0, MAX_QUESTION_TAIL)),
            temp=settings.temp,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            loop_guard=settings.loop_guard,
            repeat_penalty=settings.repeat_penalty,
        )
        try:
            yield from stream
        except KeyboardInterrupt:
            pass
        finally:
            self.finish = stream.finish or "interrupted"
            self.stats, self.loop_tokens = llm.last_run, stream.loop_tokens
            self.replied = bool(stream.text or stream.thinking) or (
                self.finish != "interrupted" and settings.max_tokens != 0
            )
            if self.replied:
                self.turns.append(Turn("assistant", stream.text.rstrip(), stream.thinking.rstrip()))

    def keep_read(self, before: Callable[[], None]) -> int:
        """Keep on disk what was read of a message that was stopped; the first tokens of its prompt that are there then.
        before: called if there is something to write."""
        prefixes = self.llm.prefixes
        if prefixes is None or self.stats is None:
            return 0
        if prefixes.keeps_more:
            before()
        return prefixes.keep_read()

    def _measure(self, tokens: list[int]) -> None:
        """Read a little, which `on_prefill` notes, if nobody knows how long reading takes; nothing is left of it."""
        if self.rates.known or self.llm.n_tokens:
            return
        try:
            self.llm.eval(tokens[:_MEASURED_TOKENS], ends_prompt=False)
        finally:
            self.llm.reset()

    def clear(self) -> None:
        """Forget the conversation and its documents; the system message and the settings stay."""
        self.turns, self.pending = [], []

    def undo(self) -> Turn:
        """Take the last question and its reply back, and return the question; its documents are pending again."""
        asked = max((i for i, turn in enumerate(self.turns) if turn.role == "user"), default=None)
        if asked is None:
            raise ChatError("there is no question yet to take back")
        question = self.turns[asked]
        del self.turns[asked:]
        self.pending = [*question.documents, *self.pending]
        return question

    def drop(self, n_questions: int) -> list[Turn]:
        """Forget the oldest questions with their replies and documents; what was forgotten."""
        questions = [i for i, turn in enumerate(self.turns) if turn.role == "user"]
        if not questions:
            raise ChatError("there are no messages to forget")
        end = questions[n_questions] if n_questions < len(questions) else len(self.turns)
        dropped, self.turns = self.turns[:end], self.turns[end:]
        return dropped

    @property
    def forgets_by_itself(self) -> bool:
        """True if no layer keeps the whole text: the model sees no more than its windows, however much it is given."""
        schedule = self.llm.schedule
        return schedule is not None and schedule.layers(LayerMode.ALWAYS) == schedule.model.sliding

    def drop_to_fit(self, text: str) -> list[Turn]:
        """Forget the oldest messages until this one has room, and half of the context is free if that can be."""
        dropped: list[Turn] = []
        asked = Turn("user", text, documents=tuple(self.pending))
        while self.turns:
            messages = [*self.messages(), asked.message()]
            n_tokens = len(self.template.prompt(self.llm, messages, think=self.settings.think).tokens)
            if n_tokens <= self.llm.n_ctx() // 2:
                break
            dropped += self.drop(1)
        return dropped

    def resize(self, n_ctx: int) -> None:
        """Go on with a context of another length; what was read stays read. Errors as of `switch`."""
        if self._open_sized is None:
            raise ChatError("the context cannot be changed here")
        open_sized, held = self._open_sized, HeldCells(self.llm)
        self._replace(lambda: open_sized(self.full, n_ctx))
        held.give_to(self.llm.restore_prefix, self.llm.n_ctx())

    def switch(self, full: bool) -> None:
        """Go on with full attention or with the schedule: another context, the same conversation.

        If the new one cannot be made, or Ctrl-C stops it, the old one is restored and the error raised.
        """
        if full == self.full:
            return
        self._replace(lambda: self._open_llm(full))
        self.full = full
        self.rates = self._rates()

    def _replace(self, open_new: Callable[[], Llama]) -> None:
        self._check_files()
        self.llm.close()
        try:
            self.llm = open_new()
        except BaseException:
            self.llm = self._open_llm(self.full)
            raise
        self.template = ChatTemplate(self.llm)
        before, self.identity = self.identity, _identity(self.llm)
        if self.identity != before:  # within the last second
            raise ChatError(f"{self.llm.model_path} was replaced while it was loaded, and this is the new one")

    def _check_files(self) -> None:
        """Raise `ChatError` if the files are not those that the conversation began with, or nobody can tell."""
        if self.identity is None or _identity(self.llm) != self.identity:
            files = f"{self.llm.model_path} or its LoRA adapter" if self.llm.lora_path else self.llm.model_path
            raise ChatError(
                f"{files} was replaced or removed since this chat began, so it cannot be loaded again here; leave, and "
                "swaa-local chat --continue goes on with what is there now"
            )

    def _rates(self) -> ReadingRates:
        llm = self.llm
        schedule = in_words(replace(llm.schedule, tail=0)) if llm.schedule else ""
        key = f"{llm.description()} {schedule} -tb {llm.n_threads_batch} -ub {llm.context_params.n_ubatch}"
        return ReadingRates(self._rates_path, key)

    def close(self) -> None:
        self.llm.close()


def _identity(llm: Llama) -> Identity | None:
    """What the files are now; None if they cannot be read."""
    try:
        return identity_of(llm)
    except (SWAAError, OSError):
        return None
