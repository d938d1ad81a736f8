"""What it means that a signal ended a process: its name, and what to try. Knows signals; no processes and no engine."""

from __future__ import annotations

import signal

REBUILD = (
    "`uv sync --reinstall-package llama-cpp-python`, or with pip "
    "`pip install --force-reinstall --no-deps ./patches`, in a checkout of swaa-local"
)
"""Builds the engine for this machine, whatever a cache holds; llama_cpp._sentinel says the same."""
LESS_MEMORY = "take a smaller context or model, or close other programs"
ENGINE = "the engine"

_ADVICE = {
    "SIGILL": "{culprit} used an instruction that this CPU lacks: {mend}",
    "SIGKILL": "unless somebody killed it, the memory ran out: {memory}",
    "SIGBUS": "a file could not be read or written: was it cut or replaced meanwhile, is its disk full or gone?",
    "SIGXCPU": "the limit of CPU time is reached: see ulimit -t",
    "SIGXFSZ": "the limit of a file's size is reached: see ulimit -f",
    "SIGSYS": "the sandbox that it runs in forbids what it needs",
}
_BUG = "a broken model file, or a bug of {culprit}: -v shows its log, for a report"
FAULTS = ("SIGABRT", "SIGSEGV", "SIGFPE", "SIGTRAP")
"""What a program does to itself, by an assertion or by mistake."""


def name_of(number: int) -> str:
    """`SIGSEGV` for 11; a number without a name as `signal 40`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def advice(name: str, memory: str = LESS_MEMORY, culprit: str = ENGINE) -> str:
    """What to try after this signal. memory: how the program is made to take less of it. culprit: the code that ran."""
    mend = f"build it for this machine with {REBUILD}" if culprit == ENGINE else "install a build for this CPU"
    text = _ADVICE.get(name) or (_BUG if name in FAULTS else "another program asked it to end")
    return text.format(memory=memory, culprit=culprit, mend=mend)


def ended_by(number: int, what: str, *, reason: str = "", memory: str = LESS_MEMORY, culprit: str = ENGINE) -> str:
    """`what` was ended by this signal: a sentence. reason: the program's own last words, if they say why."""
    name = name_of(number)
    return f"{what} was ended by {name}{': ' if reason else ''}{reason}; {advice(name, memory, culprit)}"
