"""What we use of upstream's class that is not public: listed in one module, used there and beside it, still there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swaa_local import Llama
from swaa_local.engine.upstream import RELIED_ON
from tests.support.program import ROOT

pytestmark = pytest.mark.usefixtures("engine")


def test_upstream_has_what_we_rely_on(tiny_model: Path) -> None:
    import llama_cpp

    with_adapter_slot = llama_cpp.Llama(str(tiny_model), n_ctx=256, verbose=False)
    assert [name for name in RELIED_ON if not hasattr(with_adapter_slot, name)] == []
    with_adapter_slot.close()


def test_no_other_module_uses_it() -> None:
    names = "|".join(RELIED_ON)
    of_a_llama = re.compile(rf"\bllm\.({names})\b")
    of_itself = re.compile(rf"\b(?:self|super\(\))\.({names})\b")
    package = ROOT / "swaa_local"
    assert [path for path in package.rglob("*.py") if of_a_llama.search(path.read_text())] == []
    for ours in ("llama.py", "engine/drafts.py", "engine/generating.py", "engine/restoring.py"):
        assert not of_itself.search((package / ours).read_text()), ours
    users = sorted((package / "engine").glob("upstream*.py"))
    subjects = ["upstream_adapter", "upstream_cells", "upstream_facts", "upstream_steps"]
    assert [path.stem for path in users] == ["upstream", *subjects]
    assert all(of_itself.search(path.read_text()) for path in users)


def test_the_vocabulary_is_read_through_public_methods(tiny_model: Path) -> None:
    llm = Llama(str(tiny_model), n_ctx=256)
    end = llm.token_eos()
    assert llm.is_end(end)
    assert llm.is_control(end)
    assert llm.token_bytes(end) == b""
    letter = llm.tokenize(b"a", add_bos=False)[-1]
    assert not llm.is_end(letter)
    assert llm.token_bytes(letter).endswith(b"a")
    assert llm.n_ctx_train() == int(llm.metadata["qwen3.context_length"])
    assert llm.description().startswith("qwen3, ")
    llm.close()
