"""Digests of the graphs, logits and states of a model without a schedule, the same program for both builds.

    python -m tests.support.stock_graph graphs          digests of the graphs of the tiny models
    python -m tests.support.stock_graph outputs GGUF    digests of logits and states of one model

`stock_graphs.json` comes from the unpatched build of the pinned llama-cpp-python (LLAMA_CPP_LIB_PATH names its
libraries) and is made again when the pin moves.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.engine import EngineModel
from tests.support.tiny import ARCHES, random_tokens, with_own_windows, write_tiny_gguf

MODELS: dict[str, dict[str, Any]] = {arch: {"arch": arch} for arch in ARCHES}
MODELS["mellum"] = with_own_windows(40, (True, False, True, False))
"""Keywords of `write_tiny_gguf`."""
TOKENS = random_tokens(300)
PROMPT = 192  # ubatches of 64
CASES: dict[str, dict[str, Any]] = {
    "flash": {"flash": "on"},
    "no flash": {"flash": "off"},
    "q8_0": {"flash": "on", "kv": "Q8_0"},
    "two sequences": {"flash": "on", "n_seq_max": 2, "unified": True},
    "two streams": {"flash": "off", "n_seq_max": 2, "unified": False},
}


def digests(path: Path) -> dict[str, str]:
    """Per case, a digest over (operation, name, type, shape, sources) of every node of every graph computed."""
    found = {}
    with EngineModel(path) as model:
        for case, params in CASES.items():
            with model.context(n_batch=128, n_ubatch=64, record_nodes=True, **params) as ctx:
                ctx.feed(TOKENS[:200])
                for token in TOKENS[200:203]:
                    ctx.feed([token])
            found[case] = hashlib.sha256("\n".join(ctx.nodes).encode()).hexdigest()
    return found


def outputs(path: Path) -> dict[str, dict[str, Any]]:
    """Per case, digests of logits and states after prefill (64 tokens an ubatch) and after decode, and some
    of the decode's logits themselves, where they need not be the same to the bit."""
    found = {}
    with EngineModel(path) as model:
        for case, params in CASES.items():
            with model.context(n_batch=128, n_ubatch=64, **params) as ctx:
                prefill, prefill_state = ctx.feed(TOKENS[:PROMPT]), ctx.state()
                decode = np.concatenate([ctx.feed([t]) for t in TOKENS[PROMPT:]])
                found[case] = {
                    "prefill": _digest(prefill.tobytes()),
                    "prefill state": _digest(prefill_state),
                    "decode": _digest(decode.tobytes()),
                    "state": _digest(ctx.state()),
                    "sequence state": _digest(ctx.state(0)),
                    "decode logits": decode[::9].tolist(),
                }
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    if sys.argv[1] == "graphs":
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "m.gguf"
            found = {name: digests(write_tiny_gguf(path, **model)) for name, model in MODELS.items()}
        print(json.dumps(found, indent=1))
    else:
        print(json.dumps(outputs(Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
