"""What `compare_builds.py` says of its samples: ratios between two builds, the floor of decode, and the tables.

A ratio is taken within each repetition, between what was measured shortly one after the other; then come the median of
the repetitions, and in brackets the least and the greatest. Knows samples; nothing of engines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from engine_build import BuildInfo
from swaa_local.report.spread import Spread
from swaa_local.report.tables import markdown_table
from swaa_local.text.units import format_bytes


@dataclass
class Series:
    """The samples of one test with one setting, in seconds; those of one index are of the same repetition.

    test: `pp512` or `tg16`. n: its tokens. depth: tokens in the cache before. kv_bytes: of these tokens' keys and
    values. copy_bytes_per_s: how fast memory was copied in that repetition.
    """

    test: str
    n: int
    depth: int
    kv_type: str
    flash_attn: bool
    kv_bytes: int = 0
    stock_s: list[float] = field(default_factory=list)
    patched_s: list[float] = field(default_factory=list)
    copy_bytes_per_s: list[float] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return self.test.startswith("tg")

    @property
    def place(self) -> tuple[str, int, str]:
        """What series have in common that can be compared with each other."""
        return self.test, self.depth, self.kv_type


@dataclass(frozen=True)
class Speed:
    """Tokens a second of both builds in one setting, and the patched build's over the stock build's."""

    test: str
    depth: int
    kv_type: str
    flash_attn: bool
    stock: Spread
    patched: Spread
    patched_over_stock: Spread


@dataclass(frozen=True)
class DeepDecode:
    """Decode with flash attention behind `depth` tokens; times are a token's.

    stock_s: upstream's, in its setting with the better median, which is stock_flash_attn. floor_*_s: keys, values and
    weights at the speed of a copy, whose bytes count once (copied) or twice (read, and written: half the time).
    over_*: the patched build's time over these.
    """

    test: str
    depth: int
    kv_type: str
    kv_bytes: int
    stock_flash_attn: bool
    stock_s: Spread
    patched_s: Spread
    over_stock: Spread
    floor_once_s: Spread
    floor_twice_s: Spread
    over_floor_once: Spread
    over_floor_twice: Spread


@dataclass
class Comparison:
    """weight_bytes: what one token reads of the model. copy_bytes: size of the buffer that is copied."""

    model: str
    stock: BuildInfo
    patched: BuildInfo
    n_threads: int
    n_ubatch: int
    cpu_time: bool
    weight_bytes: int
    copy_bytes: int
    series: list[Series] = field(default_factory=list)

    def speeds(self) -> list[Speed]:
        return [
            Speed(
                test=s.test,
                depth=s.depth,
                kv_type=s.kv_type,
                flash_attn=s.flash_attn,
                stock=Spread.of([s.n / seconds for seconds in s.stock_s]),
                patched=Spread.of([s.n / seconds for seconds in s.patched_s]),
                patched_over_stock=Spread.of_ratios(s.stock_s, s.patched_s),
            )
            for s in self.series
        ]

    def deep_decodes(self) -> list[DeepDecode]:
        """One for each cache that was not empty, where decode was measured with flash attention."""
        return [self._deep_decode(s) for s in self.series if s.decodes and s.flash_attn and s.depth]

    def _deep_decode(self, ours: Series) -> DeepDecode:
        best = min((s for s in self.series if s.place == ours.place), key=lambda s: median(s.stock_s))
        token_s = [seconds / ours.n for seconds in ours.patched_s]
        once = [(ours.kv_bytes + self.weight_bytes) / rate for rate in ours.copy_bytes_per_s]
        twice = [seconds / 2 for seconds in once]
        return DeepDecode(
            test=ours.test,
            depth=ours.depth,
            kv_type=ours.kv_type,
            kv_bytes=ours.kv_bytes,
            stock_flash_attn=best.flash_attn,
            stock_s=Spread.of([seconds / best.n for seconds in best.stock_s]),
            patched_s=Spread.of(token_s),
            over_stock=Spread.of_ratios(ours.patched_s, best.stock_s),
            floor_once_s=Spread.of(once),
            floor_twice_s=Spread.of(twice),
            over_floor_once=Spread.of_ratios(token_s, once),
            over_floor_twice=Spread.of_ratios(token_s, twice),
        )


def as_json(found: Comparison) -> str:
    """Every sample, and the figures made of them."""
    figures: dict[str, Any] = {
        **asdict(found),
        "speeds": [asdict(speed) for speed in found.speeds()],
        "deep_decodes": [asdict(deep) for deep in found.deep_decodes()],
    }
    return json.dumps(figures, indent=2)


def markdown(found: Comparison) -> str:
    """A row a test and setting; decode behind a filled cache against upstream's better setting and the floor; notes."""
    parts = [_speed_table(found.speeds())]
    if deep := found.deep_decodes():
        parts.append(_deep_table(deep))
    parts.append("\n".join(_notes(found)))
    return "\n\n".join(parts)


def _speed_table(speeds: Sequence[Speed]) -> str:
    head = ["test", "KV type", "fa", "stock tok/s", "patched tok/s", "speed, patched / stock"]
    rows = [
        [
            f"{s.test} @ d{s.depth}",
            s.kv_type,
            _ON[s.flash_attn],
            _short(s.stock.median),
            _short(s.patched.median),
            _spread(s.patched_over_stock, 3),
        ]
        for s in speeds
    ]
    return markdown_table(head, rows)


def _deep_table(deep: Sequence[DeepDecode]) -> str:
    head = ["token time", "KV type", "KV cache", "stock, better fa", "patched, fa on", "patched / stock"]
    head += ["floor, copied once", "patched / floor", "floor, read + written", "patched / floor"]
    rows = [
        [
            f"{d.test} @ d{d.depth}",
            d.kv_type,
            format_bytes(d.kv_bytes),
            f"{_ms(d.stock_s)} (fa {_ON[d.stock_flash_attn]})",
            _ms(d.patched_s),
            _spread(d.over_stock, 2),
            _ms(d.floor_once_s),
            _spread(d.over_floor_once, 2),
            _ms(d.floor_twice_s),
            _spread(d.over_floor_twice, 2),
        ]
        for d in deep
    ]
    return markdown_table(head, rows)


def _notes(found: Comparison) -> list[str]:
    n = len(found.series[0].stock_s)
    rates = Spread.of([rate for s in found.series for rate in s.copy_bytes_per_s])
    low, high = rates.bounds
    clock = "CPU time of the processes" if found.cpu_time else "wall clock"
    lines = [
        f"{Path(found.model).name}, {format_bytes(found.patched.size_bytes)}, of which a "
        f"token reads {format_bytes(found.weight_bytes)}; {found.patched.cpu}; {found.n_threads} thread"
        f"{'s' * (found.n_threads > 1)}; n_ubatch {found.n_ubatch}.",
        f"Medians of {n} interleaved repetitions, {clock}; in brackets the least and the greatest ratio within a "
        "repetition."
        if n > 1
        else f"One repetition of each, {clock}, so nothing tells how much the figures vary; -r 5 does.",
        f"A copy of {format_bytes(found.copy_bytes)} moves {rates.median / 1e9:.2f} GB/s "
        f"({low / 1e9:.2f}-{high / 1e9:.2f}) if its bytes count once, and twice that if both what is read "
        "and what is written count. The floor is the bytes of keys, values and weights over that.",
    ]
    if not found.patched.patched:
        lines.append(f"NOTE: the build measured as patched knows no schedule: {found.patched.libraries}.")
    if found.stock.patched:
        lines.append(
            f"NOTE: the build measured as stock has the patches, so it is not upstream's: {found.stock.libraries}."
        )
    if found.stock.system_info != found.patched.system_info:
        lines.append("NOTE: the builds have not the same CPU features, so this compares more than the patches:")
        lines += [
            f"  {name}: {info.system_info}" for name, info in (("stock", found.stock), ("patched", found.patched))
        ]
    return lines


_ON = {True: "on", False: "off"}


def _ms(spread: Spread) -> str:
    return f"{_short(spread.median * 1e3)} ms"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(spread: Spread, digits: int) -> str:
    middle = f"{spread.median:.{digits}f}"
    low, high = spread.bounds
    return middle if low == high else f"{middle} ({low:.{digits}f}-{high:.{digits}f})"
