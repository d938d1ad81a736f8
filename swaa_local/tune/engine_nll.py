"""The same answers in the engine: the NLL of the model as it will run, with the adapter and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swaa_local.llama import Llama
from swaa_local.schedule.config import Schedule
from swaa_local.tune.examples import Example


def engine_nll(
    gguf: Path,
    examples: Sequence[Example],
    schedule: Schedule | None,
    *,
    lora: Path | None,
    on_example: Callable[[int], None] = lambda done: None,
    **kwargs: Any,
) -> float:
    """Mean negative log-likelihood of the answers' tokens. schedule None: full attention. kwargs: of `Llama`."""
    n_ctx = max(map(len, examples))
    llm = Llama(str(gguf), swaa=schedule or False, n_ctx=n_ctx, lora_path=None if lora is None else str(lora), **kwargs)
    total, n_answers = 0.0, 0
    try:
        for done, example in enumerate(examples, start=1):
            score = llm.score(example.tokens[: example.n_prompt], example.tokens[example.n_prompt :])
            total -= float(score.logprobs[0].sum())
            n_answers += example.n_answer
            on_example(done)
    finally:
        llm.close()
    return total / n_answers
