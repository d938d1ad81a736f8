"""The grammar of variants."""

from __future__ import annotations

import dataclasses

import pytest

from swaa_local.errors import ScheduleError
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.text import in_one_line, in_words
from swaa_local.schedule.variants import AssumedDrafts, Variant, parse_variants, whole_in_window, without_schedule

F, P, A = LayerMode
STORED = Schedule(256, 16, (F, P, F, P))


def parse(text: str, of_file: Schedule | None = STORED) -> list[Variant]:
    return parse_variants(text, 4, of_file)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("full", Schedule.full(4)),
        ("file", STORED),
        ("naive", Schedule(256, 0, (A, A, A, A))),
        ("naive sinks", Schedule(256, 16, (A, A, A, A))),
        ("naive fadec", Schedule(256, 0, (P, P, P, P))),
        ("naive layers", Schedule(256, 0, (F, A, F, A))),
        ("naive sinks layers fadec", STORED),
        ("w2048 k100 fadec 1::2", Schedule(2048, 100, (P, F, P, F))),
        ("1,3 w64", Schedule(64, 0, (A, F, A, F))),
        ("w64  0-2", Schedule(64, 0, (F, F, F, A))),
        ("w64 fadec tail5", Schedule(64, 0, (P, P, P, P), 5)),
        ("quality", Schedule(2048, 0, (F, P, F, P), 128)),
        ("quality-paper", Schedule(2048, 0, (F, P, F, P))),
        ("streaming", Schedule(2048, 0, (A, A, A, A))),
    ],
)
def test_a_variant_is_a_name_or_words(text, schedule):
    [variant] = parse(text)
    if text in ("quality", "quality-paper", "streaming"):  # presets bring their own sinks
        schedule = Schedule(schedule.window, variant.schedule.sinks, schedule.layer_modes, schedule.tail)
    assert variant == Variant(" ".join(text.split()), schedule)


@pytest.mark.parametrize(
    ("text", "tail"), [("file tail0", 0), ("file  tail7", 7), ("quality tail0", 0), ("quality tail9", 9)]
)
def test_whole_schedules_take_another_tail(text, tail):
    of_file = Schedule(256, 16, (F, P, F, P), 32)
    whole, other = parse(f"{text.split()[0]},{text}", of_file)
    assert whole.schedule.tail in (32, 128)
    assert other.schedule == dataclasses.replace(whole.schedule, tail=tail)
    assert parse(f"{text} direct", of_file)[0] == Variant(f"{other.name} direct", other.schedule, False)


def test_think_and_direct_go_with_any_variant():
    assert [(v.name, v.think) for v in parse("full think,file direct,w8 k1 direct,naive")] == [
        ("full think", True),
        ("file direct", False),
        ("w8 k1 direct", False),
        ("naive", None),
    ]


def test_commas_separate_variants_and_layers():
    names = [variant.name for variant in parse("full, w8 1,3 fadec,naive,w8 0-1, 3 ,file")]
    assert names == ["full", "w8 1,3 fadec", "naive", "w8 0-1, 3", "file"]
    assert parse("w8 0-1, 3")[0].schedule.layers(F) == (0, 1, 3)


def test_the_window_is_known_where_there_is_one():
    assert [variant.window for variant in parse("full,naive")] == [None, 256]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("full,full", "'full' is given twice"),
        ("full,,file", "empty variant"),
        ("", "empty variant"),
        ("k100", "'k100': it needs a window: w2048, or naive"),
        ("fadec", "needs a window"),
        ("w8 tail5", "a tail needs FA decode: fadec"),
        ("streaming tail5", "'streaming tail5': a tail needs FA decode, which no layer has"),
        ("file k4", "unknown word 'file'"),
        ("full tail5", "unknown word 'full'"),
        ("think", "unknown word 'think'"),
        ("w2048 wide", "unknown word 'wide'; a variant is full, naive, file, a preset"),
        ("w0", "between 1 and"),
        ("w8 4", "past the model's 4 layers"),
        ("qwen3-4b", "'qwen3-4b': preset qwen3-4b was published for a model of 36 layers"),
    ],
)
def test_what_means_nothing_is_refused(text, reason):
    with pytest.raises(ScheduleError, match=reason):
        parse(text)


@pytest.mark.parametrize("text", ["file", "naive", "w8 sinks", "w8 layers"])
def test_a_file_without_a_schedule_has_nothing_to_take(text):
    with pytest.raises(ScheduleError, match=f"'{text}': the file has no schedule"):
        parse(text, None)


def test_baselines_are_known_by_what_they_are():
    variants = parse("full direct,file,naive think,w8,naive sinks,naive fadec")
    assert [variant.is_full for variant in variants] == [True, False, False, False, False, False]
    assert [variant.is_naive for variant in variants] == [False, False, True, True, False, False]


def test_what_is_compared_without_a_schedule():
    """At least two known schedules with full attention, unless none can apply."""
    names, said = without_schedule(None)
    variants = parse_variants(names, 4, None)
    assert variants[0].is_full
    assert [variant.is_full for variant in variants[1:]] == [False, False]
    assert names in said
    assert "--variants" in said
    names, said = without_schedule("architecture 'x' has recurrent layers")
    assert [variant.is_full for variant in parse_variants(names, 4, None)] == [True]
    assert said.endswith(": architecture 'x' has recurrent layers")


@pytest.mark.parametrize(
    ("n_tokens", "named"), [(9, []), (8, ["w8", "w8 k1 fadec 1"]), (16, []), (3, ["w8", "w8 k1 fadec 1"])]
)
def test_a_window_that_holds_all_is_named(n_tokens, named):
    note = whole_in_window(parse("full,w8,w8 k1 fadec 1"), n_tokens)
    assert (note is None) == (named == [])
    assert all(name in (note or "") for name in named)


@pytest.mark.parametrize(
    ("text", "flash_attn", "cache_type", "schedule"),
    [
        ("full nofa", False, None, Schedule.full(4)),
        ("file fa", True, None, STORED),
        ("w8 q8_0 k1 fa 1", True, "q8_0", Schedule(8, 1, (A, F, A, A))),
        ("naive f16", None, "f16", Schedule(256, 0, (A, A, A, A))),
    ],
)
def test_where_the_engine_matters_variants_say_how_it_runs_them(text, flash_attn, cache_type, schedule):
    [variant] = parse_variants(text, 4, STORED, words="engine")
    assert variant == Variant(text, schedule, flash_attn=flash_attn, cache_type=cache_type)


@pytest.mark.parametrize(
    ("word", "n", "acceptance"), [("spec", 4, 0.9), ("spec7", 7, 0.9), ("spec@0.5", 4, 0.5), ("spec16@1", 16, 1.0)]
)
def test_drafts_are_assumed_to_be_accepted(word, n, acceptance):
    [variant] = parse_variants(f"file fa {word}", 4, STORED, words="engine")
    assert variant.drafts == AssumedDrafts(n, acceptance)
    assert variant.schedule == STORED


@pytest.mark.parametrize(
    ("text", "words", "reason"),
    [
        ("full spec0", "engine", "spec0: 1 to 16 tokens are drafted"),
        ("full spec17", "engine", "spec17: 1 to 16 tokens are drafted"),
        ("full spec@1.5", "engine", "0 to 1 of them accepted"),
        ("full special", "engine", "unknown word 'special'"),
        ("full spec", "thinking", "unknown word"),
        ("full fa", "thinking", "unknown word"),
        ("full think", "engine", "unknown word"),
        ("fa", "engine", "unknown word 'fa'"),
        ("file fa nofa", "engine", "'fa' and 'nofa' exclude each other"),
        ("file q8_0 f16", "engine", "'q8_0' and 'f16' exclude each other"),
    ],
)
def test_words_of_another_command_and_contradictions_are_refused(text, words, reason):
    with pytest.raises(ScheduleError, match=reason):
        parse_variants(text, 4, STORED, words=words)


@pytest.mark.parametrize(
    "text", ["full", "w8 k0", "w8 k1 fadec 0-2", "w8 k1 0-1,3", "w2048 k100 fadec 1,3", "w8 k0 fadec 0 tail5"]
)
def test_a_schedule_has_words_that_mean_it(text):
    [variant] = parse(text)
    assert in_words(variant.schedule) == text


def test_a_schedule_without_words_still_has_a_name():
    assert in_words(Schedule(8, 1, (F, P, A, P))) == "w8 k1 fadec in 1,3 0"


def test_a_schedule_in_few_words() -> None:
    for modes, words in (
        ((F, P, F, P), "even layers full, others window 8 while reading, 1 sinks"),
        ((P, F, P, F), "odd layers full, others window 8 while reading, 1 sinks"),
        ((P, P, P, F), "layer 3 full, others window 8 while reading, 1 sinks"),
        ((F, F, P, P, F, P), "layers 0-1,4 full, others window 8 while reading, 1 sinks"),
        ((A, A, A, A), "all layers window 8 always, 1 sinks"),
        ((F, A, P, P), "layer 0 full, layer 1 window 8 always, others window 8 while reading, 1 sinks"),
    ):
        assert in_one_line(Schedule(8, 1, modes)) == words
    assert in_one_line(Schedule(8, 0, (P, P), 5)) == "all layers window 8 while reading, tail 5"
    assert in_one_line(None) == "none: full attention"
