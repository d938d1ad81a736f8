"""From messages to tokens, through the model's own chat template.

Knows Jinja templates and special tokens; nothing of conversations or terminals.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as _c
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from swaa_local.chat_thinking import MARKS, open_tag
from swaa_local.config import SWAAError
from swaa_local.llama import Llama
from swaa_local.user_input import require_utf8

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
# What a special token looks like; whether it is one, the vocabulary tells.
# Placeholders are from a private use area: no tokenizer or template treats them specially.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_SPECIAL = re.compile(rf"<[^<>\n]{{1,60}}>|\[/?[A-Z_]{{2,30}}\]|[{_OPEN}{_CLOSE}]")


class TemplateError(SWAAError):
    """The model's chat template refuses the conversation; the message is the template's own."""


@dataclass(frozen=True)
class Prompt:
    """A conversation ready to be evaluated. closing: the mark that ends a thought begun by the prompt, or None."""

    tokens: list[int]
    closing: str | None


class ChatTemplate:
    """The chat template of a loaded model.

    is_fallback: the model has none, and ChatML is used.
    """

    def __init__(self, llm: Llama) -> None:
        source = llm.metadata.get("tokenizer.chat_template")
        self.is_fallback = source is None
        self.source: str = CHATML if source is None else source
        self.has_thinking_switch = re.search(r"\benable_thinking\b|\bif (not )?thinking\b", self.source) is not None
        bos, eos = llm.token_bos(), llm.token_eos()
        text = llm._model.token_get_text
        self._formatter = Jinja2ChatFormatter(
            self.source, eos_token=text(eos) if eos >= 0 else "", bos_token=text(bos) if bos >= 0 else ""
        )

    def prompt(self, llm: Llama, messages: Sequence[dict[str, Any]], *, think: bool | None = None) -> Prompt:
        """Render and tokenize. `think` None leaves the choice to the template. Raises `TemplateError`, and `TextError`
        for a message that is no UTF-8.

        Special tokens that a message's text spells out are taken as text, so that a document about chat templates, or
        one that means harm, does not end its own message.
        """
        for message in messages:
            what = "the message" if message["role"] == "user" else f"the {message['role']} message"
            require_utf8(message["content"], what)
        literals: list[str] = []
        guarded = [m | {k: self._guard(llm, v, literals) for k, v in m.items() if k != "role"} for m in messages]
        switches = {} if think is None else {"enable_thinking": think, "thinking": think}
        try:
            text = self._formatter(messages=guarded, **switches).prompt  # type: ignore[arg-type]
        except Exception as error:  # the template is a program that came with the model
            why = str(error) or type(error).__name__
            raise TemplateError(f"the model's chat template refuses this conversation: {why}") from error
        tokens: list[int] = []
        for index, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text)):
            literal = index % 2 == 1
            part = literals[int(part)] if literal else part
            if part:
                tokens += llm.tokenize(part.encode(), add_bos=False, special=not literal)
        bos = llm.token_bos()
        if llm._model.add_bos_token() and bos >= 0 and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return Prompt(tokens, open_tag(text))

    @staticmethod
    def _guard(llm: Llama, text: str, literals: list[str]) -> str:
        def replace(match: re.Match[str]) -> str:
            if match[0] not in (_OPEN, _CLOSE):
                tokens = llm.tokenize(match[0].encode(), add_bos=False, special=True)
                if len(tokens) != 1 or not _c.llama_vocab_is_control(llm._model.vocab, tokens[0]):
                    return match[0]
            literals.append(match[0])
            return f"{_OPEN}{len(literals) - 1}{_CLOSE}"

        return _SPECIAL.sub(replace, text)


def token_bytes(llm: Llama, token: int) -> bytes:
    """A generated token as text: control tokens are silent, except the marks of a thought."""
    vocab = llm._model.vocab
    if _c.llama_vocab_is_control(vocab, token):
        text = llm._model.token_get_text(token)
        return text.encode() if text in MARKS else b""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = _c.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
