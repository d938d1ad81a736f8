#!/usr/bin/env python3
"""Time a step of training under a schedule against one under full attention, on rows of random tokens.

    scripts/step_time.py config.json --length 8192,16384 --window 2048 --sinks 100 --fa-decode --tail 128

CONFIG is a checkpoint's config.json; weights are random, for a step takes as long with any. A step is forward and
backward with gradient checkpointing, LoRA on q, k and v, as `swaa-local tune` runs them. Both are timed in turn, and
ratios are taken in pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swaa_local.schedule.config import LayerMode, Schedule

ANSWER = 64  # tokens of a row that have a loss


def stepper(model: Any, masks: Any, length: int, device: str) -> Callable[[Schedule], float]:
    """Seconds of a step under a schedule, on one row of `length` tokens."""
    import torch

    from swaa_local.tune.examples import Example
    from swaa_local.tune.model import precision
    from swaa_local.tune.rows import answer_logits, loss_of, row_tensors

    tokens = tuple(torch.randint(0, model.config.vocab_size, (length,)).tolist())
    row = row_tensors([Example(tokens, length - ANSWER, "random")]).to(device)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(schedule: Schedule) -> float:
        started = wait()
        with precision(device):
            loss = loss_of(answer_logits(model, masks, row, schedule), row, None)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return wait() - started

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--length", default="8192,16384", help="tokens of a row")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--sinks", type=int, default=100)
    parser.add_argument("--fa-decode", action="store_true")
    parser.add_argument("--tail", type=int, default=0)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--attention", choices=["auto", "flash", "sdpa"], default="auto", help="as of swaa-local tune")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()

    import peft
    import torch
    import transformers

    from swaa_local.tune.attention import choose_attention
    from swaa_local.tune.masks import ATTENTION, Masks

    config = transformers.AutoConfig.from_pretrained(args.config.parent)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)
    masks = Masks(choose_attention(args.attention, args.device, config, print))
    masks.attach(base)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    lora = peft.LoraConfig(r=16, lora_alpha=128, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora).train()

    n_layer = config.num_hidden_layers
    mode = LayerMode.PREFILL if args.fa_decode else LayerMode.ALWAYS
    windowed = Schedule(args.window, args.sinks, (mode,) * n_layer, tail=args.tail)
    full = Schedule.full(n_layer)
    print("| tokens | full s | windowed s | windowed over full |\n|--:|--:|--:|--:|")
    for length in map(int, args.length.split(",")):
        step = stepper(model, masks, length, args.device)
        for schedule in (full, windowed):  # compiled, and the caches of the allocator filled
            step(schedule)
        pairs = [(step(full), step(windowed)) for _ in range(args.repetitions)]
        ratios = [w / f for f, w in pairs]
        medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {length} | {medians[0]:.3f} | {medians[1]:.3f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
