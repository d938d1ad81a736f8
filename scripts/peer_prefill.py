#!/usr/bin/env python3
"""Time how transformers reads a prompt: what somebody with the checkpoint and a GPU would use instead.

    scripts/peer_prefill.py --shape qwen3-4b --length 4096,32768,131072
    swaa-local bench f16.gguf -fa on -ub 2048 -p 4096,32768,131072 -n 0 --variants "full,w2048 k100 fadec"

Full attention through PyTorch's SDPA (its flash kernels), weights and KV cache in bfloat16, random weights in the shape
of scripts/make_model.py, random tokens; the logits of the last token alone. One warm-up per length, then medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from make_model import N_CTX, SHAPES, Shape


def config_of(shape: Shape, n_ctx: int) -> Any:
    """transformers' config of a shape. Raises KeyError for one that this does not know."""
    import transformers

    kind = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[shape.arch]
    return kind(
        vocab_size=shape.n_vocab,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_ff,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_head_kv,
        head_dim=shape.head_dim,
        max_position_embeddings=n_ctx,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-4b")
    parser.add_argument("--length", default="4096,32768,131072", help="tokens of prompts")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    lengths = [int(word) for word in args.length.split(",")]

    import torch
    import transformers

    shape = SHAPES[args.shape]
    config = config_of(shape, max(N_CTX, *lengths))
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        ).eval()

    def read(tokens: torch.Tensor) -> float:
        started = now()
        with torch.inference_mode():
            model(tokens, logits_to_keep=1, use_cache=True)
        return now() - started

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{shape.name} shape, transformers {transformers.__version__}, PyTorch {torch.__version__}, {where}\n")
    print("| tokens | prefill s | tok/s | range |\n|--:|--:|--:|--:|")
    for length in lengths:
        tokens = torch.randint(0, shape.n_vocab, (1, length), device=args.device)
        read(tokens)
        times = [read(tokens) for _ in range(args.repetitions)]
        middle = statistics.median(times)
        spread = f"{length / max(times):,.0f}-{length / min(times):,.0f}"
        print(f"| {length} | {middle:.3f} | {length / middle:,.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
