#!/usr/bin/env python3
"""Send a server what breaks servers, beside clients that do nothing wrong, and see that these notice nothing of it.

    scripts/soak_server.py                          # the bundled model, every fault once and then a minute at random
    scripts/soak_server.py model.gguf --seconds 600 --seed 7
    scripts/soak_server.py --fault "a grammar of 2^40 ways" --seconds 0
    scripts/soak_server.py --list
    scripts/soak_server.py model.gguf -- -np 8 --embeddings    # after --: swaa-local serve's options

It starts `swaa-local serve` on a free port of the loopback, and at most so many faults at once and for so long as the
options say. The server must answer each fault as the table in server_faults.py says, give a good client the same tokens
as before, stay the same process, keep its memory within a bound (Linux), and end on SIGTERM while connections are open.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import psutil

from nearly_right import nearly_right
from server_faults import CUT_OFF, FAULTS, NO_ANSWER, OPEN, REFUSED, Target
from swaa_local.engine.process_memory import peak_rss_bytes

ROOT = Path(__file__).resolve().parents[1]
N_AT_ONCE = 3
N_OPEN = 60
START_S = 300.0
END_S = 10.0
HEALTH_S = 5.0
GOOD = json.dumps({"prompt": "Once", "n_predict": 6, "temperature": 0, "cache_prompt": False}).encode()


@dataclass
class Report:
    """What was sent and answered, and what went wrong; nothing, if all is well."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    n_good: int = 0
    peak_rss_mib: float = 0.0


class Soak:
    """A server under faults. `pid`: of the server itself, for its memory; 0 where that is not known."""

    def __init__(self, target: Target, *, pid: int = 0, seed: int = 0, max_rss_mib: float = 2048) -> None:
        self.report = Report()
        self._target, self._pid, self._max_rss_mib = target, pid, max_rss_mib
        self._rng = random.Random(seed)
        self._open: list[socket] = []
        self._lock = threading.Lock()
        self._expected = self._complete()

    def _complete(self) -> Any:
        status, body = self._target.ask("POST", "/completion", GOOD)
        return json.loads(body)["content"] if status == 200 else f"status {status}: {body[:200]!r}"

    def _wrong(self, text: str) -> None:
        with self._lock:
            self.report.wrong.append(text)

    def send(self, name: str, *, alone: bool = True) -> None:
        """One fault of the table, and whether it was answered as it should be; beside others it may also get 503."""
        status = FAULTS[name].send(self._target)
        self.report.statuses[name, status] += 1
        statuses = FAULTS[name].statuses | (frozenset() if alone else {503})
        if status not in statuses:
            self._wrong(f"{name}: {_status_text(status)}, not {' or '.join(map(str, sorted(statuses)))}")

    def send_nearly_right(self, seed: int) -> None:
        """A request made at random: 200, or the client's fault, and never the server's."""
        path, body = nearly_right(random.Random(seed))
        status, answer = self._target.ask("POST", path, body)
        self.report.statuses["nearly right", status] += 1
        if status not in REFUSED | {200}:
            self._wrong(f"nearly right {seed} to {path}: {_status_text(status)} for {body[:500]!r}: {answer[:200]!r}")

    def open(self, name: str) -> None:
        """A connection that stays open; the oldest makes room for it."""
        self._open.append(OPEN[name](self._target))
        self.report.statuses[name, CUT_OFF] += 1
        if len(self._open) > N_OPEN:
            self._open.pop(0).close()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def check(self) -> None:
        """Whether a good client and a monitor are served as before."""
        started_s = time.monotonic()
        status, _ = self._target.ask("GET", "/health")
        took_s = time.monotonic() - started_s
        if status != 200 or took_s > HEALTH_S:
            self._wrong(f"/health: {_status_text(status)} after {took_s:.1f} s")
        got = self._complete()
        self.report.n_good += 1
        if got != self._expected:
            self._wrong(f"a good request got {got!r}, not {self._expected!r}")
        if (rss_bytes := peak_rss_bytes(self._pid)) is not None:
            self.report.peak_rss_mib = rss_mib = rss_bytes / (1 << 20)
            if rss_mib > self._max_rss_mib:
                self._wrong(f"the server took {rss_mib:.0f} MiB, more than {self._max_rss_mib:.0f}")
                self._max_rss_mib = rss_mib

    def at_random(self, seconds: float, progress: Callable[[Report], None] = lambda report: None) -> None:
        """Some of everything, several at once, until the time is over or something is wrong."""
        end_s = time.monotonic() + seconds
        with ThreadPoolExecutor(N_AT_ONCE) as pool:
            while time.monotonic() < end_s and not self.report.wrong:
                if self._rng.random() < 0.3:
                    self.open(self._rng.choice(list(OPEN)))
                if self._rng.random() < 0.5:
                    names = self._rng.sample(list(FAULTS), N_AT_ONCE)
                    jobs = [pool.submit(self.send, name, alone=False) for name in names]
                else:
                    seeds = [self._rng.randrange(2**32) for _ in range(10 * N_AT_ONCE)]
                    jobs = [pool.submit(self.send_nearly_right, seed) for seed in seeds]
                for job in jobs:
                    job.result()
                self.check()
                progress(self.report)


def _status_text(status: int) -> str:
    return {CUT_OFF: "cut off", NO_ANSWER: "no answer"}.get(status, f"status {status}")


def server_of(pid: int) -> int:
    """The process that `swaa-local serve` started; 0 if there is none."""
    return next((child.pid for child in psutil.Process(pid).children()), 0)


@contextmanager
def served(model: Path | None, options: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], Target]]:
    """`swaa-local serve` on a free port; killed when the block is left, if it still runs."""
    words = [*([] if model is None else [str(model)]), "--port", "0", *options]
    with subprocess.Popen(
        [sys.executable, "-m", "swaa_local", "serve", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    ) as process:
        killer = threading.Timer(START_S, process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            killer.cancel()
            if not url:
                raise SystemExit("error: the server did not start")
            host, _, port = url.removeprefix("http://").rpartition(":")
            yield process, Target(host.strip("[]"), int(port))
        finally:
            killer.cancel()
            process.kill()


def end(process: subprocess.Popen[str], report: Report) -> None:
    """SIGTERM, and whether it ends in time and in order."""
    started_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        report.wrong.append(f"SIGTERM did not end the server within {END_S:.0f} s")
    else:
        if code != 0:
            report.wrong.append(f"after SIGTERM the exit code was {code}, not 0")
        print(f"ended {time.monotonic() - started_s:.1f} s after SIGTERM", file=sys.stderr)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """What is before `--` is ours; `options` is what is behind it."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL.gguf", help="[the bundled model]")
    parser.add_argument("--seconds", type=float, default=60.0, help="at random, after every fault once [60]")
    parser.add_argument("--seed", type=int, default=0, help="of what is random [0]")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), metavar="NAME", help="this one alone first")
    parser.add_argument("--max-rss-mib", type=float, default=2048, help="memory that the server may take [2048]")
    parser.add_argument("--list", action="store_true", help="show the names of all faults")
    parser.set_defaults(options=list(arguments[split + 1 :]))
    return parser.parse_args(arguments[:split])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the server bore it all, 1 with the reasons if not."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if options.list:
        print("\n".join((*FAULTS, *OPEN)))
        return 0
    with tempfile.TemporaryDirectory(prefix="swaa-soak-") as folder:
        # Options that bring more endpoints into play.
        given = ["-t", "1", "-np", "2", "-c", "8192", "--slots", "--slot-save-path", folder, *options.options]
        with served(options.model, given) as (process, target):
            soak = Soak(target, pid=server_of(process.pid), seed=options.seed, max_rss_mib=options.max_rss_mib)
            for name in options.fault or FAULTS:
                soak.send(name)
                soak.check()
            for name in OPEN:
                soak.open(name)
            soak.check()
            soak.at_random(options.seconds)
            end(process, soak.report)
            soak.close()
    report = soak.report
    for (name, status), n in sorted(report.statuses.items()):
        print(f"{n:6}  {'open' if status == CUT_OFF and name in OPEN else _status_text(status):12}{name}")
    print(f"{report.n_good} good requests in between; at most {report.peak_rss_mib:.0f} MiB", file=sys.stderr)
    for text in report.wrong:
        print(f"wrong: {text}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
