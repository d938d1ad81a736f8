"""What a process takes of the machine's memory, in bytes. Knows the operating system's accounts only."""

from __future__ import annotations

from pathlib import Path

import psutil


def rss_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):
        return None


# psutil has no peak but Windows's. That of getrusage() cannot be reset, and begins with the peak of whoever started the
# process; Linux's own high-water mark does neither.


def reset_peak_rss() -> bool:
    """Begin to count this process's peak of resident memory anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes(pid: int | None = None) -> int | None:
    """Peak of a process's resident memory in its life, or since its `reset_peak_rss`. None where the system does not
    tell, or the process is gone. Default: of this process."""
    try:
        lines = Path(f"/proc/{'self' if pid is None else pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
