"""What a benchmark measures and what comes of it. Pure: knows schedules and counts; nothing of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swaa_local.errors import SWAAError
from swaa_local.model_file.model_info import describe_model
from swaa_local.report.machine import Machine
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.cost import pad_cells
from swaa_local.schedule.variants import AssumedDrafts

Kind = Literal["full", "scheduled", "limit"]


class BenchError(SWAAError, ValueError):
    """A benchmark that cannot be made as asked."""


@dataclass(frozen=True)
class Size:
    """Tokens that are in the cache before (untimed), prompt tokens (prefill) and tokens generated after them (decode).

    whole: the user asked for prefill and decode as one request.
    """

    depth: int
    n_prompt: int
    n_gen: int
    whole: bool = False

    @property
    def n_tokens(self) -> int:
        """Of context."""
        return self.depth + self.n_prompt + self.n_gen

    @property
    def decode_depth(self) -> int:
        """Tokens in the cache when decoding begins."""
        return self.depth + self.n_prompt

    def __str__(self) -> str:
        """As llama-bench names its tests."""
        parts = [f"{name}{n}" for name, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


def limit_prompt(window: int, sinks: int) -> int:
    """Tokens of the prompts whose queries see W+k keys on average under full attention."""
    return 2 * (window + sinks)


@dataclass(frozen=True)
class Setting:
    """A variant as it is run. flash_attn: None leaves it to llama.cpp. kind `limit`: full attention on
    prompts of 2(W+k) tokens, with the window and the sinks of a scheduled variant."""

    variant: str
    kind: Kind
    schedule: Schedule
    n_batch: int
    n_ubatch: int
    flash_attn: bool | None
    type_k: str
    type_v: str
    window: int | None = None
    sinks: int | None = None
    drafts: AssumedDrafts | None = None

    @property
    def active_schedule(self) -> Schedule:
        """What the engine runs."""
        return Schedule.full(self.schedule.model) if self.kind == "limit" else self.schedule

    def limit_prompts(self, n_prompt: int) -> tuple[int, int]:
        """How many prompts of how many tokens the limit reads for a prompt of n_prompt: whole ones, at least as many
        tokens, each 2(W+k) long so that its queries see W+k keys on average."""
        assert self.window is not None
        assert self.sinks is not None
        length = limit_prompt(self.window, self.sinks)
        return -(-n_prompt // length), length

    def n_ctx(self, size: Size) -> int:
        """Tokens of context, as llama.cpp pads them."""
        needed = self.limit_prompts(size.n_prompt)[1] if self.kind == "limit" else size.n_tokens
        # The warm-up decodes one token after a whole ubatch or what fits of it.
        return pad_cells(max(needed, 2))

    def applies(self, size: Size) -> bool:
        """The limit is one of prefill, and of prompts that are longer than those it reads: the queries of shorter ones
        see less than W+k keys on average with the schedule, too."""
        if self.kind != "limit" or self.window is None or self.sinks is None:
            return True
        return size.n_prompt >= limit_prompt(self.window, self.sinks)

    def work(self, size: Size, n_params: int, n_embd: int, *, filled: bool = False) -> int:
        """About the multiplications that a visit takes, for telling how long it will; decode is bound by memory and
        weighs more. filled: the tokens of `depth` are in the cache already."""
        schedule, n_read = self.active_schedule, size.depth + size.n_prompt
        if self.kind == "limit":
            n, length = self.limit_prompts(size.n_prompt)
            n_read, pairs = n * length, n * sum(schedule.prefill_pairs(length))
        else:
            pairs = sum(schedule.prefill_pairs(n_read)) if n_read else 0
        n_gen = 0 if self.kind == "limit" else size.n_gen
        decoded = n_gen * (n_params + 2 * n_embd * sum(schedule.decode_keys(n_read)))
        return 8 * decoded if filled else n_params * n_read + 2 * n_embd * pairs + 8 * decoded


@dataclass(frozen=True)
class Sample:
    """One visit. Seconds and bytes; None for what was not measured.

    n_prompt: tokens that were read in prefill_s. ttft_s: until the first token was chosen. host_bytes: peak of the
    process's resident memory, weights included. device_bytes: what model and context took of the devices' memory.
    """

    n_prompt: int
    prefill_s: float | None
    ttft_s: float | None
    n_gen: int
    decode_s: float | None
    kv_bytes: int
    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Row:
    """A setting at a size, and its samples by repetition."""

    setting: Setting
    size: Size
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Probe:
    """Full attention with and without flash attention on the same short prompt; tokens a second, the better of the
    rounds. n_prompt: its tokens, which are also the depth of the decode."""

    n_prompt: int
    n_ubatch: int
    type_k: str
    type_v: str
    prefill_on: float
    prefill_off: float
    decode_on: float
    decode_off: float

    def best(self, *, prefill: bool) -> bool:
        """Whether flash attention is the faster one."""
        return self.prefill_on >= self.prefill_off if prefill else self.decode_on >= self.decode_off


@dataclass(frozen=True)
class ModelFacts:
    """size_bytes: of the weights."""

    path: str
    architecture: str
    size_bytes: int
    n_params: int
    n_layer: int
    file_type: str
    lora: str | None = None
    """The adapter that it ran with, and its scale."""

    @property
    def description(self) -> str:
        return describe_model(self.architecture, self.n_params, self.file_type)


@dataclass(frozen=True)
class Bench:
    """What came out. complete: False if it was stopped; then rows may have fewer samples, or be missing."""

    model: ModelFacts
    machine: Machine
    n_threads: int
    n_threads_batch: int
    n_gpu_layers: int
    repetitions: int
    probes: tuple[Probe, ...]
    rows: tuple[Row, ...]
    complete: bool = True
