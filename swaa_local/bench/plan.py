"""What a benchmark measures: sizes and settings, and what one visit of a setting at a size yields.

Pure: knows schedules and counts; nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from swaa_local.bench.results import BenchError, Setting, Size
from swaa_local.schedule.config import MAX_TOKENS, Schedule, default_n_ubatch
from swaa_local.schedule.variants import Variant


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

    def requested_flash_attn(self, variant: Variant | None = None) -> bool | None:
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
        said = choices.requested_flash_attn(variant)
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
                        kind="full" if variant.is_full and not variant.drafts else "scheduled",
                        schedule=variant.schedule,
                        n_batch=choices.n_batch,
                        n_ubatch=n_ubatch,
                        flash_attn=flash_attn,
                        type_k=type_k,
                        type_v=type_v,
                        window=variant.window,
                        sinks=None if variant.is_full else variant.schedule.sinks,
                        drafts=variant.drafts,
                    )
                )
    if not limit:
        return settings
    type_k, type_v = choices.cache_types()
    said = choices.requested_flash_attn()
    for (window, sinks), schedule in windows.items():
        for n_ubatch in choices.n_ubatches(schedule):
            settings.append(
                Setting(
                    variant=f"limit w{window} k{sinks}",
                    kind="limit",
                    schedule=Schedule.full(variants[0].schedule.model),
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
