"""Accuracy of the model under attention schedules, in PyTorch, and the choice of the schedule to ship.

The masks are written down from the definition, independent of the engine. A question counts as answered if the whole
expected reply is what greedy decoding would say: with the reply given, each of its tokens is the most likely one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from needle.model import Needle
from needle.recipe import SINKS, TAIL, WINDOW
from needle.rows import Question, RowMaker
from swaa_local.needle.documents import KINDS, Kind
from swaa_local.schedule.config import LayerMode, SWAAConfig


@dataclass(frozen=True)
class Cell:
    """What is asked: a task, a length in tokens, and whether the model thinks first."""

    task: Kind
    length: int
    think: bool


@dataclass(frozen=True)
class Score:
    """Answers to a cell's questions. outside: those whose value lies outside the window of the prompt's last token."""

    n: int
    right: int
    n_outside: int
    right_outside: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def visible(length: int, prompt_ends: Tensor, mode: LayerMode, window: int, sinks: int) -> Tensor:
    """True where a key is visible to a query: [batch, 1, length, length].

    prompt_ends: position of the first decoded token, [batch].
    """
    positions = torch.arange(length, device=prompt_ends.device)
    query, key = positions[:, None], positions[None]
    causal = key <= query
    near = causal & ((query - key < window) | (key < sinks))
    decoding = positions >= prompt_ends[:, None]
    full = decoding[:, None, :, None] & (mode != LayerMode.ALWAYS) | torch.tensor(mode == LayerMode.FULL)
    return torch.where(full, causal, near)


class Bench:
    """Asks the model. Questions of a cell are the same for every schedule."""

    def __init__(self, model: Needle, maker: RowMaker, pad: int, device: str, tokens_per_batch: int = 1 << 15) -> None:
        self._model, self._maker, self._pad, self._device = model, maker, pad, device
        self._tokens_per_batch = tokens_per_batch
        self._made: dict[tuple[Cell, int], list[Question]] = {}

    def score(self, config: SWAAConfig, cell: Cell, n: int) -> Score:
        """Accuracy over n questions."""
        if (cell, n) not in self._made:
            made = [self._maker.question(i, cell.task, cell.length, think=cell.think) for i in range(n)]
            self._made[cell, n] = made
        questions = self._made[cell, n]
        size = max(1, self._tokens_per_batch // cell.length)
        right: list[bool] = []
        for start in range(0, n, size):
            right += self._answer(questions[start : start + size], config)
        outside = [q.prompt_end - 1 - q.value >= WINDOW for q in questions]
        return Score(n, sum(right), sum(outside), sum(r and o for r, o in zip(right, outside, strict=True)))

    @torch.no_grad()
    def _answer(self, questions: Sequence[Question], config: SWAAConfig) -> list[bool]:
        length = max(len(q.tokens) for q in questions)
        tokens = np.full((len(questions), length), self._pad, dtype=np.int64)
        for row, question in zip(tokens, questions, strict=True):
            row[: len(question.tokens)] = question.tokens
        batch = torch.from_numpy(tokens).to(self._device)
        # the tail is decoded
        ends = torch.tensor([max(0, q.prompt_end - config.prompt_tail) for q in questions], device=self._device)
        modes = config.schedule(self._model.config.num_hidden_layers).layer_modes
        window = config.sliding_window_size or 1
        made = {
            mode: None if mode == LayerMode.FULL else visible(length, ends, mode, window, config.keep_first)
            for mode in set(modes)
        }
        dtype = torch.float32 if self._device == "cpu" else torch.bfloat16
        with torch.autocast(self._device, torch.bfloat16, enabled=self._device != "cpu"):
            hidden = self._model(batch, [made[mode] for mode in modes], dtype)
            right = []
            for states, asked, question in zip(hidden, batch, questions, strict=True):
                start, end = question.prompt_end, len(question.tokens)
                said = self._model.logits(states[start - 1 : end - 1]).argmax(-1)
                right.append(torch.equal(said, asked[start:end]))
        return right


def recipe(full_layers: Iterable[int]) -> SWAAConfig:
    """The combined recipe: these layers full, the others windowed over the prompt, with sinks. No tail: it is searched
    by what the model says after thinking, for which no tail is needed."""
    return SWAAConfig(WINDOW, SINKS, True, tuple(full_layers))


def named_schedules(full_layers: Sequence[int], n_layer: int) -> dict[str, SWAAConfig]:
    """The schedules of the report, by name."""
    return {
        "full attention": SWAAConfig(),
        "naive SWA": SWAAConfig(WINDOW),
        "sinks": SWAAConfig(WINDOW, SINKS),
        "FA decode": SWAAConfig(WINDOW, 0, True),
        "interleaved": SWAAConfig(WINDOW, 0, False, full_layers),
        "FA decode + sinks": recipe(()),
        "interleaved + sinks": SWAAConfig(WINDOW, SINKS, False, full_layers),
        "interleaved + FA decode": SWAAConfig(WINDOW, 0, True, full_layers),
        "recipe": recipe(full_layers),
        "recipe + tail": replace(recipe(full_layers), prompt_tail=TAIL),
        "recipe, even layers full": recipe(range(0, n_layer, 2)),
        "recipe, odd layers full": recipe(range(1, n_layer, 2)),
    }


@dataclass(frozen=True)
class Choice:
    """The full layers that were chosen, and the worst cell's accuracy for each set that was tried."""

    full_layers: tuple[int, ...]
    tried: dict[str, float]


def choose_full_layers(worst: Callable[[tuple[int, ...]], float], n_layer: int, goal: float) -> Choice:
    """The fewest full layers that reach `goal`: of all sets of up to two, or of the best pair grown layer by layer.

    worst: accuracy of a set of full layers in its worst cell. If not even full attention reaches the goal, nothing else
    is tried.
    """
    tried: dict[tuple[int, ...], float] = {}

    def best_of(candidates: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        scores = {layers: worst(layers) for layers in candidates}
        tried.update(scores)
        return max(scores, key=scores.__getitem__)

    chosen = best_of([tuple(range(n_layer))])
    if tried[chosen] >= goal:
        best: tuple[int, ...] = ()
        for n_full in range(n_layer):
            grown = (tuple(sorted((*best, layer))) for layer in range(n_layer) if layer not in best)
            best = best_of(combinations(range(n_layer), n_full) if n_full <= 2 else grown)
            if tried[best] >= goal:
                chosen = best
                break
    return Choice(chosen, {",".join(map(str, layers)) or "none": round(score, 4) for layers, score in tried.items()})


def report(
    bench: Bench, n_layer: int, lengths: Sequence[int], n: int, goal: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Choose the schedule, score the named ones in every cell, and return it all as JSON's types."""
    sweep_cells = [Cell(task, max(length for length in lengths if length <= 4096), True) for task in KINDS]

    def worst(layers: tuple[int, ...]) -> float:
        score = min(bench.score(recipe(layers), cell, n).accuracy for cell in sweep_cells)
        log(f"full layers {','.join(map(str, layers)) or 'none'}: {100 * score:.1f} %")
        return score

    choice = choose_full_layers(worst, n_layer, goal)
    cells = [Cell(task, length, think) for task in KINDS for length in lengths for think in (False, True)]
    table = []
    for name, config in named_schedules(choice.full_layers, n_layer).items():
        for cell in cells:
            score = bench.score(config, cell, n)
            table.append({"schedule": name, **asdict(cell), **asdict(score), "accuracy": round(score.accuracy, 4)})
            told = f"{cell.task} {cell.length} {'think' if cell.think else 'direct'}"
            outside = f"{score.right_outside}/{score.n_outside}"
            log(f"{name:26} {told:24} {100 * score.accuracy:5.1f} %   outside the window {outside}")
    return {
        "window": WINDOW,
        "sinks": SINKS,
        "tail": TAIL,
        "full_layers": list(choice.full_layers),
        "goal": goal,
        "sweep": choice.tried,
        "table": table,
    }
