"""How long reading takes on this machine: measured while texts are read, kept beside the cache, asked before the next.

A token costs more the more stand before it, unless a window sees less of them, so there is a rate for each range of
depths. Knows numbers and one file.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

from swaa_local.files.output_file import OutputError, write_output
from swaa_local.prefix_cache.store import default_directory

_FORGETTING = 0.5  # what a new measurement counts against those of before
_MOST_KEYS = 200


class ReadingRates:
    """Seconds a token by depth, for one model on one machine, which `key` names. path None: nothing is kept."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._rates: dict[int, float] = {}  # by the number of bits of the depth
        for bits, rate in self._read().get(key, {}).items():
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                if 0 < float(rate) < math.inf:
                    self._rates[int(bits)] = float(rate)

    @property
    def known(self) -> bool:
        """Whether anything was measured yet."""
        return bool(self._rates)

    def took(self, depth: int, n_tokens: int, seconds: float) -> None:
        """Tokens were read behind `depth` others."""
        bits = (depth + n_tokens // 2).bit_length()
        rate = seconds / n_tokens
        known = self._rates.get(bits)
        self._rates[bits] = rate if known is None else known + _FORGETTING * (rate - known)

    def estimate(self, start: int, end: int) -> float | None:
        """Seconds to read the tokens from `start` to `end`; None if nothing is known."""
        if not self._rates:
            return None
        total = 0.0
        while start < end:
            bits = start.bit_length()
            stop = min(end, 1 << bits)
            nearest = min(self._rates, key=lambda known: abs(known - bits))
            total += (stop - start) * self._rates[nearest]
            start = stop
        return total

    def save(self) -> None:
        """Keep what was measured, if that can be done."""
        if self._path is None or not self._rates:
            return
        everything = self._read()
        everything.pop(self._key, None)
        everything[self._key] = {str(bits): rate for bits, rate in self._rates.items()}
        latest = dict(list(everything.items())[-_MOST_KEYS:])
        with contextlib.suppress(OSError, OutputError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_output(self._path, json.dumps(latest).encode(), force=True, private=True)

    def _read(self) -> dict[str, dict[str, float]]:
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(self._path.read_text("utf-8"))
                if isinstance(found, dict):
                    return {key: value for key, value in found.items() if isinstance(value, dict)}
        return {}


def rates_path() -> Path:
    """Where rates are kept: beside the cache."""
    return default_directory().parent / "rates.json"
