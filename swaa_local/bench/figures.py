"""The figures of a benchmark: rates, and ratios to full attention and to the limit. Knows samples, not models.

A ratio is taken within each repetition, between what was measured shortly one after the other, and then the median of
the repetitions: what slows the machine down for a while hits both. Full attention is taken in its best setting, the one
with the best median, for prefill and for decode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from swaa_local.bench.results import Bench, Probe, Row, Sample, Setting, Size
from swaa_local.report.spread import Spread

Measure: TypeAlias = Callable[[Sample], float | None]


@dataclass(frozen=True)
class RowFigures:
    """Rates in tokens a second, times in seconds, memory in bytes; None for what was not measured.

    prefill, decode: rates. ttft_s: until the first token was chosen. request_s: until the last one was decoded.
    *_vs_full: how many times as fast as full attention. prefill_vs_limit: of the limit of the same window and sinks.
    """

    setting: Setting
    size: Size
    repetitions: int
    prefill: Spread | None
    ttft_s: Spread | None
    decode: Spread | None
    request_s: Spread | None
    prefill_vs_full: Spread | None
    decode_vs_full: Spread | None
    request_vs_full: Spread | None
    prefill_vs_limit: Spread | None
    kv_bytes: int
    kv_vs_full: float | None
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Growth:
    """How a setting's rate holds: the ratio of that at the largest size to that at the smallest."""

    setting: Setting
    phase: str
    small: Size
    large: Size
    ratio: Spread


def prefill_rate(sample: Sample) -> float | None:
    return sample.n_prompt / sample.prefill_s if sample.prefill_s else None


def decode_rate(sample: Sample) -> float | None:
    return sample.n_gen / sample.decode_s if sample.decode_s else None


def request_s(sample: Sample) -> float | None:
    return sample.ttft_s + sample.decode_s if sample.ttft_s and sample.decode_s else None


def request_rate(sample: Sample) -> float | None:
    """Requests a second."""
    seconds = request_s(sample)
    return 1 / seconds if seconds else None


def figures(bench: Bench) -> list[RowFigures]:
    """Of each row, in order."""
    return [_row_figures(row, [other for other in bench.rows if other.size == row.size]) for row in bench.rows]


def growth(bench: Bench) -> list[Growth]:
    """Of each setting that was measured at more than one size."""
    found = []
    for setting in dict.fromkeys(row.setting for row in bench.rows):
        rows = [row for row in bench.rows if row.setting == setting]
        for phase, measure, tokens in (
            ("prefill", prefill_rate, lambda size: size.n_prompt),
            ("decode", decode_rate, lambda size: size.decode_depth),
        ):
            # Prompts that begin at the same depth; that which makes sizes comparable is their length.
            measured = sorted((r for r in rows if _values(r, measure)), key=lambda row: tokens(row.size))
            if phase == "prefill":
                measured = [row for row in measured if row.size.depth == measured[0].size.depth]
            if measured and tokens(measured[0].size) < tokens(measured[-1].size):
                small, large = measured[0], measured[-1]
                ratio = _ratio(large, small, measure)
                if ratio is not None:
                    found.append(Growth(setting, phase, small.size, large.size, ratio))
    return found


def best_full(rows: Sequence[Row], measure: Measure = prefill_rate) -> Row | None:
    """The row of full attention with the best median."""
    return _best([row for row in rows if row.setting.kind == "full"], measure)


def _row_figures(row: Row, others: Sequence[Row]) -> RowFigures:
    """others: all rows of the same size."""
    setting = row.setting
    limits = [
        other
        for other in others
        if other.setting.kind == "limit"
        and setting.kind == "scheduled"
        and (other.setting.window, other.setting.sinks) == (setting.window, setting.sinks)
    ]

    def vs_full(measure: Measure) -> Spread | None:
        return _ratio(row, best_full(others, measure), measure)

    limit = setting.kind == "limit"
    full = best_full(others) or best_full(others, decode_rate)
    last = row.samples[-1]
    return RowFigures(
        setting=setting,
        size=row.size,
        repetitions=len(row.samples),
        prefill=_spread_of(_values(row, prefill_rate)),
        ttft_s=_spread_of(_values(row, lambda sample: sample.ttft_s)),
        decode=_spread_of(_values(row, decode_rate)),
        request_s=_spread_of(_values(row, request_s)),
        prefill_vs_full=vs_full(prefill_rate),
        decode_vs_full=vs_full(decode_rate),
        request_vs_full=vs_full(request_rate),
        prefill_vs_limit=_ratio(row, _best(limits, prefill_rate), prefill_rate),
        kv_bytes=last.kv_bytes,
        kv_vs_full=None if full is None or limit else last.kv_bytes / full.samples[-1].kv_bytes,
        host_bytes=_most(sample.host_bytes for sample in row.samples),
        device_bytes=_most(sample.device_bytes for sample in row.samples),
    )


def _values(row: Row, measure: Measure) -> list[float]:
    return [value for sample in row.samples if (value := measure(sample)) is not None]


def _best(rows: Sequence[Row], measure: Measure) -> Row | None:
    measured = [row for row in rows if _values(row, measure)]
    return max(measured, key=lambda row: median(_values(row, measure)), default=None)


def _ratio(row: Row, base: Row | None, measure: Measure) -> Spread | None:
    """Within each repetition; one that was stopped in the middle has no partner and does not count."""
    if base is None:
        return None
    pairs = zip(_values(row, measure), _values(base, measure), strict=False)
    return _spread_of([value / of_base for value, of_base in pairs])


def _most(values: Iterator[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _spread_of(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def describe_probe(probe: Probe, taken: Sequence[bool] = ()) -> str:
    """Both figures, and what was taken, in one sentence."""
    figures = "; ".join(
        f"{name} {prefill:.4g} tok/s prefill and {decode:.4g} tok/s decode"
        for name, prefill, decode in (
            ("on", probe.prefill_on, probe.decode_on),
            ("off", probe.prefill_off, probe.decode_off),
        )
    )
    said = " and ".join({True: "on", False: "off"}[way] for way in taken)
    return (
        f"full attention at {probe.n_prompt} tokens (KV {probe.type_k}/{probe.type_v}, n_ubatch {probe.n_ubatch}) with "
        f"flash attention {figures}" + (f"; taken: {said}" if said else "")
    )
