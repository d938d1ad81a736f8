"""How many threads to take where the user says nothing: as many as there are idle CPUs.

Threads that wait for each other at every step cost far more on busy CPUs than they bring. Knows CPU times.
"""

from __future__ import annotations

import os
import time

import psutil

_LEAST_S = 0.2  # of looking, to tell load from chance


class IdleCPUs:
    """Looks from its construction on at what other programs do."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._busy_s = _busy_s()

    def count(self) -> tuple[int, int]:
        """CPUs that this process may use and that others leave, at least 1; and those that it may use at all."""
        time.sleep(max(0.0, self._started_s + _LEAST_S - time.monotonic()))
        passed_s = time.monotonic() - self._started_s
        busy = max(0.0, _busy_s() - self._busy_s) / passed_s
        return idle_cpus(available_cpus(), psutil.cpu_count() or 1, busy)


def idle_cpus(available: int, n_cpus: int, busy: float) -> tuple[int, int]:
    """busy: CPUs' worth of work that others do on all `n_cpus`. A quarter of a CPU is everyday noise."""
    share = busy * available / n_cpus
    return max(1, min(available, int(available - share + 0.75))), available


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _busy_s() -> float:
    """Seconds that all CPUs have worked for others."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    own = psutil.Process().cpu_times()
    # Guests are part of user time.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return float(total - idle - own.user - own.system)
