"""Conversations in JSON files: complete under their name or not at all.

Knows the format; nothing of models or terminals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from swaa_local.chat.session import Turn
from swaa_local.chat.setup import Setup
from swaa_local.errors import SWAAError
from swaa_local.files.document import Document
from swaa_local.files.input_file import read_input
from swaa_local.files.output_file import OutputError, OutputExists, write_output
from swaa_local.files.user_input import require_utf8, user_path

_FORMAT, _VERSION = "swaa-local-chat", 1


class StoreError(SWAAError):
    """A conversation that cannot be written or read; the message names the file and the reason."""


@dataclass(frozen=True)
class Conversation:
    """What is saved: turns with their documents, the system message, documents not yet sent, and what the model ran
    with; a setup of None: an earlier version saved it."""

    turns: tuple[Turn, ...]
    system: str = ""
    pending: tuple[Document, ...] = ()
    model: str = ""
    setup: Setup | None = None


def save_conversation(path: str, conversation: Conversation, *, overwrite: bool = False, private: bool = False) -> None:
    """Write a file. Raises `StoreError`, also if it exists and `overwrite` is not set. private: for its owner alone."""
    target = user_path(path)
    if target.is_dir():
        raise StoreError(f"{path} is a directory; name a file in it")
    data = {"format": _FORMAT, "version": _VERSION, **asdict(replace(conversation, setup=None))}
    data["setup"] = conversation.setup.as_dict() if conversation.setup else None
    try:
        text = json.dumps(data, ensure_ascii=False, indent=1)
        write_output(target, text.encode(errors="backslashreplace"), force=overwrite, private=private)
    except OutputExists:
        raise StoreError(f"{path} exists; /save -f {path} overwrites it") from None
    except OutputError as error:
        raise StoreError(str(error)) from None
    except ValueError as error:  # a zero byte in the path
        raise StoreError(f"cannot write {path}: {error}") from None


def load_conversation(path: str) -> Conversation:
    """Read a file that `save_conversation` wrote. Raises `StoreError`."""
    try:
        data = json.loads(read_input(user_path(path), path))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not a saved conversation: {error}") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise StoreError(f"{path} is not a saved conversation")
    if data.get("version") != _VERSION:
        raise StoreError(f"{path} has version {data.get('version')!r}, but this program reads version {_VERSION}")
    try:
        return Conversation(
            turns=tuple(_turn(turn) for turn in data["turns"]),
            system=_text(data["system"]),
            pending=_documents(data["pending"]),
            model=str(data["model"]),
            setup=Setup.from_dict(data["setup"]) if data.get("setup") else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error!r}") from None


def _turn(data: Any) -> Turn:
    role = data["role"]
    if role not in ("user", "assistant"):
        raise ValueError(f"role {role!r}")
    return Turn(role, _text(data["text"]), _text(data["thinking"]), _documents(data["documents"]))


def _documents(data: Sequence[Any]) -> tuple[Document, ...]:
    return tuple(Document(_text(item["name"]), _text(item["text"])) for item in data)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return require_utf8(value, "a text of it")
