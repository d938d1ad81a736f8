"""The plugin for `llm` (https://llm.datasette.io): GGUF models with their schedules, and texts that are read once.

Knows llm's classes; what a conversation is, `chat.session` knows. llm loads this module by its entry point.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import llm
from pydantic import Field

from swaa_local.chat.session import Session, Turn
from swaa_local.chat.settings import Settings
from swaa_local.errors import PromptTooLong, SWAAError
from swaa_local.files.document import Document
from swaa_local.text.printable import printable

_BY_OPTION = "swaa-local"


@llm.hookimpl
def register_models(register: Any) -> None:
    """`swaa-local`, whose file the option `model` names, and each model of the hub's cache by its name."""
    from swaa_local.inspect.listing import list_cached

    register(SWAALocal(_BY_OPTION, None))
    for model in list_cached():
        register(SWAALocal(f"{_BY_OPTION}/{model.name}", model.name))


class SWAALocal(llm.Model):  # type: ignore[misc]
    """One model. It stays loaded while llm runs, as in `llm chat`."""

    can_stream = True
    needs_key = None

    class Options(llm.Options):  # type: ignore[misc]
        model: str | None = Field(default=None, description="GGUF file or hub id, for the model swaa-local")
        temperature: float | None = Field(default=None, ge=0, description="0 is greedy")
        max_tokens: int | None = Field(
            default=None, ge=-1, description="Of an answer, thinking included; -1 is no limit, 0 reads the prompt alone"
        )
        seed: int | None = Field(default=None, ge=-1, description="Of the sampling; -1 is random")
        ctx: int | None = Field(default=None, ge=0, description="Tokens of context")
        threads: int | None = Field(default=None, ge=1, description="To read and to write")
        think: bool | None = Field(default=None, description="Let a thinking model think, or not")
        cache: bool = Field(default=True, description="Keep what is read, so that it is not read again")

    def __init__(self, model_id: str, name: str | None) -> None:
        self.model_id, self._name = model_id, name
        self._loaded: tuple[Any, Session] | None = None

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer, piece by piece. Fragments are documents; attachments and schemas are not known."""
        try:
            session = self._session(prompt.options)
            session.set(system=prompt.system or "")
            session.turns = list(_history(prompt, conversation))
            session.pending = _documents(prompt)
            for piece in session.ask(prompt._prompt or ""):
                if not piece.thinking:
                    yield piece.text
        except PromptTooLong as error:
            raise llm.ModelError(error.advice("-o ctx {}", "it")) from None
        except SWAAError as error:
            raise llm.ModelError(str(error)) from None
        except OSError as error:
            raise llm.ModelError(
                ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
            ) from None
        if session.stats is not None:
            details = {"cached": session.stats.cached_tokens} if session.stats.cached_tokens else None
            response.set_usage(
                input=session.stats.prompt_tokens, output=session.stats.generated_tokens, details=details
            )

    def _session(self, options: Any) -> Session:
        key = (options.model, options.ctx, options.threads, options.cache)
        if self._loaded is not None and self._loaded[0] == key:
            session = self._loaded[1]
        else:
            if self._loaded is not None:
                self._loaded[1].close()
            session = _open(self._name or options.model, options)
            self._loaded = key, session
        given = {"temp": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed}
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = Settings(**chosen, think=options.think)
        session.settings = settings.with_defaults_of(session.llm.metadata, tuple(chosen))
        if options.seed is not None:
            session.set(seed=options.seed)
        return session


def _open(name: str | None, options: Any) -> Session:
    from swaa_local.llama import Llama
    from swaa_local.prefix_cache.store import PrefixCache
    from swaa_local.sources.find import find_gguf

    if name is None:
        raise llm.ModelError("name a model: -o model FILE.gguf, or -o model org/name:Q4_K_M")
    path = find_gguf(name)

    def load(full: bool) -> Llama:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = Llama(
                str(path),
                swaa=False if full else None,
                n_ctx=options.ctx,
                n_threads=options.threads,
                n_threads_batch=options.threads,
            )
        for warning in caught:
            _note(str(warning.message).replace("pass n_ctx", "pass -o ctx"))
        if options.cache:
            try:
                model.set_cache(PrefixCache(note=_note))
            except (SWAAError, OSError) as error:
                _note(f"texts that were read before are read again: {error}")
        return model

    return Session(load, Settings())


def _note(text: str) -> None:
    """A line beside the answer."""
    print(f"swaa-local: {printable(text)}", file=sys.stderr)


def _history(prompt: Any, conversation: Any) -> Iterator[Turn]:
    """What was said before: as responses while llm runs, as messages where it goes on with what it has logged."""
    if conversation is not None and conversation.responses:
        for earlier in conversation.responses:
            yield from _turns(earlier)
        return
    for message in getattr(prompt, "messages", [])[:-1]:
        if message.role in ("user", "assistant"):
            yield Turn(message.role, "".join(getattr(part, "text", "") for part in message.parts))


def _turns(response: Any) -> tuple[Turn, Turn]:
    prompt = response.prompt
    return (
        Turn("user", prompt._prompt or "", documents=tuple(_documents(prompt))),
        Turn("assistant", response.text().strip()),
    )


def _documents(prompt: Any) -> list[Document]:
    return [
        Document(str(getattr(fragment, "source", None) or f"text {number}"), str(fragment))
        for number, fragment in enumerate(prompt.fragments, 1)
    ]
