"""`swaa-local bench`: how fast a model reads and writes under several schedules, against full attention, in one run.

The weights are loaded once. Within every repetition all settings take their turn, each with a context of its own that
is warmed up, measured and freed, so that a noisy machine hits all of them alike. Tables and plots are made of what it
returns (`figures`, `table`, `plot`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from swaa_local import __version__
from swaa_local.bench.engine import BenchContext, BenchModel
from swaa_local.bench.figures import describe_probe
from swaa_local.bench.plan import Choices, make_settings, make_sizes
from swaa_local.bench.results import Bench, BenchError, ModelFacts, Probe, Row, Sample, Setting, Size, limit_prompt
from swaa_local.bench.watch import SILENT, Measurement, Watch
from swaa_local.engine.context_length import beyond_training, gpu_layers
from swaa_local.engine.machine import describe_machine
from swaa_local.engine.options import EngineOptions
from swaa_local.errors import SWAAError
from swaa_local.model_file.adapter import adapter_remarks, read_adapter
from swaa_local.model_file.model_info import ModelInfo, read_model_info
from swaa_local.model_file.schedule_keys import read_schedule
from swaa_local.schedule.config import DEFAULT_N_BATCH, Schedule
from swaa_local.schedule.text import in_words
from swaa_local.schedule.variants import Variant, parse_variants, whole_in_window, without_schedule

PROBE_TOKENS = 4096
"""Tokens of the prompt with which full attention's better setting is found, at most."""
_MIN_PROBE_TOKENS, _PROBE_GEN = 128, 8
_CLEAR_GAIN = 1.05  # of decode, for measuring both ways
_SHARE_TO_KEEP = 0.7  # of the free memory


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    variants: see `variants`; None compares full attention with `schedule` or, without one, with the file's. prompts,
    gens, depths, pairs: see `bench_plan.make_sizes`. n_ubatch: every variant is measured with each; if there are none,
    with what `Llama` would choose. limit: measure the speed that no schedule can beat, too.
    """

    model: Path
    variants: str | None = None
    schedule: Schedule | None = None
    prompts: Sequence[int] = (4096,)
    gens: Sequence[int] = (32,)
    depths: Sequence[int] = ()
    pairs: Sequence[tuple[int, int]] = ()
    repetitions: int = 3
    n_ubatch: Sequence[int] = ()
    limit: bool = True
    engine: EngineOptions = field(default_factory=EngineOptions)


class BenchInterrupted(KeyboardInterrupt):
    """Ctrl-C; what was measured so far is in `bench`."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench


class BenchFailed(SWAAError):
    """The engine failed in the middle; what was measured so far is in `bench`."""

    def __init__(self, message: str, bench: Bench) -> None:
        super().__init__(message)
        self.bench = bench


def bench(request: BenchRequest, watch: Watch = SILENT) -> Bench:
    """Measure. Raises `SWAAError` for what cannot be measured as asked, `BenchFailed` for what turns out so after some
    figures were measured, and `BenchInterrupted` on Ctrl-C."""
    info, of_file = read_model_info(request.model), read_schedule(request.model)
    variants = _variants(request, info, of_file, watch)
    if any(not variant.is_full for variant in variants) and info.unsupported:
        raise BenchError(info.unsupported)
    sizes = make_sizes(request.prompts, request.gens, request.depths, request.pairs)
    choices = _choices(request)
    longest = max(size.n_tokens for size in sizes)
    if note := whole_in_window(variants, longest):
        watch.note(note)
    if said := beyond_training(longest, info.n_ctx_train):
        watch.note(said)
    if any(variant.drafts for variant in variants):
        watch.note("spec: how many drafted tokens are accepted is assumed, and choosing tokens is not timed")
    for variant in variants:
        choices.requested_flash_attn(variant)  # raises for what excludes itself, before the weights are loaded
    if request.engine.lora is not None:
        adapter = read_adapter(request.engine.lora.path)
        for remark in adapter_remarks(adapter, request.model, [variant.schedule for variant in variants]):
            watch.note(remark)
    with watch.loading(request.model.name):
        model = BenchModel(request.model, request.engine)
    with model:
        for variant in variants:
            if variant.drafts:
                model.check_drafts(variant.name)
        run = _Run(request, model, variants, sizes, choices, watch)
        facts = ModelFacts(
            path=str(request.model),
            architecture=info.architecture,
            size_bytes=model.size_bytes,
            n_params=model.n_params,
            n_layer=model.n_layer,
            file_type=info.file_type,
            lora=None if request.engine.lora is None else str(request.engine.lora),
        )

        def result(complete: bool) -> Bench:
            return Bench(
                model=facts,
                machine=describe_machine(__version__),
                n_threads=model.n_threads,
                n_threads_batch=model.n_threads_batch,
                n_gpu_layers=model.n_gpu_layers,
                repetitions=request.repetitions,
                probes=tuple(run.probes),
                rows=run.rows(),
                complete=complete,
            )

        try:
            run.measure()
        except KeyboardInterrupt:
            raise BenchInterrupted(result(False)) from None
        except SWAAError as error:
            if not run.rows():
                raise
            raise BenchFailed(str(error), result(False)) from error
        return result(True)


def _variants(request: BenchRequest, info: ModelInfo, of_file: Schedule | None, watch: Watch) -> list[Variant]:
    if request.variants is not None:
        return parse_variants(request.variants, info.layers, of_file, words="engine")
    full = Variant("full", Schedule.full(info.layers))
    if request.schedule is not None:
        # --no-swaa leaves nothing to compare with.
        return [full] if request.schedule.is_full else [full, Variant(in_words(request.schedule), request.schedule)]
    if of_file is not None and not of_file.is_full:
        return [full, Variant("file", of_file)]
    names, why = without_schedule(info.unsupported)
    watch.note(f"{request.model.name} has no schedule; {why}")
    return parse_variants(names, info.layers, of_file)


def _choices(request: BenchRequest) -> Choices:
    engine = request.engine
    n_ubatch = tuple(dict.fromkeys(request.n_ubatch))
    n_batch = engine.n_batch or max((DEFAULT_N_BATCH, *n_ubatch))
    if max(n_ubatch, default=0) > n_batch:
        raise BenchError(f"-ub {max(n_ubatch)} is more than -b {n_batch}; a part of a batch is not larger than it")
    gpu = gpu_layers(engine.n_gpu_layers, verbose=engine.verbose) > 0
    return Choices(n_batch, n_ubatch, engine.flash_attn, engine.type_k or "f16", engine.type_v or "f16", gpu)


class _Run:
    """One run: the plan, and the samples so far."""

    def __init__(
        self,
        request: BenchRequest,
        model: BenchModel,
        variants: Sequence[Variant],
        sizes: Sequence[Size],
        choices: Choices,
        watch: Watch,
    ) -> None:
        self._request = request
        self._model = model
        self._variants = variants
        self._sizes = sizes
        self._choices = choices
        self._watch = watch
        self._samples: dict[tuple[Setting, Size], list[Sample]] = {}
        self.probes: list[Probe] = []

    def rows(self) -> tuple[Row, ...]:
        """In the order of the plan, size by size; without what has no sample."""
        return tuple(Row(setting, size, tuple(s)) for (setting, size), s in self._samples.items() if s)

    def measure(self) -> None:
        """Do all of it. Raises what the engine raises; samples that are complete stay."""
        limit = self._request.limit and self._has_limit()
        left_open = self._left_open(limit)
        # Memory does not depend on what is left open, and an error should come before the first work.
        for setting, size in self._plan(limit, dict.fromkeys(left_open, (True,))):
            self._model.check_memory(setting, size)
        plan = self._plan(limit, {types: self._best_of_full(*types) for types in left_open})
        self._samples = {key: [] for key in plan}
        # Sizes take turns too. But where only decoding is timed, each context is filled once, if there is room for all.
        groups = [[size for size in self._sizes if size.n_prompt], *([s] for s in self._sizes if not s.n_prompt)]
        turns = [(list(self._turns(plan, group)), self._may_keep(plan, group)) for group in groups]
        self._watch.begin(
            [visit for visits, _ in turns for visit in visits],
            [self._work(visit, keep) for visits, keep in turns for visit in visits],
        )
        for visits, keep in turns:
            with ExitStack() as kept:
                contexts: dict[Setting, BenchContext] = {}
                for visit in visits:
                    self._watch.visiting(visit)
                    n_ctx = visit.setting.n_ctx(visit.size)
                    with ExitStack() as brief:
                        context = contexts.get(visit.setting)
                        if context is None:
                            stack = kept if keep else brief
                            context = stack.enter_context(self._model.context(visit.setting, n_ctx))
                            if keep:
                                contexts[visit.setting] = context
                        sample = self._visit(context, visit)
                        if keep:
                            context.rewind(visit.size.depth)
                    self._samples[visit.setting, visit.size].append(sample)
                    self._watch.visited(visit, sample)
        self._watch.end()

    def _has_limit(self) -> bool:
        """Whether any prompt is long enough for the limit of any window; says where it is left out."""
        needed = {limit_prompt(v.schedule.window, v.schedule.sinks) for v in self._variants if not v.is_full}
        prompts = [size.n_prompt for size in self._sizes if size.n_prompt]
        if needed and prompts and min(prompts) < max(needed):
            told = ", ".join(map(str, sorted(needed)))
            self._watch.note(f"no limit for prompts below 2(W+k) tokens ({told}): there it says nothing")
        return any(n_prompt >= length for n_prompt in prompts for length in needed)

    def _plan(
        self, limit: bool, best_of_full: Mapping[tuple[str, str], tuple[bool, ...]]
    ) -> list[tuple[Setting, Size]]:
        settings = make_settings(self._variants, self._choices, limit=limit, best_of_full=best_of_full)
        return [(setting, size) for size in self._sizes for setting in settings if setting.applies(size)]

    def _turns(self, plan: Sequence[tuple[Setting, Size]], sizes: Sequence[Size]) -> Iterator[Measurement]:
        """Every repetition begins with another setting."""
        for repetition in range(self._request.repetitions):
            for size in sizes:
                turn = [setting for setting, its_size in plan if its_size == size]
                first = repetition % len(turn)
                for setting in turn[first:] + turn[:first]:
                    yield Measurement(setting, size, repetition)

    def _may_keep(self, plan: Sequence[tuple[Setting, Size]], sizes: Sequence[Size]) -> bool:
        """True if only decoding is timed and the contexts of all settings fit the memory together, with a margin."""
        if any(size.n_prompt for size in sizes):
            return False
        needed = [self._model.needed_bytes(setting, size) for setting, size in plan if size in sizes]
        host, device = (sum(each[i] for each in needed) for i in (0, 1))
        return all(
            free is None or bytes_ <= free * _SHARE_TO_KEEP
            for bytes_, free in ((host, self._model.free_host_bytes()), (device, self._model.free_device_bytes()))
        )

    def _work(self, visit: Measurement, keep: bool) -> int:
        filled = keep and visit.repetition > 0
        return visit.setting.work(visit.size, self._model.n_params, self._model.n_embd, filled=filled)

    def _visit(self, context: BenchContext, visit: Measurement) -> Sample:
        setting, size = visit.setting, visit.size
        if setting.kind == "limit":
            return self._visit_limit(context, visit)
        if context.n_past != size.depth:
            context.clear()
            context.prefill(size.depth, prompt_end=size.decode_depth, on_tokens=self._on_tokens(0, size.decode_depth))
        prefill_s = ttft_s = decode_s = None
        if size.n_prompt:
            started = time.perf_counter()
            prefill_s = context.prefill(size.n_prompt, on_tokens=self._on_tokens(size.depth, size.decode_depth))
            context.first_token()
            ttft_s = time.perf_counter() - started
        if size.n_gen:
            decode_s = context.decode(size.n_gen)
        host, device = context.peaks
        return Sample(size.n_prompt, prefill_s, ttft_s, size.n_gen, decode_s, context.kv_bytes, host, device)

    def _visit_limit(self, context: BenchContext, visit: Measurement) -> Sample:
        n, length = visit.setting.limit_prompts(visit.size.n_prompt)
        seconds = 0.0
        for i in range(n):
            context.clear()
            seconds += context.prefill(length, on_tokens=self._on_tokens(i * length, n * length))
        host, device = context.peaks
        return Sample(n * length, seconds, None, 0, None, context.kv_bytes, host, device)

    def _on_tokens(self, before: int, total: int) -> Callable[[int], None]:
        return lambda done: self._watch.on_tokens(before + done, total)

    def _left_open(self, limit: bool) -> list[tuple[str, str]]:
        """Cache types with which it must be found out how full attention runs best."""
        full: list[Variant | None] = [variant for variant in self._variants if variant.is_full]
        if limit:
            full.append(None)  # the limit is full attention as the user wants it for all
        left = [variant for variant in full if self._choices.requested_flash_attn(variant) is None]
        return list(dict.fromkeys(self._choices.cache_types(variant) for variant in left))

    def _best_of_full(self, type_k: str, type_v: str) -> tuple[bool, ...]:
        """With flash attention or without: prefill's better way first, and decode's too if it is clearly another."""
        probe = self._probe(type_k, type_v)
        self.probes.append(probe)
        reads, writes = any(size.n_prompt for size in self._sizes), any(size.n_gen for size in self._sizes)
        best: tuple[bool, ...] = (probe.best(prefill=reads),)
        if reads and writes and probe.best(prefill=False) != best[0]:
            gain = probe.decode_on / probe.decode_off
            if max(gain, 1 / gain) > _CLEAR_GAIN:
                best += (not best[0],)
        self._watch.note(describe_probe(probe, best))
        return best

    def _probe(self, type_k: str, type_v: str) -> Probe:
        n_prompt = max(_MIN_PROBE_TOKENS, min(PROBE_TOKENS, max(size.decode_depth for size in self._sizes)))
        full = Schedule.full(self._model.layers)
        size, n_ubatch = Size(0, n_prompt, _PROBE_GEN), self._choices.n_ubatches(full)[0]
        best = {True: (0.0, 0.0), False: (0.0, 0.0)}
        order = [True, False, False, True]
        with self._watch.probing(n_prompt, len(order)) as update:
            for i, on in enumerate(order):
                setting = Setting("full", "full", full, self._choices.n_batch, n_ubatch, on, type_k, type_v)
                with self._model.context(setting, setting.n_ctx(size)) as context:
                    prefill = n_prompt / context.prefill(n_prompt)
                    decode = _PROBE_GEN / context.decode(_PROBE_GEN)
                best[on] = (max(best[on][0], prefill), max(best[on][1], decode))
                update(i + 1)
        (prefill_on, decode_on), (prefill_off, decode_off) = best[True], best[False]
        return Probe(n_prompt, n_ubatch, type_k, type_v, prefill_on, prefill_off, decode_on, decode_off)
