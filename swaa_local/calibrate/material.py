"""The prompts of a calibration, made when they are needed: long and short ones for the search, long ones for the check.

Knows the request and the vocabulary; what the model answers of them, it is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from swaa_local.calibrate.haystack import Haystack, Part, split_units
from swaa_local.calibrate.log import CalibrateLog, Kinds
from swaa_local.calibrate.measure import Bench, Prompted
from swaa_local.calibrate.prompts import GENERATED, Maker, Text
from swaa_local.calibrate.questions import OwnQuestions
from swaa_local.calibrate.results import CalibrateError, Scale

N_LONG, N_SHORT, N_CHECK = 6, 2, 8
"""Texts that there are for the search, and for the check."""
_N_QUESTIONS, _MORE_QUESTIONS, _LONG_TEXT = 16, 32, 8192
"""Of a text if it has room: more of one of so many tokens, because reading it takes far longer than they do."""
_SHORT_LENGTH = 1024
"""Tokens; shorter prompts have no room for the questions."""
SHORTER = 4
"""Short prompts are shorter by this, and so are their windows."""


class Material:
    """Texts and their questions as tokens. window: the widest, which answers must lie beyond."""

    def __init__(
        self,
        bench: Bench,
        log: CalibrateLog,
        haystack: Haystack,
        own: OwnQuestions | None,
        length: int,
        window: int,
        seed: int,
    ) -> None:
        self._bench, self._log, self._own = bench, log, own
        self._length, self._window = length, window
        if own is not None:  # short prompts hide facts in the user's texts
            haystack = Haystack(tuple(unit for text in own.all for unit in split_units(text.text)))
        self._maker = Maker(haystack, bench.count, bench.count_prompt, seed=seed)
        self._kinds: dict[Scale, Kinds] = {}
        self._texts: dict[tuple[Part, Scale, int], Text] = {}
        self._prompts: dict[tuple[Part, Scale, int], list[Prompted]] = {}

    @property
    def has_own(self) -> bool:
        """Whether the questions of full length are the user's."""
        return self._own is not None

    @property
    def n_long(self) -> int:
        return N_LONG if self._own is None else len(self._own.search)

    @property
    def n_short(self) -> int:
        """0 where a quarter of the length has no room for questions."""
        length, window = self._length // SHORTER, max(1, self._window // SHORTER)
        fit = length >= _SHORT_LENGTH and self._maker.n_that_fit(length, window) >= 2 * len(GENERATED)
        return N_SHORT if fit else 0

    @property
    def n_check(self) -> int:
        return N_CHECK if self._own is None else len(self._own.check)

    @property
    def longest_question(self) -> int:
        """Tokens of the longest question of the user's, with what stands behind it in the prompt, about."""
        asked = [ask.question for text in self._own.all for ask in text.asks] if self._own is not None else []
        around = self._bench.count_prompt("")
        return max((self._bench.count(question) for question in asked), default=0) + around

    @property
    def digest(self) -> str:
        """Of all texts that were made."""
        texts = sorted(self._texts.values(), key=lambda text: text.id)
        return hashlib.sha256("".join(text.digest for text in texts).encode()).hexdigest()[:16]

    def set_kinds(self, scale: Scale, kinds: Kinds) -> None:
        """Ask these kinds alone from now on; texts that there are lose their questions of other kinds."""
        self._kinds[scale] = kinds
        self._prompts = {key: value for key, value in self._prompts.items() if key[1] != scale}

    def kinds(self, scale: Scale) -> Kinds:
        return self._kinds.get(scale) or self._kinds.get("short") or Kinds(GENERATED, (), {})

    def text(self, part: Part, scale: Scale, number: int) -> Text:
        """Raises `CalibrateError` if the length has no room for it."""
        key = (part, scale, number)
        if key not in self._texts:
            if self._own is not None and scale == "long":
                text = self._own.of(part)[number]
            else:
                shorter = SHORTER if scale == "short" else 1
                # By the first long text it is found out which kinds are answered at full length.
                is_first = (part, scale, number) == ("search", "long", 0)
                length = self._length // shorter
                n_questions = _MORE_QUESTIONS if length >= _LONG_TEXT else _N_QUESTIONS
                kinds = self.kinds("short" if is_first else scale).kinds
                maker = replace(self._maker, kinds=kinds, n_questions=n_questions)
                text = maker.text(part, length, max(1, self._window // shorter), number)
            self._log.add_text(text.id, text.digest, len(text.asks))
            self._texts[key] = text
        return self._texts[key]

    def prompts(self, part: Part, scale: Scale, number: int) -> list[Prompted]:
        """The questions of a text that the model can answer. Raises `CalibrateError` if there is none."""
        key = (part, scale, number)
        if key not in self._prompts:
            text = self.text(part, scale, number)
            if self._own is not None and scale == "long":
                prompts = self._bench.own_answers(text)
            else:
                kinds = self.kinds(scale)
                asked = replace(text, asks=tuple(ask for ask in text.asks if ask.kind in kinds.kinds))
                prompts = self._bench.prompted(asked, bare=frozenset(kinds.bare))
            if not prompts:
                raise CalibrateError(
                    f"with full attention the model answers none of the questions about text {number + 1}, so no "
                    "schedule can be judged by them; give answers that it gives, or leave them out"
                )
            self._prompts[key] = prompts
        return self._prompts[key]

    def kept(self, scale: Scale, number: int, n_asked: int) -> list[int] | None:
        """Which questions of a trial of the search are still asked, where so many were; None if it had others."""
        if self._own is not None and scale == "long":
            return list(range(n_asked))
        asks, kinds = self.text("search", scale, number).asks, self.kinds(scale).kinds
        kept = [i for i, ask in enumerate(asks) if ask.kind in kinds]
        return {len(kept): list(range(n_asked)), len(asks): kept}.get(n_asked)

    def pilot(self, scale: Scale, kinds: tuple[str, ...]) -> tuple[Sequence[Prompted], Sequence[Prompted]]:
        """Questions of these kinds, with the beginning of an answer and without."""
        shorter = SHORTER if scale == "short" else 1
        length, window = self._length // shorter, max(1, self._window // shorter)
        n_questions = _MORE_QUESTIONS if length >= _LONG_TEXT else _N_QUESTIONS
        text = replace(self._maker, kinds=kinds, n_questions=n_questions).text("search", length, window, 0)
        return self._bench.prompted(text), self._bench.prompted(text, bare=frozenset(kinds))
