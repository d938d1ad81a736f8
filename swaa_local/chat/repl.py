"""The interactive loop of a chat: reads lines with editing and history, runs commands, prints replies.

Knows prompt_toolkit; what commands do is in `commands`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document as EditedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output

from swaa_local.chat.commands import COMMANDS, run_command, say_dropped
from swaa_local.chat.session import Session
from swaa_local.chat.terminal import Terminal
from swaa_local.engine.crash import interruptible_at_once
from swaa_local.errors import PromptTooLong, SWAAError
from swaa_local.generation.thinking import Piece

_FENCE = '"""'
_ROOM = "/drop forgets the oldest messages, and /set ctx {} makes the context larger"


class ReadLine(Protocol):
    """Shows a prompt, and a text to edit if there is one; raises EOFError and KeyboardInterrupt."""

    def __call__(self, prompt: str, *, default: str = "") -> str: ...


def converse(
    session: Session,
    terminal: Terminal,
    read_line: ReadLine | None = None,
    *,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Talk until /exit, the end of input, or Ctrl-C twice. after_each: called when a line has been dealt with.

    read_line: default is prompt_toolkit's.
    """
    read_line = read_line or _line_editor()
    stopped = False  # the last thing was a Ctrl-C
    draft = ""
    while True:
        try:
            message = _read_message(read_line, draft)
        except EOFError:
            return
        except KeyboardInterrupt:
            if stopped:
                return
            stopped = True
            terminal.note("press Ctrl-C again to quit (Ctrl-D and /exit quit too)")
            continue
        except Exception as error:
            if read_line is _plain_line:  # the terminal is gone
                raise
            terminal.error(f"{_describe(error)}; going on without line editing")
            read_line = _plain_line
            continue
        stopped, draft = False, ""
        try:
            leave, stopped, draft = _respond(session, terminal, message)
            after_each()
            if leave:
                return
            if draft and read_line is _plain_line:
                terminal.note(f"it was: {draft}")
        except KeyboardInterrupt:
            stopped = True
        except Exception as error:
            # A mistake of ours, or of the system. What was said so far must outlive it.
            terminal.error(_describe(error))
            if session.turns:
                terminal.note("the conversation is still here; /save PATH writes it to a file")


def _respond(session: Session, terminal: Terminal, message: str) -> tuple[bool, bool, str]:
    """Answer a line: whether to leave, whether the answer was stopped by Ctrl-C, and what to edit next."""
    try:
        pieces: Iterator[Piece] | None
        if message.startswith("/"):
            outcome = run_command(session, message, terminal.note)
            if outcome.leave or outcome.edit:
                return outcome.leave, False, outcome.edit
            pieces = outcome.reply
        else:
            pieces = session.ask(message) if message else None
        if pieces is not None:
            return False, _say_and_make_room(session, terminal, pieces, message), ""
    except PromptTooLong as error:
        terminal.error(too_long(error, session, conversing=True))
        if session.pending:
            session.pending = []
            terminal.note("the documents of this message were removed; /read adds them again")
    except SWAAError as error:
        terminal.error(str(error))
    return False, False, ""


def _say_and_make_room(session: Session, terminal: Terminal, pieces: Iterator[Piece], message: str) -> bool:
    """`say_reply`; where the model sees a window alone, the oldest messages make room by themselves."""
    try:
        return say_reply(session, terminal, pieces, conversing=True)
    except PromptTooLong:
        if not session.forgets_by_itself or not session.turns or message.startswith("/"):
            raise
    dropped = session.drop_to_fit(message)
    say_dropped(dropped, terminal.note)
    window = session.llm.schedule.window if session.llm.schedule else 0
    terminal.note(f"the context of {session.llm.n_ctx()} positions was full; the model saw the last {window} of it")
    return say_reply(session, terminal, session.ask(message), conversing=True)


def _describe(error: Exception) -> str:
    """What the system says, or what happened in our own terms: there is nothing that the user could do otherwise."""
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"swaa-local has made a mistake, please report it ({type(error).__name__}: {error})"


def say_reply(session: Session, terminal: Terminal, pieces: Iterator[Piece], *, conversing: bool) -> bool:
    """Print a reply and its figures; True if it was interrupted. conversing: what is advised can be typed, and what
    the command line says is over."""
    terminal.show_thinking = not session.settings.hide_thinking
    session.llm.on_prefill = terminal.reads(session.llm, session.rates)
    interrupted = False
    with closing(pieces), terminal.quiet_keyboard():  # type: ignore[type-var]
        try:
            terminal.reply(pieces)
        except KeyboardInterrupt:  # while printing; the session keeps what there is
            interrupted = True
    session.rates.save()
    interrupted = interrupted or session.finish == "interrupted"
    if interrupted and session.replied:
        terminal.note("stopped")
    elif interrupted:
        _keep_read(session, terminal, conversing=conversing)
    elif session.finish == "length" and not session.settings.max_tokens:
        limit = "max-tokens 0; your message is not kept, its documents go with the next one" if conversing else "-n 0"
        terminal.note(f"the prompt was read, and nothing is written with {limit}")
    elif session.finish == "length":
        more = "/set max-tokens" if conversing else "-n"
        terminal.note(f"stopped after {session.settings.max_tokens} tokens; {more} allows more")
    elif session.finish == "context":
        n_ctx = session.llm.n_ctx()
        more = _ROOM.format(2 * n_ctx) if conversing else "a larger -c holds more"
        if session.forgets_by_itself and conversing:
            more = "your next message takes the place of the oldest ones"
        terminal.note(f"the context of {n_ctx} tokens is full, so the answer is cut; {more}")
    elif session.finish == "loop":
        off = "/set loop-guard off" if conversing else "--no-loop-guard"
        terminal.note(
            f"stopped: the answer says the same {session.loop_tokens} tokens over and over; a higher temperature or a "
            f"repeat penalty of 1.1 may help, and {off} lets it go on"
        )
    if session.stats and session.stats.has_read:
        terminal.figures(session.stats, session.llm.kv_bytes)
    return interrupted


def _keep_read(session: Session, terminal: Terminal, *, conversing: bool) -> None:
    """What was read of a message that was stopped, for the next time."""

    def announce() -> None:
        if terminal.shows:
            terminal.note("keeping what was read; Ctrl-C gives that up")

    with nullcontext() if conversing else interruptible_at_once():
        n_kept = session.keep_read(announce)
    early = "stopped before the answer began" + ("; your message is not kept" if conversing else "")
    if n_kept and session.stats:
        n_prompt = session.stats.prompt_tokens
        early += (
            f", but the first {n_kept:,} of its {n_prompt:,} tokens are, and with the same text it goes on there"
            if conversing
            else f"; {n_kept:,} of {n_prompt:,} tokens are read and kept, and the same command goes on there"
        )
    terminal.note(early)


def too_long(error: PromptTooLong, session: Session, *, conversing: bool) -> str:
    """The error in the command line's terms, or in those of a conversation."""
    trained = session.llm.n_ctx_train()
    beyond = f" (the model was trained for {trained})" if error.n_ctx_needed > trained else ""
    if not conversing:
        return error.advice("-c {}", "the file" if session.pending else "it") + beyond
    shorten = f"shorten the {'file' if session.pending else 'message'}"
    larger = f"/set ctx {error.n_ctx_needed}"
    room = _ROOM.format(error.n_ctx_needed) if session.turns else f"{shorten}, or make it larger with {larger}"
    room += beyond
    return f"with this message there are {error.n_prompt} tokens but the context is {error.n_ctx}; {room}"


def _read_message(read_line: ReadLine, draft: str = "") -> str:
    line = (read_line(">>> ", default=draft) if draft else read_line(">>> ")).strip()
    if not line.startswith(_FENCE):
        return line
    lines = [line.removeprefix(_FENCE)]
    while not lines[-1].rstrip().endswith(_FENCE):
        lines.append(read_line("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    # A fence makes everything text, a leading slash too.
    text = "\n".join(lines).strip()
    return f" {text}" if text.startswith("/") else text


def _line_editor() -> ReadLine:
    stream = sys.stderr if sys.stderr.isatty() else sys.stdout
    if not stream.isatty():
        return _plain_line
    editor: PromptSession[str] = PromptSession(
        history=_history(), output=create_output(stdout=stream), completer=_Commands(), complete_while_typing=False
    )

    def read(prompt: str, *, default: str = "") -> str:
        return editor.prompt(prompt, default=default)

    return read


def _plain_line(prompt: str, *, default: str = "") -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


class _Commands(Completer):
    """Completes command names, and paths where a command takes one."""

    _paths = PathCompleter(expanduser=True)

    def get_completions(self, document: EditedText, complete_event: object) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not name.startswith("/"):
            return
        if not space:
            yield from (Completion(f"/{known}", -len(text)) for known in COMMANDS if known.startswith(name[1:]))
        elif name in ("/read", "/file", "/save", "/load"):
            path = EditedText(argument.removeprefix("-f "))
            yield from self._paths.get_completions(path, complete_event)  # type: ignore[arg-type]


class _QuietFileHistory(FileHistory):
    """A history that nobody misses: a file that cannot be read or written is no reason to fail."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            yield from list(super().load_history_strings())
        except (OSError, UnicodeError):
            return

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except (OSError, UnicodeError):
            return


def _history() -> History:
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "swaa-local"
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        history = state / "chat_history"
        history.touch(mode=0o600)
        history.chmod(0o600)  # whatever the folder is, and if an earlier version made it
    except (OSError, RuntimeError):  # no home
        return InMemoryHistory()
    return _QuietFileHistory(str(history))
