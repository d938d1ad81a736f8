"""Conversations that go on tomorrow: a file each, and what the model made of them in the prefix cache.

Knows sessions and files; nothing of terminals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path

from swaa_local.chat.session import Session
from swaa_local.chat.settings import ChatError
from swaa_local.chat.store import Conversation, StoreError, load_conversation, save_conversation
from swaa_local.files.lock import Locked, NameLock
from swaa_local.files.user_dirs import state_dir

LAST = "last"
"""The session of a chat that was given no name."""
_NAME = re.compile(r"\w[\w.-]{0,99}")


class SessionFile:
    """Where one conversation is kept, by one chat at a time. Raises `Locked` if another one has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _locked(path)
        self._seen = _stamp(path)

    def read(self) -> Conversation | None:
        """What is there; None if nothing is. Raises `StoreError`."""
        if not self.path.exists():
            return None
        self._seen = _stamp(self.path)
        return load_conversation(str(self.path))

    def write(self, conversation: Conversation) -> str | None:
        """Keep it in place of what we read or wrote; a note if that is another name, as another program has changed
        the file. Raises `StoreError` and OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note = None
        if _stamp(self.path) not in (self._seen, None):
            name = self.path.stem
            self._take_free_name()
            note = (
                f"another program has changed the session {name!r} meanwhile: that stays, and this conversation is "
                f"kept as {self.path.stem!r}"
            )
        save_conversation(str(self.path), conversation, overwrite=True, private=True)
        self._seen = _stamp(self.path)
        return note

    def _take_free_name(self) -> None:
        for path in _further_names(self.path):
            if path.exists():
                continue
            try:
                lock = _locked(path)
            except Locked:
                continue
            self.close()
            self.path, self._lock = path, lock
            return

    def close(self) -> None:
        """Another chat may have it."""
        if self._lock is not None:
            self._lock.release()


def _locked(path: Path) -> NameLock | None:
    """None where nothing can be written: then nothing will be kept, either."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return NameLock(path.with_name(f".{path.stem}.lock"))
    except OSError:
        return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _further_names(path: Path) -> Iterator[Path]:
    return (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))


def open_session(name: str | None, *, continues: bool = False) -> SessionFile | None:
    """The file of the session of this name; None without a name. continues: the one that was used last is meant.

    Raises `ChatError` for a name that no file should have, if there is no session to go on with, and if another chat
    has it.
    """
    path = _session_path(name, continues=continues)
    if path is None:
        return None
    try:
        return SessionFile(path)
    except Locked as error:
        process = f" (process {error.process_id})" if error.process_id else ""
        raise ChatError(
            f"the session {path.stem!r} is in use by another chat{process}; end that one, or pass --session with "
            "another name"
        ) from None


def open_last() -> tuple[SessionFile, str | None]:
    """A file for a chat that was given no name; and a note if others are such chats, too."""
    first = state_dir() / "sessions" / f"{LAST}.json"
    for path in chain([first], _further_names(first)):
        try:
            file = SessionFile(path)
        except Locked:
            continue
        if path == first:
            return file, None
        return file, f"another chat keeps its conversation as {LAST!r}; this one is kept as {path.stem!r}"
    raise AssertionError


def _session_path(name: str | None, *, continues: bool) -> Path | None:
    if name is not None and not _NAME.fullmatch(name):
        raise ChatError(f"a session's name is made of letters, digits, dots, - and _, not {name!r}")
    if name is None and not continues:
        return None
    directory = state_dir() / "sessions"
    if name is not None:
        path = directory / f"{name}.json"
        if continues and not path.exists():
            raise ChatError(f"there is no session {name!r}; without --continue it begins one")
        return path
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
        setup=session.setup,
    )


def take_up(session: Session, conversation: Conversation, path: Path, *, system: str = "") -> list[str]:
    """Go on with a conversation that was saved here, without reading it again if the cache has it.

    system: a system message to take instead of its own. Gives what is another thing than before.
    """
    session.turns, session.pending = list(conversation.turns), list(conversation.pending)
    session.set(system=system or conversation.system)
    if session.llm.prefixes:
        session.llm.prefixes.load_conversation(str(path.absolute()))
    if conversation.model and not _same_file(conversation.model, session.llm.model_path):
        return [f"model {session.llm.model_path} (before: {conversation.model})"]
    if conversation.setup is None or session.setup is None:
        return []
    return session.setup.differences(conversation.setup)


def _same_file(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def keep_cells(session: Session, path: Path) -> None:
    """Keep what the model made of a conversation that was saved here."""
    if session.llm.prefixes and session.turns:
        session.llm.prefixes.save_conversation(str(path.absolute()))


class Keeper:
    """Keeps a session's conversation in a file, from one line to the next. file None: keeps nothing."""

    def __init__(self, session: Session, file: SessionFile | None, note: Callable[[str], None]) -> None:
        self._session, self._file, self._note = session, file, note
        self._kept = conversation_of(session)
        self._changed = False

    def keep(self) -> None:
        """Write the conversation if it has changed. What cannot be written is noted once."""
        conversation = conversation_of(self._session)
        if self._file is None or conversation == self._kept:
            return
        if not conversation.turns and not self._kept.turns:  # nothing was said
            return
        try:
            note = self._file.write(conversation)
        except (StoreError, OSError) as error:
            self._note(f"the conversation is not kept: {error}")
            self._file = None
            return
        if note:
            self._note(note)
        self._kept, self._changed = conversation, True

    def end(self) -> None:
        """Keep what the model made of the conversation, so that it is not read again."""
        if self._file is not None and self._changed:
            keep_cells(self._session, self._file.path)
