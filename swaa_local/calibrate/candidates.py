"""Which schedules are worth a trial, given what each layer brings. Pure; when and how often they are tried, `search`
decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from swaa_local.calibrate.evidence import Evidence, Space
from swaa_local.calibrate.results import Candidate
from swaa_local.schedule.config import LayerMode, Schedule


def whole(space: Space, ranked: Sequence[int]) -> list[Schedule]:
    """With each window: none full, the best few of `ranked`, an eighth, a quarter, half, periodic ones; and presets."""
    layers = space.model.sliding
    n = len(layers)
    sets: dict[tuple[int, ...], None] = {(): None}
    if ranked:
        for k in (1, 2, 3, 4, round(n / 8), round(n / 4), round(n / 2)):
            if 0 < k < n:
                sets[tuple(sorted(ranked[:k]))] = None
    for step in (2, 4):
        for start in range(step):
            if len(periodic := layers[start::step]) < n:
                sets[periodic] = None
    made = {space.schedule(full, window): None for window in space.windows for full in sets}
    return list(made | dict.fromkeys(space.presets))


def beside(best: Candidate, space: Space, known: Evidence) -> list[Schedule]:
    """One full layer less or another one, or a smaller window; more of both if the best does not keep enough."""
    schedule, windows, ranked = best.schedule, space.windows, known.ranking()
    full = set(schedule.layers(LayerMode.FULL))
    others = [layer for layer in ranked if layer not in full]
    near: list[Schedule] = []
    at = windows.index(schedule.window) if schedule.window in windows else 0
    if known.is_kept(best):
        weakest = sorted(full, key=known.gain)[:4]
        near += [space.schedule(full - {layer}, schedule.window) for layer in weakest]
        if at > 0:
            near.append(space.schedule(full, windows[at - 1]))
            near += [space.schedule(full | {layer}, windows[at - 1]) for layer in others[:2]]
        if weakest:
            near += [space.schedule((full - {weakest[0]}) | {layer}, schedule.window) for layer in others[:3]]
    else:
        near += [space.schedule(full | {layer}, schedule.window) for layer in others[:4]]
        if at + 1 < len(windows):
            near.append(space.schedule(full, windows[at + 1]))
    return [each for each in dict.fromkeys(near) if not each.is_full]


def sliding(schedule: Schedule, layers: Iterable[int]) -> Schedule:
    """The schedule with these layers windowed at all times."""
    chosen = set(layers)
    modes = tuple(LayerMode.ALWAYS if i in chosen else mode for i, mode in enumerate(schedule.layer_modes))
    return replace(schedule, layer_modes=modes, tail=schedule.tail if LayerMode.PREFILL in modes else 0)


def varied(schedule: Schedule) -> list[Schedule]:
    """The same with other sinks or another tail."""
    sinks = [n for n in (4, 16, 4 * schedule.sinks) if n != schedule.sinks and n < schedule.window]
    tails = [n for n in (schedule.tail // 2, 2 * schedule.tail) if n] if schedule.active_tail else []
    return [replace(schedule, sinks=n) for n in sinks] + [replace(schedule, tail=n) for n in tails]
