"""`swaa-local tune`: a short LoRA fine-tune under the masks of a schedule, from a model and data to an adapter.

The flow, and what is asked before work begins; each part knows its own business. Imports PyTorch with the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from swaa_local.errors import SWAAError
from swaa_local.files.input_file import read_input
from swaa_local.files.output_file import check_output, publish, workplace, write_output
from swaa_local.model_file.split import open_gguf
from swaa_local.report.plotting import check_plot
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import in_one_line, in_words
from swaa_local.text.units import format_count
from swaa_local.tune.data import Conversation, read_conversations
from swaa_local.tune.examples import Example, Renderer, pack, split_off, within
from swaa_local.tune.request import TuneError, TuneRequest, require_extra
from swaa_local.tune.results import Nll, TuneResult
from swaa_local.tune.watch import SILENT, Watch

_SETTINGS, _DISTILLED = "settings.json", "distilled.jsonl"
_FREE_SHARE = 0.95


class TuneStopped(KeyboardInterrupt):
    """Ctrl-C; the run goes on from its checkpoint with --resume. steps: that are done."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps


def tune(request: TuneRequest, watch: Watch = SILENT) -> TuneResult:
    """Do it. The adapter's GGUF is at `request.output` and PEFT's folder at `request.peft` when this returns.

    Raises `SWAAError`, and `TuneStopped` on Ctrl-C while training; a checkpoint is left then.
    """
    require_extra()
    conversations = _check_request(request)
    with _libraries():
        return _tune(request, conversations, watch)


@contextmanager
def _libraries() -> Iterator[None]:
    """PyTorch and the others as this command wants them: on one GPU, and without a word on the terminal."""
    # Before they are imported. The Trainer would spread a row over all GPUs that it sees.
    for name, value in {"CUDA_VISIBLE_DEVICES": "0", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        for category in (FutureWarning, UserWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def _tune(request: TuneRequest, conversations: Sequence[Conversation], watch: Watch) -> TuneResult:
    from swaa_local.tune import model as models
    from swaa_local.tune.rows import mean_nll
    from swaa_local.tune.train import train

    source = models.find_source(request.model, request.output, watch)
    schedule = models.choose_schedule(request.schedule, source)
    device = models.choose_device(request.device)
    if source.n_ctx_train and request.length > source.n_ctx_train:
        watch.note(f"{request.length} tokens are more than the {source.n_ctx_train} that the model was trained on")
    base = models.load_base(source, device, request.attention, watch)
    _check_gguf(request, base)
    name = f"{source.label}, {format_count(sum(p.numel() for p in base.model.parameters()))} parameters"
    watch.note(f"{name} on {device}; schedule: {in_one_line(schedule)}")
    settings = _settings(request, schedule, base.base_sha256)
    with _checkpoints(request, settings):
        renderer = Renderer(base.tokenizer, base.ends, think=request.think)
        examples = _examples(request, conversations, renderer, base, watch)
        _note_short(examples, schedule, watch)
        trained, held_out = split_off(examples, request.held_out, request.seed)
        rows = pack(trained, request.length, request.seed)
        model = models.add_adapter(base, request)
        n_trained = models.n_trained(model)
        watch.note(
            f"{len(trained)} examples in {len(rows)} rows of up to {max(sum(map(len, row)) for row in rows)} tokens, "
            f"{len(held_out)} held out; rank {request.rank}, {format_count(n_trained)} parameters to train"
        )
        dense, teacher = base.masks.kind == "sdpa", any(example.teacher for example in trained)
        plan = models.plan_memory(model, _sizes(rows), schedule, device, dense=dense, teacher=teacher)
        _check_memory(plan, watch)
        ways = {"full": Schedule.full(source.n_layer), in_words(schedule): schedule}

        def measure(*, adapter: bool) -> dict[str, float]:
            found = {}
            for words, way in ways.items():
                with watch.step(
                    f"measuring {words} {'with' if adapter else 'without'} the adapter", len(held_out)
                ) as done:
                    found[words] = mean_nll(
                        model,
                        base.masks,
                        held_out,
                        way,
                        device,
                        adapter=adapter,
                        on_example=done,
                    )
            return found

        before = measure(adapter=False)
        watch.training(request.steps, _steps_done(request))
        try:
            training = train(model, base.masks, rows, schedule, request, device, watch.trained)
        finally:
            watch.end()
        if training.stopped:
            raise TuneStopped(training.steps[-1].number)
        after = measure(adapter=True)
        nlls = [Nll("PyTorch", words, before[words], after[words]) for words in ways]
        result = TuneResult(
            schedule=schedule,
            base=_base_name(base),
            nlls=tuple(nlls),
            steps=training.steps,
            n_examples=len(trained),
            n_rows=len(rows),
            n_held_out=len(held_out),
            n_trained=n_trained,
            train_s=training.seconds,
            peak_bytes=_peak_bytes(device),
        )
        result = _write(model, base, result, held_out, request, watch)
    shutil.rmtree(request.checkpoints)
    return result


def _check_request(request: TuneRequest) -> list[Conversation]:
    """What can be said before PyTorch is loaded; the conversations of the data."""
    if request.data is None and request.distill is None:
        raise TuneError("nothing to tune on; pass --data FILE.jsonl, or --distill with a text or a folder of texts")
    if request.output.suffix != ".gguf":
        raise TuneError(f"{request.output}: the adapter is a GGUF; call it {request.output.with_suffix('.gguf')}")
    check_output(request.output, force=request.force)
    if request.peft.exists() and not request.force:
        raise TuneError(f"{request.peft} exists; pass --force to replace it")
    if request.checkpoints.exists() and not request.resume and not request.force:
        raise TuneError(
            f"{request.checkpoints} is of a run that was stopped; go on with --resume, or begin anew with --force"
        )
    if request.resume and not (request.checkpoints / _SETTINGS).is_file():
        raise TuneError(f"there is nothing to go on from: {request.checkpoints} is not there; leave out --resume")
    if request.plot is not None:
        check_plot(request.plot)
    if request.distill is not None and not request.distill.exists():
        raise TuneError(f"{request.distill}: no such file or directory")
    return [] if request.data is None else read_conversations(request.data)


def _check_gguf(request: TuneRequest, base: Any) -> None:
    """The model that will run must be the one that is tuned."""
    if request.gguf is None:
        return
    from swaa_local.model_file.adapter import base_sha256

    with open_gguf(request.gguf) as file:
        if base.base_sha256 is not None and base_sha256(file) != base.base_sha256:
            raise TuneError(
                f"{request.gguf} is not made of {base.source.label}; name a GGUF of that model, or leave out --gguf"
            )


def _check_memory(plan: Any, watch: Watch) -> None:
    watch.note(str(plan))
    if plan.free_bytes is not None and plan.total > _FREE_SHARE * plan.free_bytes:
        raise TuneError(f"it {plan}; pass a smaller --length, or take a machine with more")


# Data


def _examples(
    request: TuneRequest, conversations: Sequence[Conversation], renderer: Renderer, base: Any, watch: Watch
) -> list[Example]:
    examples = []
    if conversations:
        read = [renderer.example(conversation) for conversation in conversations]
        kept, n_long = within(read, request.length, skip_long=request.skip_long)
        if n_long:
            watch.note(f"left out {n_long} examples that are longer than {request.length} tokens")
        examples += kept
    if request.distill is not None:
        examples += _distilled(request, renderer, base, watch)
    return examples


def _distilled(request: TuneRequest, renderer: Renderer, base: Any, watch: Watch) -> list[Example]:
    """Made once: a run that goes on takes what it began with."""
    kept = request.checkpoints / _DISTILLED
    if kept.is_file():
        lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        return [Example(tuple(line["tokens"]), line["n_prompt"], line["where"], teacher=True) for line in lines]
    from swaa_local.tune.distill import Teacher, distill, make_pieces, read_texts, room_for_text

    assert request.distill is not None
    texts = read_texts(request.distill, watch)
    room = room_for_text(renderer, request.length)
    with watch.step("cutting the texts"):
        pieces = make_pieces(texts, request.prompts, room, renderer.count, request.seed, watch)
    with watch.step("asking full attention", len(pieces)) as done:
        examples, failed = distill(pieces, Teacher(base), renderer, request.seed, done)
    if failed:
        watch.note(f"{failed} of {len(pieces)} pieces gave no question or no answer, and are left out")
    examples, _ = within(examples, request.length, skip_long=True)
    rows = [json.dumps({k: v for k, v in asdict(example).items() if k != "teacher"}) + "\n" for example in examples]
    write_output(kept, "".join(rows).encode(), force=True)
    return examples


def _note_short(examples: Sequence[Example], schedule: Schedule, watch: Watch) -> None:
    reach = schedule.window + schedule.sinks + schedule.active_tail
    short = sum(1 for example in examples if example.n_prompt <= reach)
    if short:
        watch.note(
            f"{short} of {len(examples)} prompts fit into window, sinks and tail ({reach} tokens): there the schedule "
            "hides nothing, so they teach it nothing"
        )


def _sizes(rows: Sequence[Sequence[Example]]) -> list[tuple[int, int]]:
    return [(sum(map(len, row)), sum(example.n_answer for example in row)) for row in rows]


# Checkpoints


def _settings(request: TuneRequest, schedule: Schedule, base: str | None) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that began."""
    names = (
        "steps",
        "length",
        "rank",
        "alpha",
        "targets",
        "learning_rate",
        "accumulate",
        "full_share",
        "seed",
        "prompts",
    )
    said = {name: getattr(request, name) for name in (*names, "skip_long", "held_out", "think")}
    for name, path in (("data", request.data), ("distill", request.distill)):
        said[name] = None if path is None else _sha256(path)
    return said | {"schedule": schedule.as_dict(), "base_sha256": base}


def _sha256(path: Path) -> str:
    """Of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode() + b"\0" if path.is_dir() else b"")
        digest.update(read_input(file, str(file)))
    return digest.hexdigest()


@contextmanager
def _checkpoints(request: TuneRequest, settings: dict[str, Any]) -> Iterator[None]:
    """The folder of checkpoints; it goes away again where it holds none."""
    folder = request.checkpoints
    file = folder / _SETTINGS
    if request.resume:
        begun = json.loads(file.read_bytes())
        differing = [name for name in settings if begun.get(name) != settings[name]]
        if differing:
            told = ", ".join(name.replace("_", " ") for name in differing)
            raise TuneError(
                f"{folder} was begun with another {told}; give what it was begun with, or begin anew with --force"
            )
    else:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        write_output(file, (json.dumps(settings, indent=2) + "\n").encode(), force=True)
    try:
        yield
    except BaseException:
        if not list(folder.glob("checkpoint-*")) and not (folder / _DISTILLED).exists():
            shutil.rmtree(folder)
        raise


def _steps_done(request: TuneRequest) -> int:
    done = [int(path.name.rpartition("-")[2]) for path in request.checkpoints.glob("checkpoint-*")]
    return max(done, default=0)


# What comes out


def _write(
    model: Any, base: Any, result: TuneResult, held_out: Sequence[Example], request: TuneRequest, watch: Watch
) -> TuneResult:
    from swaa_local.tune.export import write_facts, write_gguf, write_peft

    with workplace(request.output) as folder:
        peft, gguf = folder / "peft", folder / "adapter.gguf"
        with watch.step("writing the adapter"):
            write_peft(model, peft)
            write_gguf(peft, gguf, base, result, request, folder)
        nlls = _in_engine(gguf, base, result, held_out, request, watch)
        result = replace(result, nlls=(*result.nlls, *nlls))
        write_facts(peft, result, request, base)
        if request.peft.exists():
            request.peft.rename(folder / "replaced")
        peft.rename(request.peft)
        publish(gguf, request.output, force=request.force)
    if request.plot is not None:
        from swaa_local.tune.plot import plot

        plot(result, request.plot)
    return result


def _in_engine(
    adapter: Path, base: Any, result: TuneResult, held_out: Sequence[Example], request: TuneRequest, watch: Watch
) -> list[Nll]:
    """The same in the engine, with the file that will run: the one that was tuned, or another of the same model."""
    from swaa_local.tune.engine_nll import engine_nll

    path = request.gguf or base.source.gguf
    if path is None:
        return []
    found: list[Nll] = []
    for words, schedule in (("full", None), (in_words(result.schedule), result.schedule)):
        values = []
        for lora in (None, adapter):
            label = f"measuring {words} {'with' if lora else 'without'} the adapter in the engine"
            with watch.step(label, len(held_out)) as done:
                try:
                    values.append(engine_nll(path, held_out, schedule, lora=lora, on_example=done, n_gpu_layers=-1))
                except SWAAError as error:
                    # What was trained is not lost for it.
                    watch.note(f"not measured in the engine: {error}")
                    return found
        found.append(Nll(path.name, words, *values))
    return found


def _base_name(base: Any) -> str:
    from swaa_local.model_file.adapter import model_name

    if base.source.gguf is None:
        return Path(base.source.label).name if base.source.folder == Path(base.source.label) else base.source.label
    with open_gguf(base.source.gguf) as file:
        return model_name(file)


def _peak_bytes(device: str) -> int | None:
    import torch

    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else None
