"""Numbers as people read them."""

from __future__ import annotations

import re


def format_bytes(n: int) -> str:
    """Binary units, as llama.cpp prints memory."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_bytes(text: str) -> int:
    """A number of bytes: `512`, `800M`, `1.5 GiB`; the units are binary. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is not a size")
    exponent = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * 1024**exponent)


def format_count(n: int) -> str:
    """Decimal units: 5.25 M."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)


def format_duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
