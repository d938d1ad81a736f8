"""What the sanitizers report is counted by place; the engine itself under them is tried by hand (docs/testing.md)."""

from __future__ import annotations

import subprocess
import sys

import sanitize
from tests.support.program import ROOT

UNDEFINED = """\
/src/llama-kv-cache-swaa.cpp:139:43: runtime error: signed integer overflow: 2147483647 + 1 cannot be represented
    #0 0x7f in llama_kv_cache_swaa::seq_rm(int, int, int) /src/llama-kv-cache-swaa.cpp:139
/src/ops.cpp:7:1: runtime error: division by zero
"""
ADDRESS = """\
=================================================================
==123==ERROR: AddressSanitizer: heap-use-after-free on address 0x6020 at pc 0x7f bp 0x7ffe sp 0x7ffe
READ of size 8 at 0x6020 thread T0
    #0 0x7f8 in __interceptor_memcpy ../libsanitizer/x.inc:827
    #1 0x7f9 in llama_vocab::impl::tokenize(char const*) /src/llama-vocab.cpp:99
    #2 0x7fa in llama_tokenize /src/llama-vocab.cpp:120
"""


def test_reports_are_counted_by_place():
    found = sanitize.reports([UNDEFINED, UNDEFINED, ADDRESS, ""])
    assert found == {
        "/src/llama-kv-cache-swaa.cpp:139:43: signed integer overflow: 2147483647 + 1 cannot be represented": 2,
        "/src/ops.cpp:7:1: division by zero": 2,
        "llama_vocab::impl::tokenize(char const*) /src/llama-vocab.cpp:99: heap-use-after-free": 1,
    }


def test_a_report_of_another_form_is_not_lost():
    assert sanitize.reports(["==7==AddressSanitizer CHECK failed: asan.cpp:1\n  more\n"]) == {
        "==7==AddressSanitizer CHECK failed: asan.cpp:1": 1
    }


def test_without_a_build_it_says_how_to_make_one(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "sanitize.py"), "run", str(tmp_path), "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path} holds no sanitized engine; make one: scripts/sanitize.py build {tmp_path}\n"
    )
