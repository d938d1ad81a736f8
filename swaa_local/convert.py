"""Makes a GGUF with a schedule out of a GGUF, a Hugging Face checkpoint or a hub id, quantized if wanted.

The output appears under its name when it is complete and not before; until then everything is in one hidden folder
beside it, which goes away whatever happens.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from swaa_local import checkpoint as hf
from swaa_local import hub
from swaa_local.gguf_copy import copy_gguf
from swaa_local.gguf_file import GGUFFile
from swaa_local.plan import ConvertError, Plan, Request, make_plan
from swaa_local.progress import SILENT, Reporter
from swaa_local.quantize import OutType, engine_refusal, quantize


def convert(request: Request, reporter: Reporter = SILENT) -> Plan:
    """Do it, and return the plan that was carried out. Raises `SWAAError`; then nothing is left behind."""
    plan = make_plan(request)
    for note in plan.notes:
        reporter.note(note)
    if plan.download is not None:
        reporter.note(f"downloading {plan.download.told_size} to {hub.cache_folder(plan.download.listing.hub_id)}")
        local = hub.fetch(plan.download)
        told = plan.notes
        plan = replace(make_plan(replace(request, source=str(local))), source=plan.source)
        for note in plan.notes:
            if note not in told:
                reporter.note(note)
    _carry_out(plan, request, reporter)
    return plan


def _carry_out(plan: Plan, request: Request, reporter: Reporter) -> None:
    assert plan.path is not None
    with _terminable(), _workplace(plan.output) as folder:
        result = folder / "result.gguf"
        if plan.kind == "checkpoint":
            _from_checkpoint(plan, plan.path, folder, result, request, reporter)
        else:
            _from_gguf(plan, plan.path, folder, result, request, reporter)
        _require_engine(result, plan, reporter)
        _publish(result, plan.output, force=request.force)


def _from_checkpoint(
    plan: Plan, source: Path, folder: Path, result: Path, request: Request, reporter: Reporter
) -> None:
    first = result if plan.quantize_to is None else folder / "converted.gguf"
    hf.convert_checkpoint(
        source,
        first,
        plan.converter_type or "auto",
        schedule=plan.schedule,
        pre_tokenizer=request.pre_tokenizer,
        reporter=reporter,
        verbose=request.verbose,
    )
    if plan.quantize_to is not None:
        _quantize(first, result, plan.quantize_to, request, reporter)
        first.unlink()


def _from_gguf(plan: Plan, source: Path, folder: Path, result: Path, request: Request, reporter: Reporter) -> None:
    if plan.quantize_to is not None:
        quantized = folder / "quantized.gguf" if plan.rewrites_schedule else result
        _quantize(source, quantized, plan.quantize_to, request, reporter)
        source = quantized
    if not plan.rewrites_schedule:
        return
    with GGUFFile.open(source) as file:
        with reporter.step(f"writing {plan.output.name}", file.data_size, is_bytes=True) as update:
            copy_gguf(
                file,
                result,
                plan.schedule,
                on_header=lambda: _require_engine(result, plan, reporter),
                on_bytes=update,
            )


def _quantize(source: Path, target: Path, out_type: OutType, request: Request, reporter: Reporter) -> None:
    with reporter.step(f"quantizing to {out_type.name.upper()}") as update:
        quantize(source, target, out_type, allow_requantize=request.allow_requantize, on_progress=update)


def _require_engine(path: Path, plan: Plan, reporter: Reporter) -> None:
    """A file with a schedule must be one that the engine runs; it knows architectures that metadata do not tell."""
    if plan.schedule is None:
        return
    refused, unchecked = engine_refusal(path)
    if refused is not None:
        raise ConvertError(f"the engine would not run {plan.source} with this schedule: {refused}")
    if unchecked is not None:
        reporter.note(f"not checked by the engine: {unchecked}")


def _publish(result: Path, output: Path, *, force: bool) -> None:
    with open(result, "rb") as file:
        os.fsync(file.fileno())
    if not force and output.exists():
        raise ConvertError(f"{output} has come into being meanwhile; pass --force to replace it")
    os.replace(result, output)


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone at the end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".swaa-local-", dir=output.parent))
    except OSError as error:
        raise ConvertError(f"cannot write to {output.parent.resolve()}: {error.strerror}") from None
    try:
        yield folder
    except OSError as error:
        raise ConvertError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack like Ctrl-C, so that nothing is left behind."""

    def stop(signum: int, _frame: Any) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # A program that ignores SIGHUP was started by nohup.
    previous = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
