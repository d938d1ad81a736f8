#!/usr/bin/env python3
"""Do layers rank alike by short prompts and by long ones? What `swaa-local calibrate` takes for granted, measured.

    scripts/layer_ranks.py MODEL --length 16384 --window 2048 --texts 2 [-t 2] [-ngl 0]

Makes one layer after the other full, with windows in all others: on prompts of the length, and on prompts of a quarter
with a quarter of the window. Prints what the answers' NLL falls by, Spearman's rank correlation of the two, how many of
the best n/8 and n/4 they have in common, the same between two halves of the long prompts (which is what noise allows),
and the time that each took. Every trial is in a log, from which a stopped run goes on.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from swaa_local.calibrate.haystack import Haystack
from swaa_local.calibrate.log import CalibrateLog, Kinds
from swaa_local.calibrate.material import SHORTER, Material
from swaa_local.calibrate.measure import Bench
from swaa_local.calibrate.prompts import GENERATED
from swaa_local.calibrate.results import Scale, Trial
from swaa_local.engine.options import EngineOptions
from swaa_local.model_file.model_info import read_model_info
from swaa_local.report.tables import markdown_table
from swaa_local.schedule.config import Schedule, SWAAConfig
from swaa_local.schedule.cost import pad_cells

SINKS, TAIL = 100, 128


def ranks(values: list[float]) -> list[float]:
    """1 for the greatest; equal ones share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    made = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            made[i] = (start + 1 + end) / 2
        start = end
    return made


def spearman(one: list[float], other: list[float]) -> float:
    """Rank correlation; 0 where all values of one are equal."""
    a, b = ranks(one), ranks(other)
    mean_a, mean_b = fmean(a), fmean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = (sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) ** 0.5
    return covariance / spread if spread else 0.0


def in_common(one: list[float], other: list[float], n: int) -> int:
    """How many of the best `n` of both are the same."""
    best = [set(sorted(range(len(values)), key=lambda i: -values[i])[:n]) for values in (one, other)]
    return len(best[0] & best[1])


def gains(
    trials: dict[tuple[Schedule, Scale, int], Trial], schedules: list[Schedule], scale: Scale, texts: range
) -> list[float]:
    """By layer that can slide; the first schedule has none that is full."""

    def nll(schedule: Schedule) -> float:
        return fmean(each for text in texts for each in trials[schedule, scale, text].nll)

    none = nll(schedules[0])
    return [none - nll(schedule) for schedule in schedules[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=2, help="of each scale; an even number")
    parser.add_argument("--kinds", default=",".join(GENERATED), help="of questions, separated by commas")
    parser.add_argument("--log", type=Path, help="of all trials [MODEL.ranks.jsonl]")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-ngl", "--gpu-layers", type=int, default=-1)
    given = parser.parse_args()
    layers = read_model_info(given.model).layers
    one_full = [[], *([layer] for layer in layers.sliding)]
    schedules = [SWAAConfig(given.window, SINKS, True, full, TAIL).schedule(layers) for full in one_full]
    engine = EngineOptions(n_gpu_layers=given.gpu_layers, n_threads=given.threads)
    config = {"ranks": given.model.name, "length": given.length, "window": given.window, "kinds": given.kinds}
    spent: dict[Scale, float] = {"short": 0.0, "long": 0.0}
    with (
        CalibrateLog(given.log or Path(f"{given.model.stem}.ranks.jsonl"), config, layers) as log,
        closing(Bench(given.model, pad_cells(given.length), engine)) as bench,
    ):
        material = Material(bench, log, Haystack(), None, given.length, given.window, 0)
        scales: tuple[Scale, ...] = ("short", "long")
        for scale in scales:
            material.set_kinds(scale, Kinds(tuple(given.kinds.split(",")), (), {}))
        for scale in scales:
            for text in range(given.texts):
                prompts = material.prompts("search", scale, text)
                for schedule in schedules:
                    if (schedule, scale, text) not in log.trials:
                        window = given.window if scale == "long" else given.window // SHORTER
                        run = replace(schedule, window=window)
                        started = time.perf_counter()
                        found = bench.trial(run, scale, text, prompts)
                        log.add_trial(
                            Trial(**{**found.__dict__, "schedule": schedule, "took_s": time.perf_counter() - started})
                        )
                    spent[scale] += log.trials[schedule, scale, text].took_s
        short, long = (gains(log.trials, schedules, scale, range(given.texts)) for scale in scales)
        halves = None
        if given.texts > 1:
            half = given.texts // 2
            halves = [gains(log.trials, schedules, "long", part) for part in (range(half), range(half, given.texts))]
    rows = [[str(i), f"{a:+.4f}", f"{b:+.4f}"] for i, a, b in zip(layers.sliding, short, long, strict=True)]
    print(markdown_table(["layer", f"{given.length // SHORTER} tokens", f"{given.length} tokens"], rows))
    eighth, quarter = max(1, round(len(short) / 8)), max(1, round(len(short) / 4))

    def compare(one: list[float], other: list[float]) -> str:
        return (
            f"rank correlation {spearman(one, other):.2f}; of the best {eighth}, {in_common(one, other, eighth)} are "
            f"the same, of the best {quarter}, {in_common(one, other, quarter)}"
        )

    print(f"\nshort and long: {compare(short, long)}")
    if halves is not None:
        print(f"long prompts among themselves, half against half: {compare(*halves)}")
    print(f"time: short {spent['short']:.0f} s, long {spent['long']:.0f} s")


if __name__ == "__main__":
    main()
