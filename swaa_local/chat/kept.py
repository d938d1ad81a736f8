"""Conversations that go on tomorrow: a file each, and what the model made of them in the prefix cache.

Knows sessions and files; nothing of terminals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from swaa_local.chat.session import ChatError, Session
from swaa_local.chat.store import Conversation, StoreError, load_conversation, save_conversation
from swaa_local.files.user_dirs import state_dir

LAST = "last"
"""The session of a chat that was given no name."""
_NAME = re.compile(r"\w[\w.-]{0,99}")


def session_path(name: str | None, *, continues: bool = False) -> Path | None:
    """Where the session of this name is kept; None without a name. continues: the one that was used last is meant.

    Raises `ChatError` for a name that no file should have, and if there is no session to go on with.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ChatError(f"a session's name is made of letters, digits, dots, - and _, not {name!r}")
    directory = state_dir() / "sessions"
    if name is not None:
        path = directory / f"{name}.json"
        if continues and not path.exists():
            raise ChatError(f"there is no session {name!r}; without --continue it begins one")
        return path
    if not continues:
        return None
    files = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ChatError("there is no conversation to go on with; chat keeps its last one, and --session NAME names one")
    return files[-1]


def conversation_of(session: Session) -> Conversation:
    """A session as it is saved."""
    return Conversation(
        turns=tuple(session.turns),
        system=session.settings.system,
        pending=tuple(session.pending),
        model=os.path.abspath(session.llm.model_path),  # it may go on in another directory
    )


def take_up(session: Session, path: Path, *, system: str = "") -> None:
    """Go on with a saved conversation, without reading it again if the cache has it. Raises `StoreError`.

    system: a system message to take instead of its own.
    """
    conversation = load_conversation(str(path))
    session.turns, session.pending = list(conversation.turns), list(conversation.pending)
    session.set(system=system or conversation.system)
    if session.llm.prefixes:
        session.llm.prefixes.load_conversation(str(path.absolute()))


def keep_cells(session: Session, path: Path) -> None:
    """Keep what the model made of a conversation that was saved here."""
    if session.llm.prefixes and session.turns:
        session.llm.prefixes.save_conversation(str(path.absolute()))


class Keeper:
    """Keeps a session's conversation in a file, from one line to the next. path None: keeps nothing."""

    def __init__(self, session: Session, path: Path | None, note: Callable[[str], None]) -> None:
        self._session, self._path, self._note = session, path, note
        self._kept = conversation_of(session)
        self._changed = False

    def keep(self) -> None:
        """Write the conversation if it has changed. What cannot be written is noted once."""
        conversation = conversation_of(self._session)
        if self._path is None or conversation == self._kept:
            return
        if not conversation.turns and not self._kept.turns:  # nothing was said
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_conversation(str(self._path), conversation, overwrite=True, private=True)
        except (StoreError, OSError) as error:
            self._note(f"the conversation is not kept: {error}")
            self._path = None
            return
        self._kept, self._changed = conversation, True

    def end(self) -> None:
        """Keep what the model made of the conversation, so that it is not read again."""
        if self._path is not None and self._changed:
            keep_cells(self._session, self._path)
