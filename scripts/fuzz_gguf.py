#!/usr/bin/env python3
"""Give broken model files to everything that reads one, and report what did not end with one clear sentence.

    scripts/fuzz_gguf.py -n 2000 --seed 7                      # mutated files, with and without a schedule in turn
    scripts/fuzz_gguf.py -n 2000 --seed 7 --only 1234 --keep .    # one of them again, and the file itself
    scripts/fuzz_gguf.py --named                               # the faults that have a name (gguf_faults.py)
    scripts/fuzz_gguf.py -n 40 --programs serve                # slower: the server starts for each file

Each file goes to `swaa-local inspect`, `convert` and `chat` and to `Llama`, each in a child process of its own with
limits of time and memory. A fault is a signal, a traceback, a time limit, a memory limit, a control character in the
output, or an error that is not one line. Equal seeds give equal files. Exit code 1 if there were faults. Needs Linux or
macOS, the patched engine, and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads would not survive fork
os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger that looks at what aborted takes seconds

import psutil

from gguf_faults import Mutator, write_faults

PROGRAMS = ("inspect", "convert", "llama", "chat", "serve")
DEFAULT_PROGRAMS = PROGRAMS[:-1]
MODEL = Path(__file__).resolve().parents[1] / "swaa_local" / "assets" / "needle.gguf"
_MEMORY_BYTES = 1 << 30
_N_CTX = 512
# A line's end aside, no output of ours has one: a file's words must not reach the terminal as they are.
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Outcome:
    """How one program took one file. fault: None if it ended as it should. said: the last line of its stderr."""

    program: str
    fault: str | None
    said: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Limits:
    """peak_bytes: of resident memory. address_bytes: that may be reserved beside what the parent has; None: any, as a
    sanitizer needs."""

    seconds: float = 60
    peak_bytes: int = _MEMORY_BYTES
    address_bytes: int | None = 2 * _MEMORY_BYTES


def try_file(path: Path, programs: tuple[str, ...], limits: Limits) -> list[Outcome]:
    """Give the file to each program, in a child each."""
    return [_in_child(program, path, limits) for program in programs]


def _in_child(program: str, path: Path, limits: Limits) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="fuzz-gguf-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run_child(program, path, Path(folder), out, err, limits)
        status, used, late = _wait(pid, started + limits.seconds)
        seconds = time.monotonic() - started
        peak_bytes = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        said = err.read_text("utf-8", errors="backslashreplace") if err.exists() else ""
        shown = said + (out.read_text("utf-8", errors="backslashreplace") if out.exists() else "")
    fault = _judge(status, said, shown, late=late)
    if fault is None and peak_bytes > limits.peak_bytes:
        fault = f"took {peak_bytes >> 20} MiB"
    lines = [line for line in said.splitlines() if line.strip()]
    told = next((line for line in lines if "ASSERT" in line or "runtime error" in line or "ERROR:" in line), "")
    return Outcome(program, fault, (told or (lines[-1] if lines else ""))[:400], seconds, peak_bytes)


def _wait(pid: int, deadline: float) -> tuple[int, resource.struct_rusage, bool]:
    late = False
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return status, used, late
        if time.monotonic() > deadline:
            late = True
            # Its own children too, once it has got as far as a group of its own.
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _judge(status: int, said: str, shown: str, *, late: bool) -> str | None:
    if late:
        return "did not end in time"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    for sanitizer in ("runtime error:", "AddressSanitizer", "LeakSanitizer"):
        if sanitizer in said:
            return f"sanitizer: {sanitizer.rstrip(':')}"
    code = os.WEXITSTATUS(status)
    last = said.strip().splitlines()[-1:] or [""]
    if code == 1 and not last[0].startswith("swaa-local: error: "):
        return "an error without its line"
    if code not in (0, 1):
        return f"exit code {code}"
    if re.search(r"ended by signal|GGML_ASSERT|std::|bad_alloc", last[0]):
        return "a child of it was ended"
    if found := _CONTROL.search(shown):
        return f"control character {found[0]!r}"
    return None


def _run_child(program: str, path: Path, folder: Path, out: Path, err: Path, limits: Limits) -> None:
    """In the child: never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        faulthandler.disable()
        signal.alarm(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limits.address_bytes is not None:
            most = limits.address_bytes + _address_bytes()
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        code = _run(program, path, folder)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _address_bytes() -> int:
    """What this process has reserved."""
    return int(psutil.Process().memory_info().vms)


def _run(program: str, path: Path, folder: Path) -> int:
    if program == "llama":
        return _load(path)
    from swaa_local.cli.main import main
    from swaa_local.engine import crash

    # The watcher would tell _exit as SIGKILL; who waits for this child sees its signals.
    vars(crash)["watch"] = lambda *_arguments, **_keywords: None
    if program == "inspect":
        arguments = ["inspect", str(path)]
    elif program == "chat":
        arguments = ["chat", str(path), "-p", "Hi", "-n", "2", "-t", "1", "-c", str(_N_CTX)]
    elif program == "convert":
        from swaa_local.convert import quantize

        vars(quantize)["run_child"] = _fork_worker
        arguments = ["convert", str(path), "-o", str(folder / "out.gguf"), "--window", "64", "--sinks", "4"]
        arguments += ["--full-layers", "0", "--fa-decode"]
    else:
        return _serve(path)
    main.main(arguments, prog_name="swaa-local")
    return 0


def _fork_worker(_module: str, request: Mapping[str, Any], *, what: str, **_options: Any) -> list[dict[str, Any]]:
    """`run_child` for convert's engine, without the seconds that a new Python takes."""
    from swaa_local.convert.children import engine_job
    from swaa_local.files.child_process import ChildError

    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with os.fdopen(send, "w") as channel:
                engine_job.handle(dict(request), lambda **event: print(json.dumps(event), file=channel))
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as channel:
        events = [json.loads(line) for line in channel]
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        raise ChildError(f"{what} failed: it was ended by signal {os.WTERMSIG(status)}")
    if status:
        told = [str(event["error"]) for event in events if "error" in event]
        raise ChildError(told[0] if told else f"{what} failed")
    return events


def _load(path: Path) -> int:
    """What a program does with `Llama`: load, read a prompt, write two tokens."""
    from swaa_local import Llama, SWAAError
    from swaa_local.text.printable import printable

    try:
        with contextlib.closing(Llama(str(path), n_ctx=_N_CTX, n_threads=1, n_threads_batch=1)) as llm:
            print(printable(repr(llm("Hello <b>world</b>", max_tokens=2)["choices"][0]["text"])))
            if llm.schedule is not None:
                llm.set_schedule(False)
                llm("Hello", max_tokens=1)
    except SWAAError as error:
        print(f"swaa-local: error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _serve(path: Path) -> int:
    """Start the server, and end it as soon as it answers."""
    from swaa_local import SWAAError
    from swaa_local.serve.run import ServeOptions, serve
    from swaa_local.text.printable import printable

    try:
        options = ServeOptions(str(path), port=0, extra=("-c", str(_N_CTX), "-t", "1", "--no-webui"))
        code = serve(options, on_ready=lambda _ready: os.kill(os.getpid(), signal.SIGTERM))
        return 0 if code in (0, 128 + signal.SIGTERM) else code
    except SWAAError as error:
        print(f"swaa-local: error: {printable(str(error))}", file=sys.stderr)
        return 1


def mutators(model: Path) -> dict[str, Mutator]:
    """One for files with a schedule and one for files without."""
    import gguf
    from gguf.constants import Keys

    known = [
        name
        for section in vars(Keys).values()
        if isinstance(section, type)
        for attribute, name in vars(section).items()
        if isinstance(name, str) and not attribute.startswith("_") and not name.startswith(("clip.", "imatrix."))
    ]
    source, architectures = model.read_bytes(), sorted(gguf.MODEL_ARCH_NAMES.values())
    return {
        kind: Mutator(source, known_keys=sorted(known), architectures=architectures, schedule=kind == "swaa")
        for kind in ("swaa", "plain")
    }


def random_files(
    model: Path, n: int, seed: int, folder: Path, *, only: int | None = None, kinds: tuple[str, ...] = ("swaa", "plain")
) -> Iterator[tuple[str, str, Path]]:
    """(name, what was done, path) of each file, n of each kind; the path is overwritten by the next."""
    by_kind = mutators(model)
    for index in range(n) if only is None else (only,):
        for kind in kinds:
            done, data = by_kind[kind].make(f"{seed}/{index}/{kind}")
            path = folder / f"{seed}-{index}-{kind}.gguf"
            path.write_bytes(data)
            yield f"{index} {kind}", done, path
            path.unlink(missing_ok=True)


def _ready() -> None:
    """Import what the programs need once, before the children are made; none of it starts a thread."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_backend_init()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-n", type=int, default=100, help="files of each kind [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this one file, with all that was said of it")
    parser.add_argument("--kinds", default="swaa,plain", help="with a schedule, without [%(default)s]")
    parser.add_argument("--programs", default=",".join(DEFAULT_PROGRAMS), help=f"of {','.join(PROGRAMS)} [%(default)s]")
    parser.add_argument("--named", action="store_true", help="the named faults instead of random ones")
    parser.add_argument("--model", type=Path, default=MODEL, help="the good file [the bundled model]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files that made a fault here")
    parser.add_argument("--seconds", type=float, default=60, help="time limit of a program [%(default)s]")
    parser.add_argument("--sanitized", action="store_true", help="the engine is a sanitizer's build")
    arguments = parser.parse_args()
    programs = tuple(arguments.programs.split(","))
    limits = Limits(arguments.seconds)
    if arguments.sanitized:
        limits = Limits(arguments.seconds, 4 * _MEMORY_BYTES, None)
    _ready()
    faults: Counter[str] = Counter()
    n_files, sentences, slowest, largest = 0, Counter[str](), 0.0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz-gguf-") as name:
        folder = Path(name)
        if arguments.named:
            made: Iterator[tuple[str, str, Path]] = (
                (name, "", path) for name, path in write_faults(arguments.model, folder).items()
            )
        else:
            kinds = tuple(arguments.kinds.split(","))
            made = random_files(arguments.model, arguments.n, arguments.seed, folder, only=arguments.only, kinds=kinds)
        for name, done, path in made:
            n_files += 1
            for outcome in try_file(path, programs, limits):
                slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.peak_bytes)
                sentences[outcome.program + (": refused" if outcome.said.startswith("swaa-local: error") else "")] += 1
                if outcome.fault is not None:
                    faults[f"{outcome.program}: {outcome.fault}"] += 1
                    print(f"{name} [{done}] {outcome.program}: {outcome.fault}: {outcome.said!r}", flush=True)
                    if arguments.keep is not None:
                        arguments.keep.mkdir(parents=True, exist_ok=True)
                        (arguments.keep / path.name).write_bytes(path.read_bytes())
                elif arguments.named or arguments.only is not None:
                    print(f"{name} [{done}] {outcome.program}: {outcome.said!r}", flush=True)
    print(f"{n_files} files, seed {arguments.seed}: {sum(faults.values())} faults {dict(faults)}")
    print(f"ends {dict(sorted(sentences.items()))}; longest {slowest:.1f} s, largest {largest >> 20} MiB")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
