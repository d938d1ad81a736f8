"""`swaa-local chat`: talk to a model about long texts.

Puts session, terminal and loop together. Knows the command's options; each part knows its own business.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from dataclasses import replace
from pathlib import Path

from swaa_local.chat.commands import NO_SYSTEM
from swaa_local.chat.kept import Keeper, open_last, take_up
from swaa_local.chat.opening import ModelOpener
from swaa_local.chat.repl import converse, say_reply, too_long
from swaa_local.chat.request import ChatOptions
from swaa_local.chat.results import reply_as_dict
from swaa_local.chat.session import Session
from swaa_local.chat.settings import ChatError
from swaa_local.chat.terminal import Terminal
from swaa_local.errors import PromptTooLong
from swaa_local.files.document import Document, decode_document
from swaa_local.files.document_files import read_documents
from swaa_local.files.input_file import read_input
from swaa_local.files.user_dirs import NoHome
from swaa_local.files.user_input import require_utf8
from swaa_local.prefix_cache.rates import rates_path
from swaa_local.schedule.text import in_one_line
from swaa_local.text.printable import printable_json, shortened

# How long to wait for a program that may or may not write to our standard input, when there is a message anyway.
_STDIN_WAIT_S = 1.0


UNWATCHED_TOKENS = 4096
"""Of an answer that nobody watches, into a pipe or a file, where the user sets no limit."""


def chat(options: ChatOptions) -> int:
    """Run a chat and return the exit code: 0, or 130 if Ctrl-C stopped the only answer. Raises `SWAAError`."""
    terminal = Terminal(show_thinking=not options.settings.hide_thinking, quiet=options.quiet or options.as_json)
    interactive = not options.messages and sys.stdin is not None and sys.stdin.isatty()
    if interactive and options.as_json:
        raise ChatError("--json is for answers to -p, or to a question that is piped in")
    documents = [document for path in options.files for document in read_documents(path, terminal.note)]
    require_utf8(options.settings.system, "the system message")
    messages = options.messages
    for message in messages:
        if not message.strip():
            raise ChatError("no question: the text of -p is empty")
        require_utf8(message, "the message")
    if not interactive and not messages:
        if "-" in options.files:
            raise ChatError("standard input is the document, so the question must come with -p")
        data = b"" if sys.stdin is None else read_input(sys.stdin.buffer, "standard input")
        if not data.strip():
            raise ChatError("no question: standard input is empty; ask with -p TEXT")
        messages = (decode_document("standard input", data).text.strip(),)
    session, file = _open_session(options, terminal), options.session
    try:
        if options.messages and "-" not in options.files:
            documents += _piped_document(terminal)
        if file is None and interactive and options.cache_bytes is not None:
            with contextlib.suppress(NoHome):
                file, note = open_last()
                if note:
                    terminal.note(note)
        if file is not None and options.kept is not None:
            differences = take_up(session, options.kept, file.path, system=options.settings.system)
            if differences:
                terminal.note(f"unlike before: {'; '.join(differences)}")
        keeper = Keeper(session, file, terminal.note)
        session.pending += documents
        if interactive:
            _greet(session, terminal)
            converse(session, terminal, after_each=keeper.keep)
            keeper.end()
            return 0
        code = 0
        for number, message in enumerate(messages):
            if number:
                terminal.between_answers()
            if file is None:
                session.turns, session.pending = [], list(documents)
            code = _answer_once(session, terminal, message, as_json=options.as_json)
            keeper.keep()
            if code:
                break
        keeper.end()
        return code
    finally:
        session.close()
        if file is not None:
            file.close()


def _answer_once(session: Session, terminal: Terminal, message: str, *, as_json: bool) -> int:
    terminal.silent = as_json
    try:
        interrupted = say_reply(session, terminal, session.ask(message), conversing=False)
    except PromptTooLong as error:
        raise ChatError(too_long(error, session, conversing=False)) from None
    if as_json:
        terminal.result(printable_json(reply_as_dict(session, message)))
    return 130 if interrupted else 0


def _open_session(options: ChatOptions, terminal: Terminal) -> Session:
    opener = ModelOpener(options, terminal)
    options = opener.options
    rates = None
    if options.cache_bytes is not None:
        with contextlib.suppress(NoHome):
            rates = rates_path()
    session = Session(
        opener.open,
        options.settings,
        full=opener.full,
        open_sized=opener.open_sized,
        rates_path=rates,
        setup=opener.setup,
    )
    session.chosen = set(options.given)
    session.measures_first = terminal.shows
    settings = options.settings.with_defaults_of(session.llm.metadata, options.given)
    if "max_tokens" not in options.given and not sys.stdout.isatty():
        settings = replace(settings, max_tokens=UNWATCHED_TOKENS)
    session.settings = settings
    if session.llm.rpc_servers:
        terminal.note(session.llm.layers_in_words)
    if session.template.is_fallback:
        terminal.note("this model has no chat template, so ChatML is used; a base model answers poorly")
    if options.settings.system and "system" in session.template.leaves_out:
        terminal.note(NO_SYSTEM)
    if options.settings.think is not None and not session.template.has_thinking_switch:
        switch = "--think" if options.settings.think else "--no-think"
        terminal.note(f"this model's chat template has no switch for thinking, so {switch} changes nothing")
    return session


def _greet(session: Session, terminal: Terminal) -> None:
    llm = session.llm
    adapter = f" · with {Path(llm.lora_path).name}" if llm.lora_path else ""
    schedule = llm.schedule
    words = in_one_line(schedule)
    terminal.note(f"{Path(llm.model_path).name}{adapter} · context {llm.n_ctx():,} tokens · {words}")
    if schedule is not None and llm.n_ctx() <= schedule.window + schedule.sinks:
        terminal.note(f"the window of {schedule.window} tokens covers this context, so the schedule saves nothing here")
    if session.turns:
        said = [turn.text for turn in session.turns if turn.role == "user"]
        terminal.note(f"{len(session.turns)} messages so far; your last one: {shortened(said[-1]) if said else ''}")
    for document in session.pending:
        n_tokens = len(llm.tokenize(document.text.encode(), add_bos=False))
        terminal.note(f"{document.name}: {n_tokens:,} tokens, goes with your first message")
    if "assistant" in session.template.leaves_out:
        terminal.note("this model's chat template leaves out earlier answers: each message stands for itself")
    terminal.note("/help lists the commands, Ctrl-D quits")


def _piped_document(terminal: Terminal) -> list[Document]:
    """What was piped in beside a message on the command line, if anything was."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # no standard input at all
        return []
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        # Programs that run us often leave an open pipe that nobody writes to.
        ready, _, _ = select.select([sys.stdin], [], [], _STDIN_WAIT_S)
        if not ready:
            terminal.note("standard input is open but silent, so it is not read; --file - waits for it")
            return []
    elif not stat.S_ISREG(mode):
        return []
    data = read_input(sys.stdin.buffer, "standard input")
    return [decode_document("stdin", data)] if data.strip() else []
