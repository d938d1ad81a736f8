"""What a user asked of a chat: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swaa_local.chat.kept import SessionFile
from swaa_local.chat.settings import Settings
from swaa_local.chat.store import Conversation
from swaa_local.engine.options import EngineOptions
from swaa_local.schedule.choice import ScheduleOptions


@dataclass(frozen=True)
class ChatOptions:
    """The command's options; None where the user said nothing.

    messages: one question after the other about the same texts, then the program ends. given: names of the settings
    that the user chose. said: names of all parameters that stood on the command line itself, and not in a file or a
    variable: they win over what a conversation ran with. session: where the conversation is kept, and kept: what is
    there already. as_json: answers as JSON, one a line. quiet: no notes. cache_bytes: bound on what is kept of texts
    that were read; None: nothing is.
    """

    model: str
    schedule: ScheduleOptions
    settings: Settings
    given: tuple[str, ...] = ()
    said: frozenset[str] = frozenset()
    messages: tuple[str, ...] = ()
    files: Sequence[str] = ()
    n_ctx: int | None = None
    session: SessionFile | None = None
    kept: Conversation | None = None
    cache_bytes: int | None = None
    as_json: bool = False
    quiet: bool = False
    engine: EngineOptions = EngineOptions()  # noqa: RUF009 frozen
