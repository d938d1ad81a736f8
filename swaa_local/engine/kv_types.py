"""KV cache types by ggml's numbers. Their sizes are in `schedule.cost`."""

from __future__ import annotations

from swaa_local.errors import SWAAError
from swaa_local.schedule.cost import KV_TYPES

KV_TYPE_NAMES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}


def kv_type_id(name: str) -> int:
    """ggml's number of a KV cache type by llama.cpp's name (f16, q8_0, ...); `SWAAError` lists the names otherwise."""
    for number, known in KV_TYPE_NAMES.items():
        if known == name.lower():
            return number
    raise SWAAError(f"unknown KV cache type {name!r}; known are {', '.join(KV_TYPES)}")
