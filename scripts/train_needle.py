#!/usr/bin/env python3
"""Train the model that swaa-local brings along, and find the layers that must keep full attention.

    scripts/train_needle.py --out DIR                                  # on a GPU: the model that is shipped
    scripts/train_needle.py --out DIR --minutes 10 --seed 3            # as many steps as fit; the log says how many
    scripts/train_needle.py --out DIR --smoke --device cpu             # a few tiny steps, to see that it runs

Writes a Hugging Face checkpoint and log.json, which holds the settings, the losses, the accuracy under every schedule
and the command that makes the GGUF. Needs PyTorch, tokenizers and safetensors; see docs/notebook.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

STEPS, SEED = 7000, 1
"""Of the model that is shipped."""

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    options = parse_arguments()
    out: Path = options.out
    if (out / "model.safetensors").exists() and not options.force:
        sys.exit(f"{out} holds a model already; pass --force to replace it")
    start = time.monotonic()
    import tokenizers
    import torch

    from needle import schedules, trainer
    from needle.docstrings import read_docstrings
    from needle.model import Needle, NeedleConfig, load_checkpoint, save_checkpoint
    from needle.recipe import schedule_options
    from needle.rows import RowMaker, tokenizer_texts
    from needle.tokenizer import ENDOFTEXT, IM_END, PRE_TOKENIZER, Encoder, save_tokenizer, train_tokenizer

    def log(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    out.mkdir(parents=True, exist_ok=True)
    trainer.make_deterministic()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    device_name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"

    sentences = read_docstrings()
    texts = tokenizer_texts(options.seed, sentences, 200) if options.smoke else tokenizer_texts(options.seed, sentences)
    tokenizer = train_tokenizer(texts)
    encoder = Encoder(tokenizer)
    maker = RowMaker(encoder, options.seed, sentences)
    log(f"tokenizer of {tokenizer.get_vocab_size()} from {len(sentences)} sentences and our own patterns")

    config = NeedleConfig()
    curriculum = trainer.Curriculum(options.steps or STEPS)
    if options.smoke:
        config = replace(config, hidden_size=64, num_hidden_layers=2, intermediate_size=64, head_dim=16)
        stages = tuple(trainer.Stage(stage.share, stage.length // 2) for stage in curriculum.stages[:2])
        curriculum = replace(curriculum, tokens_per_step=2048, stages=stages)
    save_tokenizer(tokenizer, out, config.max_position_embeddings)

    measured: dict[int, float] = {}
    if options.minutes is not None and options.steps is None:
        measured = trainer.measure_step_s(config, curriculum, options.device)
        # Data may be late and the machine slower for a while.
        n_steps = trainer.steps_for(0.92 * 60 * options.minutes, measured, curriculum)
        log(f"ms per step by row length: { ({length: round(1000 * s, 1) for length, s in measured.items()}) }")
        curriculum = replace(curriculum, n_steps=n_steps)
    log(f"{curriculum.n_steps} steps of {curriculum.tokens_per_step} tokens on {device_name}")

    def save(model: Needle) -> None:
        special = encoder.special
        save_checkpoint(model, out, eos=special[IM_END], pad=special[ENDOFTEXT])

    torch.manual_seed(options.seed)
    model = Needle(config).to(options.device)
    model.initialize(options.seed)
    outcome = trainer.train(
        model,
        maker,
        curriculum,
        device=options.device,
        workers=options.workers,
        deadline=time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf"),
        log=log,
        save=save,
        log_every=1 if options.smoke else 100,
    )
    save(model)
    log(f"{outcome.n_tokens / 1e6:.1f} M tokens in {outcome.seconds} s")
    document = {
        "command": f"scripts/train_needle.py --out DIR --steps {curriculum.n_steps} --seed {options.seed}",
        "seed": options.seed,
        "device": device_name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "docstrings": {"sentences": len(sentences), "sha256": sha256("\n".join(sentences).encode()).hexdigest()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "model": asdict(config),
        "curriculum": asdict(curriculum),
        "measured_step_s": measured,
        "training": asdict(outcome),
    }
    write_log(out, document)

    # As it will be used: rounded to 16 bits.
    model = load_checkpoint(out).to(options.device)
    bench = schedules.Bench(
        model, RowMaker(encoder, options.seed + 1, sentences), encoder.special[ENDOFTEXT], options.device
    )
    lengths, n = ((256,), 2) if options.smoke else ((2048, 4096, 8192), options.questions)
    evaluation = schedules.report(bench, config.num_hidden_layers, lengths, n, options.goal, log)
    document["evaluation"] = evaluation
    schedule = shlex.join(schedule_options(evaluation["full_layers"]))
    document["convert"] = (
        f"swaa-local convert DIR -o needle.gguf --outtype q8_0 --pre-tokenizer {PRE_TOKENIZER} {schedule}"
    )
    write_log(out, document)
    log(f"{out}: {document['convert']}")
    print(out)
    best = max(evaluation["sweep"].values())
    if best < options.goal and not options.smoke:
        sys.exit(f"no schedule reaches {options.goal:.0%}: the best has {best:.1%}; see docs/notebook.md")


def write_log(out: Path, document: dict[str, object]) -> None:
    part = out / "log.json.part"
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(out / "log.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of weights, data and tokenizer [{SEED}]")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[cuda where there is a GPU]")
    parser.add_argument("--steps", type=int, help=f"training steps of 65,536 tokens [{STEPS}, or what --minutes holds]")
    parser.add_argument(
        "--minutes", type=float, help="stop training after so long; without --steps, also measure how many steps fit"
    )
    parser.add_argument("--workers", type=int, help="processes that make data [cores - 2; 0 on a CPU]")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU [1]")
    parser.add_argument("--questions", type=int, default=128, help="asked per schedule, task and length [128]")
    parser.add_argument("--goal", type=float, default=0.97, help="accuracy that the chosen schedule must reach [0.97]")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few steps, to see that all of it runs")
    parser.add_argument("--force", action="store_true", help="replace a model in DIR")
    options = parser.parse_args()
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.steps is None and (options.minutes is None or options.smoke):
        options.steps = 8 if options.smoke else STEPS
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be 1 or more")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; it must be above 0")
    if options.workers is None:
        options.workers = max(1, (os.cpu_count() or 3) - 2) if options.device == "cuda" else 0
    return options


if __name__ == "__main__":
    main()
