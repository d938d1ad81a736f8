"""llama.cpp has one log; blocks of several threads, which end in any order, must not take each other's lines."""

from __future__ import annotations

import ctypes
import threading
from contextlib import ExitStack

import pytest

pytest.importorskip("llama_cpp", reason="the engine is not installed")

from llama_cpp import llama_cpp as c

from swaa_local.engine.log import EngineLog, captured


def provoke_an_error(name: str) -> None:
    assert not c.llama_model_load_from_file(f"/nowhere/{name}.gguf".encode(), c.llama_model_default_params())


def callback_address() -> int | None:
    callback, data = c.llama_log_callback(), ctypes.c_void_p()
    c.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return ctypes.cast(callback, ctypes.c_void_p).value


def test_blocks_of_two_threads_that_end_in_the_order_they_began(capfd):
    before = callback_address()
    began, go_on = threading.Event(), threading.Event()
    logs: dict[str, EngineLog] = {}

    def other() -> None:
        with captured() as logs["other"]:
            began.set()
            assert go_on.wait(60)
            provoke_an_error("other")

    thread = threading.Thread(target=other)
    with ExitStack() as stack:
        logs["main"] = stack.enter_context(captured())
        thread.start()
        assert began.wait(60)
        provoke_an_error("main")
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert "main" in str(logs["main"].reason)
    assert "other" not in str(logs["main"].reason)
    assert "other" in str(logs["other"].reason)
    assert capfd.readouterr().err == ""
    assert callback_address() == before


def test_a_block_within_a_block_keeps_its_lines(capfd):
    with captured() as outer:
        with captured() as inner:
            provoke_an_error("inner")
        provoke_an_error("outer")
    assert "inner" in str(inner.reason)
    assert "outer" in str(outer.reason)
    assert "inner" not in str(outer.reason)
    assert capfd.readouterr().err == ""
