"""What an evaluation found. Pure: knows questions, answers and variants; nothing of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from swaa_local.schedule.variants import Variant


@dataclass(frozen=True)
class Evaluation:
    """What came out: the cells of the plan in order, and the records of their questions and answers."""

    model: str
    variants: tuple[Variant, ...]
    cells: tuple[Cell, ...]
    questions: dict[str, QuestionRecord]
    answers: dict[tuple[str, str], AnswerRecord]

    @property
    def full(self) -> str | None:
        """The first variant with full attention."""
        return next((variant.name for variant in self.variants if variant.is_full), None)

    @property
    def naive(self) -> str | None:
        """The first variant with a window and nothing else."""
        return next((variant.name for variant in self.variants if variant.is_naive), None)


@dataclass(frozen=True)
class Cell:
    """The questions of one task and length under one variant: what a row of the tables is made of."""

    task: str
    length: int | None
    variant: str
    questions: tuple[str, ...]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Of its answers in the results file."""
        return [(question, self.variant) for question in self.questions]


@dataclass(frozen=True)
class QuestionRecord:
    """A question as it was asked. length: as wanted, in tokens; None for a dataset's. tokens_after: between the needle
    and the end of the prompt; None if there is not one needle."""

    id: str
    task: str
    length: int | None
    index: int
    prompt: str
    answer_prefix: str
    references: tuple[str, ...]
    metric: str
    max_tokens: int
    prompt_tokens: int
    depth: float | None
    tokens_after: int | None


@dataclass(frozen=True)
class AnswerRecord:
    """What a variant answered, its score, and what it took. Times in seconds, cache in bytes."""

    question: str
    variant: str
    answer: str
    thinking: str
    finish: str
    share: float
    correct: bool
    prefill_s: float
    generated_tokens: int
    decode_s: float
    kv_bytes: int
