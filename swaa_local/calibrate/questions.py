"""The user's own questions: JSON objects, one a line, with a text, a question, and an answer if one is known."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swaa_local.calibrate.haystack import Part
from swaa_local.calibrate.prompts import Ask, Count, Text
from swaa_local.calibrate.results import CalibrateError
from swaa_local.files.input_file import read_input
from swaa_local.needle.documents import sample

_FIELDS = {"text", "question", "answer"}


@dataclass(frozen=True)
class OwnQuestions:
    """Texts with their questions, divided between search and check. left_out: what was, and why."""

    search: tuple[Text, ...]
    check: tuple[Text, ...]
    left_out: tuple[str, ...] = ()

    def of(self, part: Part) -> tuple[Text, ...]:
        return self.search if part == "search" else self.check

    @property
    def all(self) -> tuple[Text, ...]:
        return self.search + self.check


def read_questions(path: Path) -> list[tuple[str, list[Ask]]]:
    """Texts and what is asked about each, in the order of the file. Raises `CalibrateError` with the line."""
    try:
        lines = read_input(path, str(path)).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise CalibrateError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrateError(f"{path} is not UTF-8 (byte {error.start + 1})") from None
    texts: dict[str, list[Ask]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(value, str) and value.strip() for value in row.values()):
            raise CalibrateError(
                f"{path} line {number} is no JSON object of texts; write "
                '{"text": ..., "question": ..., "answer": ...}'
            )
        if not {"text", "question"} <= set(row) <= _FIELDS:
            raise CalibrateError(
                f"{path} line {number} has the fields {', '.join(sorted(row))}; it needs text and question, and may "
                "have answer"
            )
        reference = row.get("answer")
        at = row["text"].rfind(reference) if reference is not None else -1
        ask = Ask("own", row["question"], "", reference, at if at >= 0 else None)
        texts.setdefault(row["text"], []).append(ask)
    if (n := sum(map(len, texts.values()))) < 4:
        raise CalibrateError(f"{path} has {n} questions; give 4 at least, half of which are kept for the check")
    return list(texts.items())


def divide(found: Sequence[tuple[str, list[Ask]]], seed: int, length: int, window: int, count: Count) -> OwnQuestions:
    """Half of the texts for the search and half for the check; the questions, where there is a single text.

    Left out are questions whose answer stands within `window` tokens of the end, so that a window shows it. Raises
    `CalibrateError` if too few are left.
    """
    kept: list[tuple[str, list[Ask]]] = []
    n_short = n_inside = 0
    for text, asks in found:
        if count(text) <= window:
            n_short += len(asks)
            continue
        beyond = [ask for ask in asks if ask.needle_at is None or count(text[ask.needle_at :]) > window]
        n_inside += len(asks) - len(beyond)
        if beyond:
            kept.append((text, beyond))
    n_kept = sum(len(asks) for _, asks in kept)
    left_out = []
    if n_short:
        left_out.append(f"{n_short} questions about texts that a window of {window} tokens shows whole were left out")
    if n_inside:
        left_out.append(f"{n_inside} questions were left out: their answers stand in the last {window} tokens")
    if n_kept < 4:
        raise CalibrateError(
            f"{n_kept} questions are left to judge a window by: {'; '.join(left_out)}. Ask about what stands further "
            "away from the end, or pass a smaller --window"
        )
    rng = random.Random(f"{seed}/own")
    if len(kept) == 1:
        text, asks = kept[0]
        mixed = sample(rng, asks, len(asks))
        half = len(mixed) // 2
        parts = [[(text, mixed[:half])], [(text, mixed[half:])]]
    else:
        mixed_texts = sample(rng, kept, len(kept))
        half = len(mixed_texts) // 2
        parts = [mixed_texts[:half], mixed_texts[half:]]
    made = [
        tuple(Text(f"{name}/{length}/{i}", text, tuple(asks)) for i, (text, asks) in enumerate(part))
        for name, part in zip(("search", "check"), parts, strict=True)
    ]
    return OwnQuestions(made[0], made[1], tuple(left_out))
