"""Conversations to tune on, from a file of JSON lines. Knows files; nothing of models, tokens or PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaa_local.tasks.datasets import json_rows
from swaa_local.tune.request import TuneError

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, text); the last is the answer to learn. where: for messages about it."""

    messages: tuple[tuple[str, str], ...]
    where: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """What comes before the answer, as templates take it."""
        return [{"role": role, "content": text} for role, text in self.messages[:-1]]

    @property
    def answer(self) -> str:
        return self.messages[-1][1]


def read_conversations(path: Path) -> list[Conversation]:
    """One for each answer: `prompt` and `answer` of a line, or each assistant's message of its `messages`.

    Raises `TuneError` or `TaskError`, naming the line.
    """
    if not path.is_file():
        raise TuneError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file")
    found: list[Conversation] = []
    for where, row in json_rows(path):
        found += _conversations(row, where)
    if not found:
        raise TuneError(f"{path} has no line with an answer")
    return found


def _conversations(row: Mapping[str, Any], where: str) -> list[Conversation]:
    if "messages" in row:
        return _of_messages(row["messages"], where)
    if "prompt" in row and "answer" in row:
        messages = (
            ("user", _text(row["prompt"], "prompt", where)),
            ("assistant", _text(row["answer"], "answer", where)),
        )
        return [Conversation(messages, where)]
    raise TuneError(f"{where} has the fields {', '.join(row) or 'none'}; needed are prompt and answer, or messages")


def _of_messages(rows: Any, where: str) -> list[Conversation]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TuneError(f"{where}: messages is not a list of objects with role and content")
    messages: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        role = row.get("role")
        if role not in _ROLES:
            raise TuneError(f"{where}: message {number} has the role {role!r}, expected {', '.join(_ROLES)}")
        messages.append((role, _text(row.get("content"), f"content of message {number}", where)))
    ends = [i for i, (role, _) in enumerate(messages) if role == "assistant" and i > 0]
    if not ends:
        raise TuneError(f"{where}: no message of the assistant after one of the user, so there is nothing to learn")
    return [Conversation(tuple(messages[: end + 1]), where) for end in ends]


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TuneError(f"{where}: {field} is {value!r}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TuneError(f"{where}: {field} has half of a character that takes two (a lone surrogate)") from None
    return value
