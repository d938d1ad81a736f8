"""In which form a chat template takes what it is given: contents as texts or as lists of parts, and the lack of tools.
A template that does not know a form leaves out what is said, or writes Python's spelling of a list.

Knows Jinja templates and OpenAI's messages; of a model, the texts of its first and last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llama_cpp.llama_chat_format import ChatFormatterResponse, Jinja2ChatFormatter

from swaa_local.errors import TemplateError

if TYPE_CHECKING:
    pass

Message = Mapping[str, Any]
Role = Literal["system", "user", "assistant"]
_PROBE = "4096731852"  # digits, which no filter of a template changes
_PROBES: dict[Role, tuple[Role, ...]] = {
    "user": ("user",),
    "system": ("system", "user"),
    "assistant": ("user", "assistant", "user"),
}
# What says that there are no tools, in the order of trying: None as in transformers, lists for templates that go
# through them unasked, and JSON for those that add it to a text.
_NO_TOOLS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": [], "functions": []},
    {"tools": [], "functions": "[]"},
)


class Form(Enum):
    """How a template takes the content of a role's messages."""

    TEXT = "a text"
    PARTS = "a list of parts"
    EITHER = "a text or a list of parts, to the same effect"
    NEITHER = "not at all: it is left out"
    UNKNOWN = "the template refuses what was tried, and will say so itself when it comes to it"


class FormedFormatter(Jinja2ChatFormatter):  # type: ignore[misc]
    """Upstream's formatter of a chat template, which gives contents, and the lack of tools, as the template takes them.

    That is found out by rendering small conversations, when it is first needed.
    """

    @classmethod
    def of_model(cls, llm: Any, source: str) -> FormedFormatter:
        """The formatter of a template with the tokens of a loaded model, where it has them."""
        eos, bos = (token if token >= 0 else None for token in (llm.token_eos(), llm.token_bos()))
        text = llm.token_text
        return cls(
            source,
            eos_token="" if eos is None else text(eos),
            bos_token="" if bos is None else text(bos),
            stop_token_ids=None if eos is None else [eos],
        )

    @cached_property
    def forms(self) -> dict[Role, Form]:
        forms: dict[Role, Form] = {}
        for role in _PROBES:  # the user first, whom the others' conversations have too
            forms[role] = self._form(role, forms)
        return forms

    @cached_property
    def _no_tools(self) -> dict[str, Any]:
        for given in _NO_TOOLS:
            for form in (Form.TEXT, Form.PARTS):
                if self._try("user", {"user": form}, given) is not None:
                    return given
        return {}

    def __call__(self, *, messages: Sequence[Message], **given: Any) -> ChatFormatterResponse:
        """Upstream's. Raises `TemplateError`, also where what the user says would be lost."""
        if self.forms["user"] is Form.NEITHER:
            raise TemplateError("the model's chat template leaves out what the user says")
        if given.get("tools") is None and given.get("functions") is None:
            given |= self._no_tools
        return self._render(messages, self.forms, given)

    def _form(self, role: Role, known: Mapping[Role, Form]) -> Form:
        text, parts = (self._try(role, {**known, role: form}, self._no_tools) for form in (Form.TEXT, Form.PARTS))
        if text is not None and _PROBE in text:
            return Form.EITHER if parts == text else Form.TEXT
        if parts is not None and _PROBE in parts:
            return Form.PARTS
        return Form.UNKNOWN if text is None or parts is None else Form.NEITHER

    def _try(self, role: Role, forms: Mapping[Role, Form], given: Mapping[str, Any]) -> str | None:
        """A conversation in which `role` says the probe; None if the template refuses it."""
        messages = [{"role": r, "content": _PROBE if r == role else "1"} for r in _PROBES[role]]
        try:
            return str(self._render(messages, forms, given).prompt)
        except TemplateError:
            return None

    def _render(
        self, messages: Sequence[Message], forms: Mapping[Role, Form], given: Mapping[str, Any]
    ) -> ChatFormatterResponse:
        formed = [in_form(message, forms.get(message.get("role", ""), Form.UNKNOWN)) for message in messages]
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        try:
            return super().__call__(messages=formed, **{"datetime": now, **given})
        except Exception as error:  # the template is a program that came with the model
            why = str(error) or type(error).__name__
            raise TemplateError(f"the model's chat template refuses this conversation: {why}") from error


def in_form(message: Message, form: Form) -> Message:
    """The message with its content as the template takes it. Raises `TemplateError` for a part that is no text where
    only a text is taken."""
    content = message.get("content")
    if form is Form.PARTS and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if form is not Form.TEXT or not isinstance(content, list):
        return message
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise TemplateError(
                f"the {message.get('role')} message has a part of type {kind!r}, and the model's chat template takes "
                "text alone"
            )
    return {**message, "content": "\n".join(part["text"] for part in content)}
