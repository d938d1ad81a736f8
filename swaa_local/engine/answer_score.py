"""How likely an answer is, from the logits that a context holds. What was evaluated, `llama` knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as _c

from swaa_local.errors import DecodeError


@dataclass(frozen=True)
class AnswerScore:
    """logprobs: natural logarithms of the probability of each token, shape (temperatures, tokens). greedy: whether each
    is the likeliest one, shape (tokens,): all of them are exactly if the model would give this answer greedily."""

    logprobs: np.ndarray
    greedy: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[AnswerScore]) -> AnswerScore:
        """Of the parts of one answer."""
        return cls(
            np.concatenate([part.logprobs for part in parts], axis=1), np.concatenate([part.greedy for part in parts])
        )


def token_scores(
    ctx: Any, first: int, tokens: Sequence[int], n_vocab: int, temperatures: Sequence[float]
) -> AnswerScore:
    """Of tokens that follow the last batch's outputs `first`, `first` + 1, ... (-1: the last one), one each.

    Raises `DecodeError` if the context has no logits there, or some that are no numbers.
    """
    logprobs = np.empty((len(temperatures), len(tokens)))
    greedy = np.empty(len(tokens), dtype=bool)
    for i, token in enumerate(tokens):
        row = _c.llama_get_logits_ith(ctx, first + i)
        if not row:
            raise DecodeError("the context has no logits to score an answer by")
        logits = np.ctypeslib.as_array(row, shape=(n_vocab,))
        below = logits - logits.max()
        if np.isnan(below[token]):
            raise DecodeError("the model's logits are not numbers (NaN)")
        for j, temperature in enumerate(temperatures):
            scaled = below / np.float32(temperature)
            logprobs[j, i] = scaled[token] - np.log(np.exp(scaled).sum(dtype=np.float64))
        greedy[i] = int(np.argmax(logits)) == token
    return AnswerScore(logprobs, greedy)
