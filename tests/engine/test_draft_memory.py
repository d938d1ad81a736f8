"""Where there is no memory left for the plans that drafts keep, they are drafts all the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine import GPU_LAYERS
from tests.support.program import environment

pytestmark = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.skipif(sys.platform != "linux" or bool(GPU_LAYERS), reason="buffers of the CPU, under Linux's loader"),
]

# ggml's buffers come from posix_memalign(), and so do its threads' few bytes; it has no page while there is a file.
REFUSING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int posix_memalign(void ** ptr, size_t alignment, size_t size) {
    static int (*real)(void **, size_t, size_t);
    if (!real) {
        real = (int (*)(void **, size_t, size_t)) dlsym(RTLD_NEXT, "posix_memalign");
    }
    if (size >= 4096 && access(getenv("NO_MEMORY"), F_OK) == 0) {
        fputs("refused\n", stderr);
        return ENOMEM;
    }
    return real(ptr, alignment, size);
}
"""

DRAFTING = r"""
import os, sys
import numpy as np
from pathlib import Path
from tests.engine.test_draft import PROMPT, TOKENS, new_context
from tests.support.engine import EngineModel

no_memory = Path(os.environ["NO_MEMORY"])
draft = TOKENS[PROMPT : PROMPT + 4]
with EngineModel(sys.argv[1]) as model, new_context(model, "FA decode") as ctx:
    ctx.set_prompt_end(0, PROMPT)
    ctx.feed(TOKENS[:PROMPT])
    if sys.argv[2] == "without":
        no_memory.touch()
    rows = []
    for _ in range(2):
        ctx.set_draft_start(0, PROMPT)
        rows.append(ctx.feed(draft, chunk=1))
        ctx.set_draft_start(0, -1)
        assert ctx.rm(0, PROMPT, -1)
        rows.append(ctx.feed(draft))
        assert ctx.rm(0, PROMPT, -1)
    no_memory.unlink(missing_ok=True)
    np.save(sys.argv[3], np.concatenate(rows))
"""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "refusing.c").write_text(REFUSING)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "refusing.so", folder / "refusing.c", "-ldl"], check=True)
    return folder / "refusing.so"


def drafted(model: Path, refusing: Path, folder: Path, memory: str) -> tuple[bytes, str]:
    """Logits of drafts and of the passes that check them, and stderr."""
    out = folder / f"{memory}.npy"
    done = subprocess.run(
        [sys.executable, "-c", DRAFTING, str(model), memory, str(out)],
        env=environment(LD_PRELOAD=str(refusing), NO_MEMORY=str(folder / "no-memory")),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out.read_bytes(), done.stderr


def test_drafts_without_memory_for_their_plans_are_the_same(tiny_model: Path, refusing: Path, tmp_path: Path) -> None:
    with_memory, stderr = drafted(tiny_model, refusing, tmp_path, "with")
    assert "refused" not in stderr
    without, stderr = drafted(tiny_model, refusing, tmp_path, "without")
    assert "refused" in stderr
    assert without == with_memory
