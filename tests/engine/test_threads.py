"""Threads where the user says nothing: what other programs leave."""

from __future__ import annotations

import pytest

from swaa_local.engine.threads import IdleCPUs, available_cpus, idle_cpus


@pytest.mark.parametrize(
    ("available", "n_cpus", "busy", "idle"),
    [
        *((8, 8, 0.0, 8), (8, 8, 0.2, 8), (8, 8, 1.0, 7), (8, 8, 3.3, 5), (8, 8, 8.0, 1)),
        *((2, 2, 2.0, 1), (2, 8, 4.0, 1), (1, 1, 0.9, 1)),
    ],
)
def test_what_is_left(available, n_cpus, busy, idle):
    assert idle_cpus(available, n_cpus, busy) == (idle, available)


def test_own_work_is_no_load():
    """There may be other load here, so only the bounds are certain."""
    look = IdleCPUs()
    sum(i * i for i in range(3_000_000))
    n_idle, n_cpus = look.count()
    assert 1 <= n_idle <= n_cpus == available_cpus()
