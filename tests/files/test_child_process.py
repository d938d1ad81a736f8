"""The child process of a command goes away with the command, whenever that is stopped."""

from __future__ import annotations

import subprocess
import threading

import pytest

from swaa_local.files.child_process import run_child


@pytest.mark.parametrize("n_readers", [0, 1])
def test_ctrl_c_while_the_readers_are_started(monkeypatch, n_readers):
    children, started = [], []
    popen, start = subprocess.Popen, threading.Thread.start

    def spawn(*args, **kwargs):
        children.append(popen(*args, **kwargs))
        return children[-1]

    def start_or_stop(thread):
        if len(started) == n_readers:
            raise KeyboardInterrupt
        started.append(thread)
        start(thread)

    monkeypatch.setattr(subprocess, "Popen", spawn)
    monkeypatch.setattr(threading.Thread, "start", start_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run_child("swaa_local.convert.children.engine_job", {"job": "check", "path": "none.gguf"}, what="the check")
    assert [child.returncode is not None for child in children] == [True]
    assert not any(thread.is_alive() for thread in started)
