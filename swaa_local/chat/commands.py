"""The slash commands of a chat, as functions on a session.

Knows sessions and files; what they say goes through a callback, so nothing here knows a terminal.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaa_local.chat.kept import conversation_of, keep_cells, take_up
from swaa_local.chat.session import Session, Turn
from swaa_local.chat.settings import SETTING_NAMES, ChatError
from swaa_local.chat.store import load_conversation, save_conversation
from swaa_local.errors import PromptTooLong
from swaa_local.files.document import DocumentError
from swaa_local.files.document_files import read_documents
from swaa_local.files.user_input import pasted_path, require_utf8, user_path
from swaa_local.generation.thinking import Piece
from swaa_local.model_file.adapter import Adapter
from swaa_local.model_file.model_info import read_model_info
from swaa_local.schedule.config import MAX_TOKENS
from swaa_local.schedule.text import in_one_line
from swaa_local.text.printable import shortened
from swaa_local.text.units import format_bytes

HELP = """\
/read PATH        add a text, or all texts of a directory or a pattern, to your next message
/regen            answer the last message anew
/edit [TEXT]      change your last message, and get another answer
/undo             take your last message and its answer back
/system [TEXT]    set the system message; alone it removes it
/set NAME VALUE   change a setting for the next answers; /set alone shows them
/set ctx N        a context of N tokens; the conversation goes on
/drop [N]         forget the N oldest messages with their answers, to make room
/clear            forget the conversation
/info             the model, its schedule and the context
/swaa on|off      use the schedule, or full attention; the conversation goes on
/save [-f] PATH   write the conversation to a file; -f overwrites it
/load PATH        go on with a saved conversation
/help             this list
/exit             quit (also /bye, /quit, Ctrl-D)
\"""               begins and ends a message of several lines
Ctrl-C stops an answer; a second Ctrl-C quits."""

NO_SYSTEM = "this model's chat template leaves out the system message, so it changes nothing"


@dataclass(frozen=True)
class Outcome:
    """What the chat does after a command: leave, print a reply, or let the user edit a line."""

    leave: bool = False
    reply: Iterator[Piece] | None = None
    edit: str = ""


Say = Callable[[str], None]
Command = Callable[[Session, str, Say], Outcome | None]


def run_command(session: Session, line: str, say: Say) -> Outcome:
    """Run `/name argument`. Raises `SWAAError` where it cannot be done; nothing is changed then."""
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        close = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        hint = f"did you mean /{close[0]}?" if close else "/help lists them"
        if "/" in name:  # a file that was dropped on the terminal
            hint = f"to read a file: /read {line}"
        raise ChatError(f"there is no command /{name}; {hint}")
    return command(session, argument.strip(), say) or Outcome()


def _read(session: Session, argument: str, say: Say) -> None:
    path = _path("/read PATH", argument)
    if path == "-":
        raise DocumentError("/read needs a file; standard input is the keyboard")
    documents = read_documents(path, say)
    counts = [len(session.llm.tokenize(document.text.encode(), add_bos=False)) for document in documents]
    room, name = session.llm.n_ctx(), documents[0].name if len(documents) == 1 else f"{len(documents)} texts"
    if sum(counts) >= room:
        larger = f"/set ctx {PromptTooLong(sum(counts), room).n_ctx_needed} makes room"
        raise ChatError(f"{name} is {sum(counts)} tokens but the context is {room}; {larger}")
    session.pending += documents
    for document, n_tokens in zip(documents, counts, strict=True):
        say(f"{document.name}: {n_tokens:,} tokens, goes with your next message")


def _clear(session: Session, argument: str, say: Say) -> None:
    _no_argument("/clear", argument)
    session.clear()
    say("cleared")


def _regen(session: Session, argument: str, _say: Say) -> Outcome:
    _no_argument("/regen", argument)
    return Outcome(reply=session.regenerate())


def _undo(session: Session, argument: str, say: Say) -> None:
    _no_argument("/undo", argument)
    question = session.undo()
    say(f"taken back: {shortened(question.text)}")
    _note_documents(session, say)


def _edit(session: Session, argument: str, say: Say) -> Outcome:
    if argument:
        argument = require_utf8(argument, "the message")
    question = session.undo()
    _note_documents(session, say)
    return Outcome(reply=session.ask(argument)) if argument else Outcome(edit=question.text)


def _note_documents(session: Session, say: Say) -> None:
    if session.pending:
        say(f"{', '.join(document.name for document in session.pending)}: goes with your next message")


def _drop(session: Session, argument: str, say: Say) -> None:
    if argument and not (argument.isdecimal() and int(argument)):
        raise ChatError(f"/drop takes a number of messages, 1 or more, not {argument!r}")
    say_dropped(session.drop(int(argument or 1)), say)


def say_dropped(dropped: Sequence[Turn], say: Say) -> None:
    """What was forgotten of a conversation."""
    questions = [turn for turn in dropped if turn.role == "user"]
    documents = [document.name for turn in questions for document in turn.documents]
    what = "1 message and its answer" if len(questions) == 1 else f"{len(questions)} messages and their answers"
    files = f", with {', '.join(documents)}" if documents else ""
    say(f"forgotten: {what}{files}; the first was: {shortened(questions[0].text)}")


def _system(session: Session, argument: str, say: Say) -> None:
    _set(session, f"system {argument}", say)


def _resize(session: Session, value: str, say: Say) -> None:
    if not (value.isdecimal() and 0 < int(value) <= MAX_TOKENS):
        raise ChatError(f"ctx is a number of tokens, 1 to {MAX_TOKENS}, not {value!r}")
    session.resize(int(value))
    say(f"context {session.llm.n_ctx():,} tokens, KV {format_bytes(session.llm.kv_bytes)}")


def _set(session: Session, argument: str, say: Say) -> None:
    if not argument:
        say(f"ctx {session.llm.n_ctx()}")
        for name in SETTING_NAMES:
            say(f"{name.replace('_', '-')} {_shown(name, getattr(session.settings, name))}")
        return
    name, _, value = argument.partition(" ")
    field = name.lstrip("-").replace("-", "_").lower()
    if field in ("ctx", "n_ctx", "num_ctx"):
        return _resize(session, value.strip(), say)
    if field not in SETTING_NAMES:
        raise ChatError(f"there is no setting {name!r}; they are ctx, {', '.join(SETTING_NAMES).replace('_', '-')}")
    parsed = _parse_setting(field, value.strip())
    session.set(**{field: parsed})
    say(f"{field.replace('_', '-')} {_shown(field, parsed)}")
    if field == "system":
        _note_lost_system(session, say)
    if field == "think" and parsed is not None and not session.template.has_thinking_switch:
        say("this model's chat template has no switch for thinking, so this changes nothing")
    return None


def _note_lost_system(session: Session, say: Say) -> None:
    if session.settings.system and "system" in session.template.leaves_out:
        say(NO_SYSTEM)


_SWITCH = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}
_LEAST = {"temp": 0.0, "top_p": 0.0, "min_p": 0.0, "repeat_penalty": 0.0, "top_k": 0, "max_tokens": -1, "seed": -1}
_MOST = {"top_p": 1.0, "min_p": 1.0, "seed": (1 << 32) - 1}


def _parse_setting(name: str, value: str) -> Any:
    if name == "system":
        return require_utf8(value, "the system message")
    if name == "think" and value == "auto":
        return None
    if name in ("think", "hide_thinking", "loop_guard"):
        if value.lower() not in _SWITCH:
            raise ChatError(
                f"{name.replace('_', '-')} is on or off{' or auto' if name == 'think' else ''}, not {value!r}"
            )
        return _SWITCH[value.lower()]
    kind = int if name in ("top_k", "max_tokens", "seed") else float
    try:
        number = kind(value)
    except ValueError:
        raise ChatError(f"{name.replace('_', '-')} is a number, not {value!r}") from None
    least, most = _LEAST[name], _MOST.get(name, math.inf)
    if not least <= number <= most or (kind is float and not math.isfinite(number)):
        bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ChatError(f"{name.replace('_', '-')} must be {bounds}, not {value}")
    return number


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "auto (the model's template decides)"
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "max_tokens" and value == 0:
        return "0 (the prompt is read, and nothing written)"
    if name == "max_tokens" and value < 0:
        return f"{value} (until the context is full)"
    if name == "seed" and value < 0:
        return f"{value} (a new one each time)"
    return str(value) if value != "" else "(none)"


def _info(session: Session, argument: str, say: Say) -> None:
    _no_argument("/info", argument)
    llm = session.llm
    say(f"model      {llm.model_path} ({llm.description()})")
    if llm.lora_path:
        say(f"adapter    {Adapter(Path(llm.lora_path), llm.lora_scale)}")
    say(f"schedule   {in_one_line(llm.schedule)}")
    say(f"context    {llm.n_tokens:,} of {llm.n_ctx():,} tokens, KV {format_bytes(llm.kv_bytes)}")
    say(f"batches    n_batch {llm.n_batch}, n_ubatch {llm.context_params.n_ubatch}, flash attention {_flash(llm)}")
    say(f"threads    {llm.n_threads} to generate, {llm.n_threads_batch} to read")
    documents = [d for turn in session.turns for d in turn.documents] + session.pending
    if documents:
        say("documents  " + ", ".join(f"{d.name} ({len(d.text):,} characters)" for d in documents))


def _flash(llm: Any) -> str:
    return {-1: "auto", 0: "off", 1: "on"}.get(llm.context_params.flash_attn_type, "unknown")


def _swaa(session: Session, argument: str, say: Say) -> None:
    if argument.lower() not in ("on", "off"):
        raise ChatError("write /swaa on or /swaa off")
    session.switch(full=argument.lower() == "off")
    if not session.full and session.llm.schedule is None:
        reason = read_model_info(session.llm.model_path).unsupported
        raise ChatError(
            f"no schedule can apply: {reason}"
            if reason
            else "this model has no schedule; start with --window or --preset to give it one"
        )
    say(in_one_line(session.llm.schedule))


def _save(session: Session, argument: str, say: Say) -> None:
    overwrite = argument.startswith("-f ")
    path = _path("/save [-f] PATH", argument.removeprefix("-f "))
    save_conversation(path, conversation_of(session), overwrite=overwrite)
    keep_cells(session, user_path(path))
    say(f"saved {len(session.turns)} messages to {path}")


def _load(session: Session, argument: str, say: Say) -> None:
    path = _path("/load PATH", argument)
    differences = take_up(session, load_conversation(path), user_path(path))
    _note_lost_system(session, say)
    say(f"loaded {len(session.turns)} messages from {path}")
    if differences:
        say(f"unlike there: {'; '.join(differences)}")


def _help(_session: Session, _argument: str, say: Say) -> None:
    for line in HELP.splitlines():
        say(line)


def _exit(_session: Session, argument: str, _say: Say) -> Outcome:
    _no_argument("/exit", argument)
    return Outcome(leave=True)


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ChatError(f"{name} takes nothing after it, but there is {argument!r}")


def _path(usage: str, argument: str) -> str:
    path = pasted_path(argument)
    if not path:
        raise ChatError(f"which file? {usage}")
    return path


COMMANDS: dict[str, Command] = {
    "read": _read,
    "file": _read,
    "clear": _clear,
    "regen": _regen,
    "edit": _edit,
    "undo": _undo,
    "drop": _drop,
    "system": _system,
    "set": _set,
    "info": _info,
    "swaa": _swaa,
    "save": _save,
    "load": _load,
    "help": _help,
    "exit": _exit,
    "quit": _exit,
    "bye": _exit,
}
