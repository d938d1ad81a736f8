"""From messages to tokens, through the model's own chat template.

Knows Jinja templates and special tokens; nothing of conversations or terminals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.engine.message_form import Form, FormedFormatter
from swaa_local.files.user_input import require_utf8
from swaa_local.generation.thinking import MARKS, open_tag
from swaa_local.llama import Llama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
# Placeholders are from a private use area: no tokenizer or template treats them specially.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_PLACEHOLDER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# What the tokenizer takes for a special token only where it is told to (llama-vocab.cpp, tokenizer_st_partition).
_SPECIAL = _c.LLAMA_TOKEN_ATTR_CONTROL | _c.LLAMA_TOKEN_ATTR_UNKNOWN


@dataclass(frozen=True)
class Prompt:
    """A conversation ready to be evaluated.

    closing: the mark that ends a thought begun by the prompt, or None. n_question: tokens from the beginning of the
    last message's question to the end of the prompt, about; None where it is not known. document_ends: rising
    positions where documents end, about.
    """

    tokens: list[int]
    closing: str | None
    n_question: int | None = None
    document_ends: tuple[int, ...] = ()


class ChatTemplate:
    """The chat template of a loaded model.

    is_fallback: the model has none, and ChatML is used. leaves_out: roles whose messages do not reach the model.
    """

    def __init__(self, llm: Llama) -> None:
        source = llm.metadata.get("tokenizer.chat_template", "")
        self.is_fallback = not source.strip()
        self.source: str = CHATML if self.is_fallback else source
        self.has_thinking_switch = re.search(r"\benable_thinking\b|\bif (not )?thinking\b", self.source) is not None
        self._formatter = FormedFormatter.of_model(llm, self.source)
        self._special = llm.special_tokens()
        # The longest first, as the tokenizer looks for them.
        spelled = "|".join(re.escape(name) for name in sorted(self._special, key=len, reverse=True))
        self._split = re.compile(f"({spelled})" if spelled else "(?!)").split
        self._guarded = re.compile(f"{spelled}|[{_OPEN}{_CLOSE}]" if spelled else f"[{_OPEN}{_CLOSE}]")
        self.leaves_out = frozenset(role for role, form in self._formatter.forms.items() if form is Form.NEITHER)

    def prompt(
        self,
        llm: Llama,
        messages: Sequence[dict[str, Any]],
        *,
        think: bool | None = None,
        question: str | None = None,
        documents: Sequence[str] = (),
    ) -> Prompt:
        """Render and tokenize. `think` None leaves the choice to the template. question: what the last message ends
        with, to be counted; None: nothing is. documents: parts of the messages in their order, to be found again.
        Raises `TemplateError`, and `TextError` for a message that is no UTF-8.

        Special tokens that a message's text spells out are taken as text, so that a document about chat templates, or
        one that means harm, does not end its own message.
        """
        for message in messages:
            what = "the message" if message["role"] == "user" else f"the {message['role']} message"
            require_utf8(message["content"], what)
        literals: list[str] = []
        guarded = [m | {k: self._guard(v, literals) for k, v in m.items() if k != "role"} for m in messages]
        switches = {} if think is None else {"enable_thinking": think, "thinking": think}
        text = str(self._formatter(messages=guarded, **switches).prompt)
        tokens: list[int] = []
        ready, last = "", 0  # what is tokenized as it is, and the attributes of its last special token
        for index, part in enumerate(parts := self._split(text)):
            if _OPEN not in part:
                ready += part
                last = self._special[part] if index % 2 else 0 if part else last
                continue
            # Between two special tokens there is nothing but text here; blanks go where those want to have none.
            if last & _c.LLAMA_TOKEN_ATTR_RSTRIP:
                part = part.lstrip()
            if index + 1 < len(parts) and self._special[parts[index + 1]] & _c.LLAMA_TOKEN_ATTR_LSTRIP:
                part = part.rstrip()
            part = _PLACEHOLDER.sub(lambda found: literals[int(found[1])], part)
            tokens += _tokenize(llm, ready, special=True) + _tokenize(llm, part, special=False)
            ready, last = "", 0
        tokens += _tokenize(llm, ready, special=True)
        bos = llm.token_bos()
        if llm.adds_bos() and bos >= 0 and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return Prompt(
            tokens,
            open_tag(text),
            self._count_from(llm, text, question.strip()) if question else None,
            tuple(len(tokens) - n for n in self._count_behind(llm, text, documents)),
        )

    def _count_behind(self, llm: Llama, text: str, documents: Sequence[str]) -> Iterator[int]:
        """Tokens of a rendered text behind each of these parts of it; a part that is not there has none."""
        text, end = _PLACEHOLDER.sub(_OPEN, text), 0
        for document in documents:
            document = self._guarded.sub(_OPEN, document)
            begin = text.find(document, end)
            if begin >= 0:
                end = begin + len(document)
                yield len(_tokenize(llm, text[end:].replace(_OPEN, "?"), special=True))

    def _count_from(self, llm: Llama, text: str, question: str) -> int | None:
        """Tokens of a rendered text from the last place on where it says this; None if it does not."""
        # Placeholders are numbered through all messages, and here only where they stand counts.
        text, question = _PLACEHOLDER.sub(_OPEN, text), self._guarded.sub(_OPEN, question)
        begin = text.rfind(question)
        return None if begin < 0 else len(_tokenize(llm, text[begin:].replace(_OPEN, "?"), special=True))

    def _guard(self, text: str, literals: list[str]) -> str:
        def replace(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"{_OPEN}{len(literals) - 1}{_CLOSE}"

        return self._guarded.sub(replace, text)


def _tokenize(llm: Llama, text: str, *, special: bool) -> list[int]:
    return llm.tokenize(text.encode(), add_bos=False, special=special) if text else []


def token_bytes(llm: Llama, token: int) -> bytes:
    """A generated token as text: control tokens are silent, except the marks of a thought."""
    if not llm.is_control(token):
        return llm.token_bytes(token)
    text = llm.token_text(token)
    return text.encode() if text in MARKS else b""
