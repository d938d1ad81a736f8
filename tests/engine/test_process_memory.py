"""What a process takes of memory, and its peak, which begins anew where that is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from swaa_local.engine.process_memory import peak_rss_bytes
from tests.support.program import ROOT, environment

_MIB = 1 << 20
LARGE = 256 * _MIB
SMALL = 64 * _MIB


def filled(n_bytes: int) -> bytearray:
    return bytearray(b"x") * n_bytes


def fresh(code: str) -> list[int]:
    """The numbers that a process of its own prints: a long test run has freed much, which it would take again."""
    head = (
        "from swaa_local.engine.process_memory import peak_rss_bytes, reset_peak_rss, rss_bytes\n"
        "from tests.engine.test_process_memory import filled\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=environment(), capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [int(number) for number in done.stdout.split()]


def test_what_is_taken_is_resident_memory() -> None:
    before, after = fresh(f"before = rss_bytes(); taken = filled({LARGE}); print(before, rss_bytes())")
    assert LARGE - 16 * _MIB < after - before < LARGE + 16 * _MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part of a run is Linux's to tell")
def test_the_peak_is_that_since_its_reset() -> None:
    reset, peak, start, after = fresh(
        f"filled({LARGE}); peak = peak_rss_bytes(); reset = reset_peak_rss(); start = rss_bytes()\n"
        f"filled({SMALL}); print(int(reset), peak, start, peak_rss_bytes())"
    )
    assert reset
    assert SMALL - 16 * _MIB < after - start < SMALL + 16 * _MIB
    assert peak > after + (LARGE - SMALL) // 2


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part of a run is Linux's to tell")
def test_the_peak_of_another_is_its_own_and_not_that_of_who_started_it() -> None:
    """That is what getrusage() begins with."""
    taken = filled(LARGE)
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        peak = peak_rss_bytes(process.pid)
        process.communicate("")
    assert peak is not None
    assert 0 < peak < len(taken) // 2
    assert peak_rss_bytes(process.pid) is None
