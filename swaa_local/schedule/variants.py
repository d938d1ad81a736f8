"""Variants of one model: the schedules that a command compares, each under the words that the user gave it.

Grammar: variants separated by commas; a variant is a name (`full`, `file`, `naive`, or a preset's) or words separated
by blanks:

    w2048      the window, in tokens            naive      the file's window
    k100       sinks, in tokens                 sinks      as many as the file has
    fadec      FA decode in all layers          layers     the full layers of the file
    1::2       full layers: 1,3,5 or 0-3 too
    tail128    the last tokens of the prompt, read with full attention (with FA decode)
    tail       as many of them as the file has

Behind `file` or the name of a preset another tail may stand: `file tail0`.

For `eval` either may be followed by `think` or `direct`: the model is to think first, or not, whatever it does in other
variants. For `bench` words say how the engine runs it: `fa` or `nofa` (flash attention), a type of the KV cache, such
as `f16` or `q8_0`, and `spec`, `spec4` or `spec4@0.9`: so many tokens are drafted for each pass, of which this share is
taken to be accepted.

Pure: knows the rules of schedules; nothing of files, of the engine or of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from swaa_local.errors import ScheduleError
from swaa_local.schedule.config import MAX_DRAFT, LayerMode, Schedule, SWAAConfig
from swaa_local.schedule.cost import KV_TYPES
from swaa_local.schedule.layers import parse_layers
from swaa_local.schedule.model_layers import ModelLayers
from swaa_local.schedule.presets import PRESETS, get_preset, is_preset

FULL, FILE, NAIVE, SINKS, LAYERS, FA_DECODE, TAIL = "full", "file", "naive", "sinks", "layers", "fadec", "tail"
THINK = {"think": True, "direct": False}
FLASH_ATTN = {"fa": True, "nofa": False}


@dataclass(frozen=True)
class AssumedDrafts:
    """n tokens are drafted for a pass; each is accepted with this probability if those before it are."""

    n: int = 4
    acceptance: float = 0.9


@dataclass(frozen=True)
class Variant:
    """A schedule with the name it is shown under. think: whether to think first. flash_attn: whether to run with it.
    cache_type: of keys and values. None where it does not say. drafts: None for none."""

    name: str
    schedule: Schedule
    think: bool | None = None
    flash_attn: bool | None = None
    cache_type: str | None = None
    drafts: AssumedDrafts | None = None

    @property
    def window(self) -> int | None:
        """In tokens; None where no layer slides."""
        return None if self.is_full else self.schedule.window

    @property
    def is_full(self) -> bool:
        """True for full attention."""
        return self.schedule.is_full

    @property
    def is_naive(self) -> bool:
        """True for a window in all layers that can slide and nothing else."""
        return self.schedule.is_naive


def parse_variants(
    text: str, model: ModelLayers | int, of_file: Schedule | None, *, words: Literal["thinking", "engine"] = "thinking"
) -> list[Variant]:
    """The variants of a list such as `full,naive,file,w2048 k100 fadec 1::2` for a model of these layers.

    of_file: the schedule that the file has. words: those that say something else than the schedule. Raises
    `ScheduleError`, naming the variant, for unknown words, for what the file lacks, and for a variant that is
    given twice.
    """
    variants: list[Variant] = []
    # A layer list may hold commas: an item that does not begin with a letter continues it.
    for item in re.split(r",(?!\s*[\d:-])", text):
        name = " ".join(item.split())
        if not name:
            raise ScheduleError(f"empty variant in {text!r}; write for instance full,naive,file")
        if any(variant.name == name for variant in variants):
            raise ScheduleError(f"variant {name!r} is given twice")
        try:
            variants.append(_parse(name, model, of_file, words))
        except ScheduleError as error:
            raise ScheduleError(f"variant {name!r}: {error}") from None
    return variants


def without_schedule(unsupported: str | None) -> tuple[str, str]:
    """What to compare where neither the user nor the file names a schedule, and what to say of it. unsupported: why
    none can apply, if so."""
    if unsupported:
        return FULL, f"full attention alone is measured: {unsupported}"
    names = f"{FULL},quality,speed"
    return names, f"comparing {names} (choose with --variants)"


def whole_in_window(variants: Sequence[Variant], n_tokens: int) -> str | None:
    """What to say where nothing that is measured is longer than a variant's window, which then changes nothing."""
    names = [variant.name for variant in variants if variant.window is not None and variant.window >= n_tokens]
    if not names:
        return None
    whole = f"at most {n_tokens} tokens are measured, which the window of {' and of '.join(names)} holds whole"
    return f"{whole}: longer ones tell what it changes"


def _parse(name: str, model: ModelLayers | int, of_file: Schedule | None, words: str) -> Variant:
    if words == "engine":
        return _parse_engine_words(name, model, of_file)
    rest, _, last = name.rpartition(" ")
    if rest and last in THINK:
        return Variant(name, _schedule(rest, model, of_file), THINK[last])
    return Variant(name, _schedule(name, model, of_file))


def _parse_engine_words(name: str, model: ModelLayers | int, of_file: Schedule | None) -> Variant:
    said = name.split(" ")
    flash_attn = [word for word in said[1:] if word in FLASH_ATTN]
    cache_types = [word for word in said[1:] if word in KV_TYPES]
    drafts = [word for word in said[1:] if word.startswith("spec")]
    for group in (flash_attn, cache_types, drafts):
        if len(group) > 1:
            raise ScheduleError(f"{group[0]!r} and {group[1]!r} exclude each other")
    schedule = _schedule(
        " ".join(word for word in said if word not in {*flash_attn, *cache_types, *drafts}), model, of_file
    )
    return Variant(
        name,
        schedule,
        flash_attn=FLASH_ATTN[flash_attn[0]] if flash_attn else None,
        cache_type=cache_types[0] if cache_types else None,
        drafts=_drafts(drafts[0]) if drafts else None,
    )


def _drafts(word: str) -> AssumedDrafts:
    match = re.fullmatch(r"spec(\d+)?(?:@(\d+(?:\.\d+)?))?", word)
    if match is None:
        raise ScheduleError(f"unknown word {word!r}; drafts are spec, spec4 or spec4@0.9")
    assumed = AssumedDrafts()
    n = int(match[1]) if match[1] else assumed.n
    acceptance = float(match[2]) if match[2] else assumed.acceptance
    if not (1 <= n <= MAX_DRAFT and acceptance <= 1):
        raise ScheduleError(f"{word}: 1 to {MAX_DRAFT} tokens are drafted, and 0 to 1 of them accepted")
    return AssumedDrafts(n, acceptance)


def _schedule(name: str, model: ModelLayers | int, of_file: Schedule | None) -> Schedule:
    if name == FULL:
        return Schedule.full(model)
    if name == FILE:
        return _stored(of_file)
    if is_preset(name):
        return get_preset(name).config(model).schedule(model)
    if (match := re.fullmatch(r"(\S+) tail(\d+)", name)) and (match[1] == FILE or is_preset(match[1])):
        return _with_tail(_schedule(match[1], model, of_file), int(match[2]))
    window: int | None = None
    sinks, fa_decode, tail = 0, False, 0
    layers: list[int] = []
    # Blanks around a comma belong to the layer list.
    for word in re.sub(r"\s*,\s*", ",", name).split(" "):
        if word == NAIVE:
            window = _stored(of_file).window
        elif match := re.fullmatch(r"w(\d+)", word):
            window = int(match[1])
        elif word == SINKS:
            sinks = _stored(of_file).sinks
        elif match := re.fullmatch(r"k(\d+)", word):
            sinks = int(match[1])
        elif word == LAYERS:
            layers += _stored(of_file).layers(LayerMode.FULL)
        elif word == FA_DECODE:
            fa_decode = True
        elif word == TAIL:
            tail = _stored(of_file).tail
        elif match := re.fullmatch(r"tail(\d+)", word):
            tail = int(match[1])
        elif re.fullmatch(r"[\d:,-]+", word):
            layers += parse_layers(word, model)
        else:
            raise ScheduleError(
                f"unknown word {word!r}; a variant is full, naive, file, a preset ({', '.join(PRESETS)}), or words "
                "such as w2048 k100 fadec tail128 1::2"
            )
    if window is None:
        raise ScheduleError("it needs a window: w2048, or naive for that of the file")
    if tail and not fa_decode:
        raise ScheduleError("a tail needs FA decode: fadec")
    return SWAAConfig(window, sinks, fa_decode, layers, tail).schedule(model)


def _with_tail(schedule: Schedule, tail: int) -> Schedule:
    if tail and LayerMode.PREFILL not in schedule.layer_modes:
        raise ScheduleError("a tail needs FA decode, which no layer has")
    return replace(schedule, tail=tail)


def _stored(of_file: Schedule | None) -> Schedule:
    if of_file is None:
        raise ScheduleError("the file has no schedule; write the window and the rest in words, for instance w2048 k100")
    return of_file
