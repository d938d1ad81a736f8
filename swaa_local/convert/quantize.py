"""Weight types by llama.cpp's names, and its quantizer, run in a child process.

Knows types, sizes and the quantizer; nothing of schedules or of where a model comes from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swaa_local.errors import SWAAError
from swaa_local.files.child_process import ChildError, run_child
from swaa_local.files.signals import FAULTS, name_of
from swaa_local.model_file.header import GGUFFile


@dataclass(frozen=True)
class OutType:
    """A file type of llama-quantize. `bpw`: bits per weight, about, for estimates."""

    name: str
    ftype: int
    """llama_ftype of llama.h."""
    bpw: float
    needs_imatrix: bool = False


# Names and numbers are llama-quantize's (tools/quantize/quantize.cpp) and llama.h's; bits from its own table.
OUT_TYPES: dict[str, OutType] = {
    out_type.name: out_type
    for out_type in (
        OutType("f32", 0, 32.0),
        OutType("f16", 1, 16.0),
        OutType("bf16", 32, 16.0),
        OutType("q8_0", 7, 8.5),
        OutType("q6_k", 18, 6.6),
        OutType("q5_k_m", 17, 5.7),
        OutType("q5_k_s", 16, 5.6),
        OutType("q5_1", 9, 6.0),
        OutType("q5_0", 8, 5.6),
        OutType("q4_k_m", 15, 4.9),
        OutType("q4_k_s", 14, 4.7),
        OutType("q4_1", 3, 5.1),
        OutType("q4_0", 2, 4.7),
        OutType("iq4_nl", 25, 4.6),
        OutType("iq4_xs", 30, 4.4),
        OutType("mxfp4_moe", 38, 4.5),
        OutType("q3_k_l", 13, 4.3),
        OutType("q3_k_m", 12, 4.0),
        OutType("q3_k_s", 11, 3.6),
        OutType("iq3_m", 27, 3.8),
        OutType("iq3_s", 26, 3.6),
        OutType("iq3_xs", 22, 3.5),
        OutType("iq3_xxs", 23, 3.2, needs_imatrix=True),
        OutType("q2_k", 10, 3.2),
        OutType("q2_k_s", 21, 3.0, needs_imatrix=True),
        OutType("iq2_m", 29, 2.9, needs_imatrix=True),
        OutType("iq2_s", 28, 2.7, needs_imatrix=True),
        OutType("iq2_xs", 20, 2.5, needs_imatrix=True),
        OutType("iq2_xxs", 19, 2.3, needs_imatrix=True),
        OutType("iq1_m", 31, 2.0, needs_imatrix=True),
        OutType("iq1_s", 24, 1.9, needs_imatrix=True),
        OutType("tq2_0", 37, 2.2),
        OutType("tq1_0", 36, 1.8),
        OutType("q2_0", 41, 2.5),
        OutType("q1_0", 40, 1.4),
    )
}
_ENGINE_JOB = "swaa_local.convert.children.engine_job"
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_FLOATS = {0: "f32", 1: "f16", 30: "bf16"}  # ggml_type


def parse_out_type(name: str) -> OutType:
    """The type of this name, in any case; `SWAAError` lists the names otherwise."""
    key = name.lower()
    try:
        return OUT_TYPES[_ALIASES.get(key, key)]
    except KeyError:
        raise SWAAError(f"unknown --outtype {name!r}; known are {', '.join([*OUT_TYPES, *_ALIASES])}") from None


def quantized_types(file: GGUFFile) -> list[str]:
    """Names of the quantized types among a file's tensors; empty for a float model."""
    from gguf import GGMLQuantizationType

    numbers = {tensor.type for tensor in file.tensors} - set(_FLOATS)
    known = {member.value: member.name.lower() for member in GGMLQuantizationType}
    return sorted(known.get(number, f"type {number}") for number in numbers)


def quantize(
    source: Path,
    target: Path,
    out_type: OutType,
    *,
    allow_requantize: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `source` (a GGUF) as `out_type` to `target`; other metadata are kept.

    on_progress: tensors done, and all. Raises `ChildError` with the quantizer's reason. A partial target is the
    caller's to remove.
    """

    def report(event: dict[str, object]) -> None:
        if on_progress is not None and "total" in event:
            on_progress(int(str(event["done"])), int(str(event["total"])))

    request = {
        "job": "quantize",
        "source": os.fspath(source),
        "target": os.fspath(target),
        "ftype": out_type.ftype,
        "requantize": allow_requantize,
    }
    run_child(_ENGINE_JOB, request, what="quantizing", on_event=report)


def engine_refusal(path: Path) -> tuple[str | None, str | None]:
    """(why the engine will not run this GGUF, why nobody can tell); both None if it will.

    Reads the header alone: the data section may be empty, if the file is as long as it should be.
    """
    try:
        events = run_child(_ENGINE_JOB, {"job": "check", "path": os.fspath(path)}, what="the check")
    except ChildError as error:
        if error.signal and name_of(error.signal) not in FAULTS:
            return None, str(error)
        # llama.cpp cannot run the file: an assertion says why, or it crashed.
        return error.last_words or str(error), None
    answer = events[0] if events else {}
    return answer.get("refused"), answer.get("unchecked")
