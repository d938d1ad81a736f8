"""Variable tracking: RULER's task `vt`, in our own words.

Structure, counts and placement follow NVIDIA/RULER (arXiv 2404.06654; scripts/data/synthetic/variable_tracking.py): one
chain of four hops among lines of noise, its statements in order at random places, after a solved example of up to 500
tokens with names of three letters instead of five.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from swaa_local.needle.documents import sample
from swaa_local.tasks import words
from swaa_local.tasks.base import CountTokens, Question, sized
from swaa_local.tasks.needles import NOISE

N_HOPS = 4
MAX_TOKENS = 30
_EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class VariableTracking:
    name: str = "vt"

    def make(self, rng: random.Random, length: int, index: int, count: CountTokens) -> Question:
        seeds = rng.random(), rng.random()
        least = N_HOPS + 2  # more lines than statements

        def build_example(n: int) -> Question:
            return _build(random.Random(seeds[0]), n, n_letters=3)

        shortest = build_example(least)
        needed = count(shortest.prompt, shortest.answer_prefix) + MAX_TOKENS
        example = sized(self.name, build_example, max(_EXAMPLE_TOKENS, needed), count, least=least)
        solved = f"{example.prompt}\n{example.answer_prefix} {' '.join(example.references)}\n\n\n"

        def build(n: int) -> Question:
            return _build(random.Random(seeds[1]), n, n_letters=5, before=solved)

        return sized(self.name, build, length, count, least=least)


def _build(rng: random.Random, n: int, *, n_letters: int, before: str = "") -> Question:
    names = words.letters(rng, string.ascii_uppercase, n_letters, N_HOPS + 1)
    value = str(10000 + int(rng.random() * 89999))
    statements = [f"VAR {names[0]} = {value}"]
    statements += [f"VAR {name} = VAR {source}" for source, name in pairwise(names)]
    lines = [NOISE] * n
    for moved, place in enumerate(sorted(sample(rng, range(n), len(statements)))):
        lines.insert(place + moved, statements[moved])
    text = "\n".join(lines)
    prompt = (
        f"{before}Follow the chain(s) of variable assignments that are hidden in the following text, and remember "
        f"them.\n\n{text}\nQuestion: Which variables in the text above have the value {value}? Find all of them."
    )
    prefix = (
        f"Answer: By the chain(s) of variable assignments in the text above, {len(names)} variables have the value "
        f"{value}, namely:"
    )
    return Question(prompt, tuple(names), "all", MAX_TOKENS, prefix)
