"""Data for fine-tunes of the bundled model: facts in short texts, and a text of sentences. Knows `needle.documents`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from swaa_local.needle import documents


def write_facts(path: Path, n: int, n_words: int = 150) -> Path:
    """JSON lines of prompts, a fact in a text asked for at its end, and answers, which the bundled model does not give
    in these words."""
    rows = []
    for seed in range(n):
        rng = random.Random(seed)
        document = documents.make_document(rng, "statements", n_words, lambda text: len(text.split()), n_facts=4)
        placed = document.facts[seed % len(document.facts)]
        answer = f"The {placed.fact.attribute} of {placed.fact.entity} is {placed.fact.value}."
        rows.append({"prompt": document.prompt(placed), "answer": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_text(path: Path, n: int, seed: int = 0) -> Path:
    """`n` sentences."""
    rng, filler = random.Random(seed), documents.Filler()
    path.write_text(" ".join(filler.sentence(rng) for _ in range(n)))
    return path
