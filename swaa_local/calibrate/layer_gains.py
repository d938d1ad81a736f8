"""What each layer brings by itself, with windows in all others: one layer at a time or, with little time, in groups."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from swaa_local.calibrate.evidence import Limits, Space
from swaa_local.calibrate.results import LayerGain, Scale
from swaa_local.calibrate.trials import Trials
from swaa_local.schedule.config import Schedule

_LEAST_TRIALS = 5
_MISSING = 0.97
"""Of quality: where windows alone keep more, a smaller window shows better what layers bring."""


def screen(trials: Trials, space: Space, limits: Limits, until_s: float) -> str:
    """Put the layers' gains into the evidence; on which prompts they were measured, "" if there was no time."""
    return _Screen(trials, space, limits, until_s).run()


class _Screen:
    def __init__(self, trials: Trials, space: Space, limits: Limits, until_s: float) -> None:
        self._trials, self._known, self._until_s = trials, trials.evidence, until_s
        self._space, self._limits = space, limits

    def run(self) -> str:
        layers, trials = self._space.model.sliding, self._trials
        n = len(layers)
        windows = self._space.windows[: len(self._space.windows) // 2 + 1]
        none = self._space.schedule((), windows[-1])
        alone = [none, *(self._space.schedule((layer,), none.window) for layer in layers)]
        new = sum((each, "long", 0) not in self._known.trials for each in alone)
        fits = new * trials.cost("long") <= max(0.0, trials.left(self._until_s))
        scale: Scale = "long" if (fits and self._limits.n_long) or not self._limits.n_short else "short"
        trials.stage(f"what each layer brings, on {scale} prompts")
        for window in reversed(windows):
            none = self._space.schedule((), window)
            if trials.measure(none, scale, 0, self._until_s) is None:
                trials.notes.append("layers were not ranked: there was no time for it")
                return ""
            quality = self._known.quality(none, scale)
            if quality is None or quality.value < _MISSING:  # or no layer has anything to bring
                break
        measured_at = f"{scale} prompts, window {window if scale == 'long' else window // 4}"
        known = sum((each, scale, 0) in self._known.trials for each in alone[1:])
        affordable = known + int(max(0.0, trials.left(self._until_s)) / trials.cost(scale))
        if affordable < min(n, _LEAST_TRIALS):
            trials.notes.append("layers were not ranked: there was no time for it")
            return measured_at
        size = _group_size(n, affordable)
        groups = [layers[i : i + size] for i in range(0, n, size)]
        self._measure(groups, none, scale, 0)
        if size > 1:
            ranked = sorted(groups, key=lambda group: -sum(self._known.gain(layer) for layer in group))
            for group in ranked:
                if trials.left(self._until_s) < len(group) * trials.cost(scale):
                    break
                self._measure([(layer,) for layer in group], none, scale, 0)
            grouped = n - sum(gain.alone for gain in self._known.gains.values())
            trials.notes.append(f"{grouped} of {n} layers were measured only in groups of {size}, for lack of time")
            return measured_at
        n_texts = self._limits.n_long if scale == "long" else self._limits.n_short
        for text in range(1, n_texts):
            if trials.left(self._until_s) < (n + 2) * trials.cost(scale):
                break
            self._measure(groups, none, scale, text)
        return measured_at

    def _measure(self, groups: Sequence[tuple[int, ...]], none: Schedule, scale: Scale, text: int) -> None:
        trials, gains = self._trials, self._known.gains
        for group in groups:
            kept = self._space.schedule(group, none.window)
            if any(trials.measure(each, scale, text, self._until_s) is None for each in (none, kept)):
                return
            pairs = self._known.pairs(kept, none, scale)
            gain = fmean(b - a for one, base in pairs for a, b in zip(one.nll, base.nll, strict=True)) / len(group)
            for layer in group:
                if len(group) == 1 or layer not in gains:
                    gains[layer] = LayerGain(layer, gain, len(group) == 1)


def _group_size(n_layer: int, affordable: int) -> int:
    """Layers that are tried together, where so many trials can be afforded: as few as leave time for those of the best
    group one by one, or at least for all groups."""
    sizes = range(1, n_layer)
    enough = [size for size in sizes if -(-n_layer // size) + (size if size > 1 else 0) <= affordable]
    return next(iter(enough), next(size for size in (*sizes, n_layer) if -(-n_layer // size) <= affordable))
