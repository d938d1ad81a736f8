"""Which kinds of questions full attention answers: by a short prompt first, then by the first long one.

Knows the model by its bench, and questions by their kinds; what schedules make of them, others ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NoReturn

from swaa_local.calibrate.log import CalibrateLog, Kinds
from swaa_local.calibrate.material import SHORTER, Material
from swaa_local.calibrate.measure import Bench, Prompted
from swaa_local.calibrate.prompts import EASY, GENERATED
from swaa_local.calibrate.results import CalibrateError, Scale, Trial
from swaa_local.schedule.config import Schedule

LEAST_RIGHT = 0.4
"""Share of a kind's questions that full attention must get right, or they are not asked."""
_WELL_ANSWERED = 0.7
"""If full attention gets fewer right, easier questions may be the better measure."""
_PILOT, _LONG = "pilot", "long"
"""Where it was found out which kinds of questions are answered."""
_LEAST_QUESTIONS = 6


class Asking:
    """Finds the kinds and tells them to the material. length: tokens of long prompts. say: told what is not asked."""

    def __init__(
        self, material: Material, bench: Bench, log: CalibrateLog, length: int, say: Callable[[str], None]
    ) -> None:
        self._material, self._bench, self._log, self._length, self._say = material, bench, log, length, say

    def choose(self, full: Schedule, scale: Scale) -> None:
        """By a prompt of this scale: which kinds of questions full attention answers, and whether it begins answers
        itself. Raises `CalibrateError` if there is none."""
        if _PILOT not in self._log.kinds:
            tried: list[tuple[float, Kinds, Trial]] = []
            for kinds in (GENERATED, EASY):
                found, trial = self._try(full, scale, kinds)
                tried.append((fmean(found.shares[kind] for kind in found.kinds or kinds), found, trial))
                if found.kinds and tried[-1][0] >= _WELL_ANSWERED:
                    break
            _, found, trial = max(tried, key=lambda each: (bool(each[1].kinds), each[0]))
            if not found.kinds:
                self._refuse(found.shares, self._length // SHORTER if scale == "short" else self._length)
            if found.kinds == GENERATED and not found.bare:
                self._log.add_trial(trial)  # on the very questions of the first text
            self._log.add_kinds(_PILOT, found)
        self._material.set_kinds("short", self._log.kinds[_PILOT])
        self._material.set_kinds("long", self._log.kinds.get(_LONG, self._log.kinds[_PILOT]))

    def _try(self, full: Schedule, scale: Scale, tried: tuple[str, ...]) -> tuple[Kinds, Trial]:
        """Those that are answered, and the trial with the beginnings of answers."""
        begun, bare = self._material.pilot(scale, tried)
        trial = self._bench.trial(full, scale, 0, begun)
        shares = _shares(begun, trial)
        if any(share < LEAST_RIGHT for share in shares.values()):
            without = _shares(bare, self._bench.trial(full, scale, 0, bare, timed=False))
        else:
            without = {}
        best = {kind: max(share, without.get(kind, 0.0)) for kind, share in shares.items()}
        kinds = tuple(kind for kind in tried if best.get(kind, 0.0) >= LEAST_RIGHT)
        bare_kinds = tuple(kind for kind in kinds if without.get(kind, 0.0) > shares[kind])
        return Kinds(kinds, bare_kinds, best), trial

    def drop(self, first: Trial) -> None:
        """Ask no more what is answered in short prompts but not in long ones. first: full attention on the first long
        prompt. Raises `CalibrateError` if too little is left."""
        known = self._log.kinds.get(_LONG)
        if known is None:
            prompts = self._material.prompts("search", "long", 0)
            shares = _shares(prompts, first)
            asked = self._material.kinds("long")
            kinds = tuple(kind for kind in asked.kinds if shares.get(kind, 0.0) >= LEAST_RIGHT)
            if not kinds or sum(prompt.kind in kinds for prompt in prompts) < _LEAST_QUESTIONS:
                self._refuse(shares, self._length)
            known = Kinds(kinds, tuple(kind for kind in asked.bare if kind in kinds), shares)
            self._log.add_kinds(_LONG, known)
        dropped = [kind for kind in GENERATED if kind not in known.kinds]
        if dropped:
            self._say(
                f"not asked: {', '.join(dropped)}; full attention gives fewer than {LEAST_RIGHT:.0%} of the answers"
            )
        self._material.set_kinds("long", known)

    def _refuse(self, shares: dict[str, float], length: int) -> NoReturn:
        said = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        raise CalibrateError(
            f"with full attention this model does not answer questions about texts of {length} tokens ({said} right), "
            "so no schedule can be judged by them; pass a shorter --length, your own --questions, or take a better "
            "model"
        )


def _shares(prompts: Sequence[Prompted], trial: Trial) -> dict[str, float]:
    """Of right answers, by kind."""
    by_kind: dict[str, list[bool]] = {}
    for prompt, right in zip(prompts, trial.right, strict=True):
        by_kind.setdefault(prompt.kind, []).append(right)
    return {kind: fmean(rights) for kind, rights in by_kind.items()}
