#!/usr/bin/env python3
"""Decode answers with drafts and without, in turn, and compare how long that takes.

    scripts/draft_pairs.py SmolLM2-135M-Instruct-Q4_1.gguf docs/results.md swaa_local/llama.py --length 7000

Each text is cut to --length tokens; the model is asked for a summary, for an answer, and to go on with the text, at
temperature 0 and 0.7. The text is read once; then both ways decode the same answers, pair by pair, which of them goes
first in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ASKS = {
    "summary": "Summarize the text in five sentences.",
    "question": "What is the text about, and which of its parts would you read first? Say why.",
    "going on": "Go on with the text from where it ends, in the same style.",
}
TEMPERATURES = (0.0, 0.7)


class Asked:
    """A model that answers with as many tokens as are asked for."""

    def __init__(self, llm: Any, tokens: int) -> None:
        self._llm, self._tokens = llm, tokens
        self._no_end = {token: -100.0 for token in range(llm.n_vocab()) if llm.is_end(token)}

    def decode(self, prompt: str, temperature: float, speculate: bool | str) -> Any:
        """Figures of one answer."""
        self._llm.create_chat_completion(
            [{"role": "user", "content": prompt}],
            max_tokens=self._tokens,
            temperature=temperature,
            seed=1,
            speculate=speculate,
            logit_bias=self._no_end,
        )
        return self._llm.last_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=7000, help="tokens of a text")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--sinks", type=int, default=100)
    parser.add_argument("--draft-window", type=int, default=512)
    parser.add_argument("--speculate", choices=["auto", "on", "off"], default="auto", help="off shows the noise")
    parser.add_argument("-r", "--pairs", type=int, default=2, help="of each text, question and temperature")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for a busy machine; with -t 1")
    args = parser.parse_args()

    if args.cpu_time:
        time.perf_counter = time.process_time  # for `auto` as well

    from swaa_local import Llama, SWAAConfig

    llm = Llama(
        str(args.model),
        swaa=SWAAConfig(args.window, args.sinks, force_fa_decode=True, prompt_tail=128),
        n_ctx=args.length + args.tokens + 256,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        draft_window=args.draft_window,
        verbose=False,
    )
    asked = Asked(llm, args.tokens)
    ways: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}
    way = ways[args.speculate]
    print("| text | asked | temperature | tokens a pass | accepted | speed with drafts over without |")
    print("|---|---|--:|--:|--:|--:|")
    every = []
    for path in args.texts:
        tokens = llm.tokenize(path.read_bytes(), add_bos=False)[: args.length]
        text = llm.detokenize(tokens).decode(errors="ignore")
        for name, words in ASKS.items():
            prompt = f"{text}\n\n{words}"
            for temperature in TEMPERATURES:
                asked.decode(prompt, temperature, False)  # reads it
                ratios, drafted = [], []
                for pair in range(args.pairs):
                    # by number: with `off` both ways are one
                    order = (0, 1) if pair % 2 else (1, 0)
                    found = {i: asked.decode(prompt, temperature, (False, way)[i]) for i in order}
                    ratios.append(found[1].decode_tokens_per_s / found[0].decode_tokens_per_s)
                    drafted.append(found[1])
                every += ratios
                accepted = sum(run.accepted_tokens for run in drafted) / max(
                    1, sum(run.drafted_tokens for run in drafted)
                )
                a_pass = statistics.mean(run.tokens_per_pass for run in drafted)
                shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"| {path.name} | {name} | {temperature} | {a_pass:.2f} | {accepted:.2f} | {shown} |", flush=True)
    spread = f"{min(every):.2f} to {max(every):.2f}"
    print(
        f"\n{len(every)} pairs: median {statistics.median(every):.2f}, {spread}, "
        f"geometric mean {statistics.geometric_mean(every):.3f}"
    )


if __name__ == "__main__":
    main()
