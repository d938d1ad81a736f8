"""The training loop: curriculum, loss, optimizer, data workers, calibration to a time, checkpoints and log.

The same seed, steps, software and hardware give the same weights: data do not depend on the workers, weights are drawn
on the CPU, and PyTorch is told to use deterministic kernels alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from needle.model import Needle, NeedleConfig
from needle.rows import VALUE_WEIGHT, RowKind, RowMaker

SHORTEST = 64
"""Length of the shortest rows that a step may have; row indices are spaced for them."""


@dataclass(frozen=True)
class Stage:
    """Part of the training. share: of all steps. length: of its rows, in tokens."""

    share: float
    length: int


@dataclass(frozen=True)
class Curriculum:
    """What each step trains on. Later stages mix in a quarter of steps with shorter rows, so that those stay known."""

    n_steps: int
    tokens_per_step: int = 65536
    stages: tuple[Stage, ...] = (
        Stage(0.28, 512),
        Stage(0.22, 1024),
        Stage(0.25, 2048),
        Stage(0.14, 4096),
        Stage(0.11, 8192),
    )
    peak_lr: float = 2e-3
    warmup: int = 200
    constant: float = 0.3
    final_lr: float = 0.02
    section_shares: tuple[float, float] = (0.15, 0.55)

    def kind(self, step: int) -> RowKind:
        """The rows of a step."""
        progress, at = step / self.n_steps, 0.0
        reached = len(self.stages) - 1
        for index, stage in enumerate(self.stages):
            at += stage.share
            if progress < at:
                reached = index
                break
        if step % 4 == 3 and reached:
            reached = step // 4 % reached
        first, last = self.section_shares
        ramp = min(1.0, max(0.0, (progress - 0.25) / 0.3))
        return RowKind(self.stages[reached].length, first + (last - first) * ramp)

    def lr(self, step: int) -> float:
        """Warm-up, constant, cosine."""
        warmup = min(self.warmup, self.n_steps // 10 + 1)
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        progress = (step / self.n_steps - self.constant) / (1 - self.constant)
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))
        return self.peak_lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def n_rows(self, step: int) -> int:
        return max(1, self.tokens_per_step // self.kind(step).length)

    def first_row(self, step: int) -> int:
        """Index of a step's first row; no two steps share rows."""
        return step * max(1, self.tokens_per_step // SHORTEST)


class _Steps(Dataset):  # type: ignore[type-arg]
    """The batch of each step, made in whatever process asks for it."""

    def __init__(self, maker: RowMaker, curriculum: Curriculum) -> None:
        self._maker, self._curriculum = maker, curriculum

    def __len__(self) -> int:
        return self._curriculum.n_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        c = self._curriculum
        tokens, weights = self._maker.batch(c.first_row(step), c.n_rows(step), c.kind(step))
        return torch.from_numpy(tokens), torch.from_numpy(weights)


@dataclass(frozen=True)
class Outcome:
    """What the training did. records: a line of the log each."""

    n_steps: int
    n_tokens: int
    seconds: float
    stopped_early: bool
    records: list[dict[str, float]]
    weights_sha256: str


def make_deterministic() -> None:
    """To be called before anything runs on the GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False


@contextmanager
def kernels(device: str) -> Iterator[None]:
    """Flash attention on a GPU: its backward pass is the one that can be deterministic."""
    if device == "cpu":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        yield


def train(
    model: Needle,
    maker: RowMaker,
    curriculum: Curriculum,
    *,
    device: str,
    workers: int,
    deadline: float,
    log: Callable[[str], None],
    save: Callable[[Needle], None],
    log_every: int = 100,
    save_every: int = 2000,
) -> Outcome:
    """Train in place. deadline: on time.monotonic()'s clock; training stops there, whatever is left to do."""
    optimizer = make_optimizer(model, curriculum, device)
    loader: DataLoader = DataLoader(  # type: ignore[type-arg]
        _Steps(maker, curriculum),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        pin_memory=device != "cpu",
    )
    records: list[dict[str, float]] = []
    n_tokens, start, waited = 0, time.monotonic(), 0.0
    step = -1
    stopped = False
    ready = time.monotonic()
    with kernels(device):
        for step, (tokens, weights) in enumerate(loader):
            waited += time.monotonic() - ready
            tokens = tokens.to(device, non_blocking=True).long()
            weights = weights.to(device, non_blocking=True)
            lr = curriculum.lr(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            last = step == curriculum.n_steps - 1
            stopped = not last and time.monotonic() > deadline
            telling = step % log_every == 0 or last or stopped
            loss, logits = train_step(model, optimizer, tokens, weights, device, keep_logits=telling)
            n_tokens += tokens.numel()
            if telling:
                record = {
                    "step": step,
                    "seconds": round(time.monotonic() - start, 1),
                    "length": tokens.shape[1],
                    "lr": round(lr, 6),
                    "loss": round(loss.item(), 4),
                    **(_value_accuracy(logits, tokens, weights) if logits is not None else {}),
                    "waited_for_data_s": round(waited, 1),
                }
                records.append(record)
                log("  ".join(f"{name} {value}" for name, value in record.items()))
            del logits
            if stopped:
                log(f"out of time after {step + 1} of {curriculum.n_steps} steps")
                break
            if step and step % save_every == 0:
                save(model)
            ready = time.monotonic()
    seconds = time.monotonic() - start
    return Outcome(step + 1, n_tokens, round(seconds, 1), stopped, records, weights_hash(model))


def make_optimizer(model: Needle, curriculum: Curriculum, device: str) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=curriculum.peak_lr, betas=(0.9, 0.95), fused=device != "cpu")


def train_step(
    model: Needle,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    weights: Tensor,
    device: str,
    *,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One step on a batch [rows, length]. Returns the loss, a mean by weight, and the logits if wanted."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        hidden = model(tokens, dtype=dtype)[:, :-1]
        logits = model.logits(hidden)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), logits.detach() if keep_logits else None


def _value_accuracy(logits: Tensor, tokens: Tensor, weights: Tensor) -> dict[str, float]:
    """Share of value tokens that are the most likely ones, per task."""
    right = logits.argmax(-1) == tokens[:, 1:]
    found = {}
    for task, weight in VALUE_WEIGHT.items():
        asked = weights[:, 1:] == weight
        if asked.any():
            found[f"value_accuracy_{task}"] = round(right[asked].float().mean().item(), 4)
    return found


def measure_step_s(config: NeedleConfig, curriculum: Curriculum, device: str) -> dict[int, float]:
    """Seconds of a step per row length, on random tokens and a model of its own."""
    torch.manual_seed(0)
    model = Needle(config).to(device)
    model.initialize(0)
    optimizer = make_optimizer(model, curriculum, device)
    times = {}
    with kernels(device):
        for length in sorted({stage.length for stage in curriculum.stages}):
            n_rows = max(1, curriculum.tokens_per_step // length)
            tokens = torch.randint(config.vocab_size, (n_rows, length), device=device)
            weights = torch.ones(tokens.shape, device=device)
            for _ in range(3):
                train_step(model, optimizer, tokens, weights, device)[0].item()
            start = time.monotonic()
            for _ in range(10):
                loss, _ = train_step(model, optimizer, tokens, weights, device)
            loss.item()
            times[length] = (time.monotonic() - start) / 10
    return times


def steps_for(seconds: float, step_s: dict[int, float], curriculum: Curriculum) -> int:
    """How many steps of the curriculum fit a time, in hundreds."""
    probe = 400
    mean = sum(step_s[curriculum.kind(step * curriculum.n_steps // probe).length] for step in range(probe)) / probe
    return max(100, int(seconds / mean) // 100 * 100)


def weights_hash(model: Needle) -> str:
    """SHA-256 of all weights, to compare runs."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
