"""What a benchmark measures: sizes and settings, and what one visit of a setting at a size yields.

Pure: knows schedules and counts; nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from swaa_local.schedule.config import CELL_PADDING, MAX_TOKENS, Schedule, SWAAError, default_n_ubatch
from swaa_local.schedule.variants import Variant

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

    @property
    def active_schedule(self) -> Schedule:
        """What the engine runs."""
        return Schedule.full(self.schedule.n_layer) if self.kind == "limit" else self.schedule

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
        return -(-max(needed, 2) // CELL_PADDING) * CELL_PADDING

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


def make_sizes(
    prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int], pairs: Iterable[tuple[int, int]]
) -> list[Size]:
    """Every prompt length with every number of generated tokens at every depth, and the whole requests of -pg.

    Raises `BenchError` if nothing is left to measure.
    """
    sizes = []
    for depth in depths or [0]:
        for n_prompt in prompts or [0]:
            for n_gen in gens or [0]:
                sizes.append(Size(depth, n_prompt, n_gen))
        sizes += [Size(depth, n_prompt, n_gen, whole=True) for n_prompt, n_gen in pairs]
    sizes = [size for size in dict.fromkeys(sizes) if size.n_prompt + size.n_gen]
    if not sizes:
        raise BenchError("nothing to measure: -p 0 and -n 0 leave no tokens; give one of them a number")
    for size in sizes:
        if size.n_tokens > MAX_TOKENS:
            raise BenchError(f"{size} is {size.n_tokens} tokens; a context holds {MAX_TOKENS} at most")
    return sorted(sizes, key=lambda size: (size.n_tokens, size.depth))


@dataclass(frozen=True)
class Choices:
    """What the user said of the engine, for all variants. flash_attn: None where they left it open; n_ubatch: empty
    then, and gpu: whether the engine chooses it for a GPU."""

    n_batch: int
    n_ubatch: tuple[int, ...]
    flash_attn: bool | None
    type_k: str
    type_v: str
    gpu: bool = False

    def n_ubatches(self, schedule: Schedule) -> tuple[int, ...]:
        """With which this schedule is measured: those that were said, or what `Llama` would choose."""
        return self.n_ubatch or (min(self.n_batch, default_n_ubatch(schedule, gpu=self.gpu)),)

    def cache_types(self, variant: Variant | None = None) -> tuple[str, str]:
        named = variant.cache_type if variant is not None else None
        return (named or self.type_k, named or self.type_v)

    def said_flash_attn(self, variant: Variant | None = None) -> bool | None:
        """What the variant or the user says; True for a quantized V cache, which exists only with it."""
        named = variant.flash_attn if variant is not None else None
        wanted = self.flash_attn if named is None else named
        type_v = self.cache_types(variant)[1]
        if not is_quantized(type_v):
            return wanted
        if wanted is False:
            who = f"variant {variant.name!r}: " if variant is not None else ""
            raise BenchError(f"{who}a quantized V cache ({type_v}) needs flash attention; leave it on, or take f16")
        return True


def is_quantized(cache_type: str) -> bool:
    return cache_type not in ("f32", "f16", "bf16")


def make_settings(
    variants: Sequence[Variant],
    choices: Choices,
    *,
    limit: bool,
    best_of_full: Mapping[tuple[str, str], tuple[bool, ...]],
) -> list[Setting]:
    """Every variant with every n_ubatch, then a limit for each window and sinks.

    best_of_full: how full attention runs best with these cache types, where the user left it open; prefill's best
    first, and decode's too if that is another one. A schedule is left to llama.cpp there, as by `Llama`.
    """
    settings = []
    windows: dict[tuple[int, int], Schedule] = {}
    for variant in variants:
        type_k, type_v = choices.cache_types(variant)
        said = choices.said_flash_attn(variant)
        ways: tuple[bool | None, ...] = (said,)
        if said is None and variant.is_full:
            ways = best_of_full[type_k, type_v]
        if not variant.is_full:
            windows.setdefault((variant.schedule.window, variant.schedule.sinks), variant.schedule)
        for n_ubatch in choices.n_ubatches(variant.schedule):
            for flash_attn in ways:
                settings.append(
                    Setting(
                        variant=variant.name,
                        kind="full" if variant.is_full else "scheduled",
                        schedule=variant.schedule,
                        n_batch=choices.n_batch,
                        n_ubatch=n_ubatch,
                        flash_attn=flash_attn,
                        type_k=type_k,
                        type_v=type_v,
                        window=variant.window,
                        sinks=None if variant.is_full else variant.schedule.sinks,
                    )
                )
    if not limit:
        return settings
    type_k, type_v = choices.cache_types()
    said = choices.said_flash_attn()
    for (window, sinks), schedule in windows.items():
        for n_ubatch in choices.n_ubatches(schedule):
            settings.append(
                Setting(
                    variant=f"limit w{window} k{sinks}",
                    kind="limit",
                    schedule=Schedule.full(variants[0].schedule.n_layer),
                    n_batch=choices.n_batch,
                    n_ubatch=n_ubatch,
                    flash_attn=best_of_full[type_k, type_v][0] if said is None else said,
                    type_k=type_k,
                    type_v=type_v,
                    window=window,
                    sinks=sinks,
                )
            )
    return settings
