"""Training by transformers' Trainer: one row at a time under a schedule's masks, with checkpoints and an early stop.

Knows rows, masks and the Trainer; nothing of data or files but the folder of the checkpoints.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from swaa_local.schedule.config import Schedule
from swaa_local.tune.examples import Example
from swaa_local.tune.masks import Masks
from swaa_local.tune.request import TuneError, TuneRequest
from swaa_local.tune.results import Step
from swaa_local.tune.rows import RowTensors, answer_logits, loss_of, row_tensors

_CHECKPOINTS = 10  # of a run


@dataclass(frozen=True)
class Training:
    """What came of it. stopped: by Ctrl-C, with a checkpoint. steps: of this run and those that it went on from."""

    steps: tuple[Step, ...]
    seconds: float
    stopped: bool


def train(
    model: Any,
    masks: Masks,
    rows: Sequence[Sequence[Example]],
    schedule: Schedule,
    request: TuneRequest,
    device: str,
    on_step: Callable[[Step, int], None],
) -> Training:
    """Train the adapter. on_step: called with each step and the number of all. Raises `TuneError` where a loss is no
    number, or the memory ends."""
    last = get_last_checkpoint(str(request.checkpoints)) if request.checkpoints.is_dir() else None
    watch = _Watch(on_step, [sum(map(len, row)) for row in rows], request.checkpoints)
    trainer = _Trainer(
        schedule=schedule,
        masks=masks,
        device=device,
        full_share=request.full_share,
        seed=request.seed,
        model=model,
        args=_arguments(request, device),
        train_dataset=list(rows),
        data_collator=lambda batch: {"row": row_tensors(batch[0])},
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.perf_counter()
    with _stopping(watch):
        try:
            trainer.train(resume_from_checkpoint=last)
        except torch.OutOfMemoryError as error:
            raise TuneError(
                f"the GPU's memory ended: {str(error).split('. ')[0]}; pass a smaller --length or --rank"
            ) from error
    return Training(
        tuple(watch.steps), time.perf_counter() - started, watch.stop and watch.steps[-1].number < request.steps
    )


def _arguments(request: TuneRequest, device: str) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(request.checkpoints),
        max_steps=request.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=request.accumulate,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=request.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, request.steps // 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=device == "cuda" and torch.cuda.is_bf16_supported(),
        use_cpu=device == "cpu",
        seed=request.seed,
        logging_steps=1,
        save_steps=max(1, request.steps // _CHECKPOINTS),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # a row is for one
    return args


class _Trainer(transformers.Trainer):  # type: ignore[misc]
    """transformers', with a loss on the answers alone, and masks that are set before each forward pass."""

    def __init__(
        self, *, schedule: Schedule, masks: Masks, device: str, full_share: float, seed: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._schedule, self._masks, self._device = schedule, masks, device
        self._full = Schedule.full(schedule.n_layer)
        self._full_share, self._seed = full_share, seed
        self._seen = 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_args: Any, **_kwargs: Any) -> torch.Tensor:
        row: RowTensors = inputs["row"].to(self._device)
        self._seen += 1
        chance = random.Random(f"{self._seed}/{self.state.global_step}/{self._seen}").random()
        schedule = self._full if chance < self._full_share else self._schedule
        teacher = None
        if row.teacher:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                teacher = answer_logits(model, self._masks, row, self._full)
        return loss_of(answer_logits(model, self._masks, row, schedule), row, teacher)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Collects the steps, ends the run after the one in which it was asked to, and with a loss that is no number."""

    def __init__(self, on_step: Callable[[Step, int], None], row_tokens: Sequence[int], folder: Path) -> None:
        self.steps: list[Step] = []
        self.stop = False
        self._on_step, self._folder = on_step, folder
        self._tokens_per_row = sum(row_tokens) / len(row_tokens)
        self._at_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        self._at_s = time.perf_counter()
        for log in state.log_history:
            if "loss" in log:
                self.steps.append(Step(log["step"], log["loss"], log["learning_rate"], 0, 0.0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        if self.stop:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if logs["loss"] != logs["loss"] or abs(logs["loss"]) == float("inf"):
            raise TuneError(
                f"the loss of step {state.global_step} is {logs['loss']}, so the rate is too high; begin anew with a "
                f"smaller --learning-rate and --force ({self._folder} has the checkpoint before it)"
            )
        now = time.perf_counter()
        tokens = round(self._tokens_per_row * args.gradient_accumulation_steps)
        step = Step(state.global_step, logs["loss"], logs["learning_rate"], tokens, now - self._at_s)
        self._at_s = now
        self.steps.append(step)
        self._on_step(step, state.max_steps)


@contextmanager
def _stopping(watch: _Watch) -> Iterator[None]:
    """The first Ctrl-C, or SIGTERM, ends the run after its step; the second one ends it at once."""

    def stop(number: int, _frame: Any) -> None:
        if watch.stop:
            raise KeyboardInterrupt
        watch.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
