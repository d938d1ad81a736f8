"""Rows of tokens as tensors, the loss on their answers, and what a model's answers are worth (NLL).

One row goes through the model at a time; logits are computed where an answer's token is predicted and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from swaa_local.schedule.config import Schedule
from swaa_local.tune.examples import Example
from swaa_local.tune.masks import Masks, prompt_end
from swaa_local.tune.model import precision
from swaa_local.tune.varlen import Texts


@dataclass(frozen=True)
class RowTensors:
    """tokens, positions: (1, n). places: of the tokens before those of the answers, (n_answer,); answers: these."""

    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    answers: torch.Tensor
    lengths: tuple[tuple[int, int], ...]
    """Tokens of each text and of its prompt."""
    teacher: bool

    @property
    def n_answer(self) -> int:
        return len(self.answers)

    def texts(self, schedule: Schedule) -> Texts:
        """Phases are those of a schedule: its tail is decoded."""
        return [(n, prompt_end(n_prompt, schedule)) for n, n_prompt in self.lengths]

    def to(self, device: str) -> RowTensors:
        moved = [tensor.to(device) for tensor in (self.tokens, self.positions, self.places, self.answers)]
        return replace(self, tokens=moved[0], positions=moved[1], places=moved[2], answers=moved[3])


def row_tensors(examples: Sequence[Example]) -> RowTensors:
    """Examples one behind the other."""
    tokens: list[int] = []
    places: list[int] = []
    answers: list[int] = []
    for example in examples:
        start = len(tokens)
        tokens += example.tokens
        places += range(start + example.n_prompt - 1, start + len(example) - 1)
        answers += example.tokens[example.n_prompt :]
    lengths = tuple((len(example), example.n_prompt) for example in examples)
    positions = torch.cat([torch.arange(n) for n, _ in lengths])
    return RowTensors(
        torch.tensor([tokens]),
        positions[None],
        torch.tensor(places),
        torch.tensor(answers),
        lengths,
        examples[0].teacher,
    )


def answer_logits(model: Any, masks: Masks, row: RowTensors, schedule: Schedule) -> torch.Tensor:
    """(n_answer, n_vocab) in float32, under the schedule. The row is on the model's device."""
    masks.set(row.texts(schedule), schedule, row.tokens.device)
    found = model(input_ids=row.tokens, position_ids=row.positions, logits_to_keep=row.places, use_cache=False)
    logits: torch.Tensor = found.logits[0].float()
    return logits


def loss_of(logits: torch.Tensor, row: RowTensors, teacher: torch.Tensor | None) -> torch.Tensor:
    """Cross entropy with the answers, or the divergence from a teacher's distribution; the mean over tokens."""
    if teacher is None:
        return torch.nn.functional.cross_entropy(logits, row.answers)
    mine, theirs = logits.log_softmax(-1), teacher.log_softmax(-1)
    return torch.nn.functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def mean_nll(
    model: Any,
    masks: Masks,
    examples: Sequence[Example],
    schedule: Schedule,
    device: str,
    *,
    adapter: bool,
    on_example: Callable[[int], None] = lambda done: None,
) -> float:
    """Mean negative log-likelihood of the answers' tokens, each example by itself. adapter: with it."""
    total, n_answers = 0.0, 0
    off: AbstractContextManager[Any] = nullcontext() if adapter else model.disable_adapter()
    was_training = model.training
    model.eval()
    with torch.inference_mode(), off, precision(device):
        for done, example in enumerate(examples, start=1):
            row = row_tensors([example]).to(device)
            logits = answer_logits(model, masks, row, schedule)
            total += float(torch.nn.functional.cross_entropy(logits, row.answers, reduction="sum"))
            n_answers += row.n_answer
            on_example(done)
    model.train(was_training)
    return total / n_answers
