"""A model that says what a test wants: each token has one successor, whatever stands before it.

Embeddings are one-hot, attention and feed-forward are zero, and the output matrix maps each token to its successor. So
the reply depends on the prompt's last token alone, and stochastic sampling changes nothing.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.tiny import VOCAB, TinyShape, tiny_weights, write_tiny_gguf

THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
NEWLINE = "<0x0A>"
CERTAIN = 50.0  # logit


def scripted_model(path: Path, script: list[str], *, loop_to: str | None = None, **kwargs: Any) -> Path:
    """A GGUF whose tokens follow each other as in `script`, where none comes twice; <|im_end|> follows all others.

    loop_to: what follows the last one instead.
    """
    assert len(set(script)) == len(script)
    shape = TinyShape(n_layer=1, n_embd=384)
    weights = {k: v if "norm" in k else np.zeros_like(v) for k, v in tiny_weights(shape).items()}
    weights["output_norm.weight"] = np.ones(shape.n_embd, np.float32)
    n = len(VOCAB)
    weights["token_embd.weight"][:, :n] = np.eye(n)
    successors = dict(pairwise(script)) | ({script[-1]: loop_to} if loop_to else {})
    for token in VOCAB:
        follower = VOCAB.index(successors.get(token, "<|im_end|>"))
        weights["output.weight"][follower, VOCAB.index(token)] = CERTAIN / np.sqrt(shape.n_embd)
    return write_tiny_gguf(path, n_layer=1, n_embd=384, weights=weights, **kwargs)


def thinker(path: Path, **kwargs: Any) -> Path:
    """Thinks "hm" and answers "Yes!"; without thinking (THINKING_TEMPLATE) just answers."""
    script = [NEWLINE, "<think>", "h", "m", "</think>", "Y", "e", "s", "!", "<|im_end|>"]
    return scripted_model(path, script, **{"chat_template": THINKING_TEMPLATE, **kwargs})
