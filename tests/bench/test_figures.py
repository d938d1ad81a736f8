"""What a benchmark plans, and the figures that it makes of samples."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from swaa_local.bench.figures import figures, growth
from swaa_local.bench.plan import Choices, make_settings, make_sizes
from swaa_local.bench.results import Bench, BenchError, ModelFacts, Row, Sample, Setting, Size
from swaa_local.bench.table import flat, markdown
from swaa_local.bench.terminal import TerminalWatch
from swaa_local.bench.watch import Measurement
from swaa_local.report.machine import Machine
from swaa_local.report.spread import Spread
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.variants import parse_variants

pytestmark = pytest.mark.usefixtures("engine")

CHOICES = Choices(2048, (512,), None, "f16", "f16")
FULL = Setting("full", "full", Schedule.full(2), 2048, 512, False, "f16", "f16")
FILE = Setting("file", "scheduled", Schedule(64, 4, (1, 1)), 2048, 512, True, "f16", "f16", 64, 4)  # type: ignore[arg-type]
LIMIT = replace(FULL, variant="limit w64 k4", kind="limit", window=64, sinks=4)
SIZE = Size(0, 1000, 10)


def sample(prefill_s: float, decode_s: float | None = 1.0, n_prompt: int = 1000) -> Sample:
    return Sample(n_prompt, prefill_s, prefill_s, 10 if decode_s else 0, decode_s, 100, None, None)


def a_bench(*rows: Row, complete: bool = True) -> Bench:
    machine = Machine("a CPU", (), "", "", "1.0", "1.0", "")
    facts = ModelFacts("m.gguf", "model", 1000, 1000, 2, "F16")
    return Bench(facts, machine, 1, 1, 0, 3, (), rows, complete)


# Sizes


def test_sizes_are_all_prompts_with_all_generations_at_all_depths():
    assert [str(size) for size in make_sizes([100, 200], [0, 8], [0, 50], [])] == [
        *("pp100", "pp100+tg8", "pp100 @ d50", "pp100+tg8 @ d50"),
        *("pp200", "pp200+tg8", "pp200 @ d50", "pp200+tg8 @ d50"),
    ]
    assert [str(size) for size in make_sizes([], [32], [2048], [])] == ["tg32 @ d2048"]
    [size] = make_sizes([], [], [], [(4096, 512)])
    assert (str(size), size.whole, size.decode_depth) == ("pp4096+tg512", True, 4096)
    with pytest.raises(BenchError, match="nothing to measure"):
        make_sizes([0], [0], [128], [])


@pytest.mark.parametrize(("n_prompt", "prompts"), [(1000, (8, 136)), (136, (1, 136)), (137, (2, 136))])
def test_the_limit_reads_prompts_with_the_same_attention_span(n_prompt, prompts):
    n, length = prompts
    assert LIMIT.limit_prompts(n_prompt) == (n, length)
    # Each query sees W + k keys on average, half a key more for itself.
    assert sum(range(1, length + 1)) / length == 64 + 4 + 0.5


def test_shorter_prompts_have_no_limit():
    """With the schedule itself their queries see fewer keys than those of the limit."""
    assert [LIMIT.applies(Size(0, n, 0)) for n in (0, 50, 135, 136, 137)] == [False, False, False, True, True]
    assert FILE.applies(Size(0, 50, 0))


def test_work_grows_with_what_is_attended_to():
    def work(setting: Setting, size: Size, **filled: bool) -> int:
        return setting.work(size, 1000, 64, **filled)

    assert work(FULL, Size(0, 4000, 0)) > 2 * work(FULL, Size(0, 2000, 0))
    assert work(FILE, Size(0, 4000, 0)) < work(FULL, Size(0, 4000, 0))
    assert work(LIMIT, Size(0, 4000, 0)) < work(FULL, Size(0, 4000, 0))
    assert work(FULL, Size(4000, 0, 8), filled=True) < work(FULL, Size(4000, 0, 8))


# Settings


def settings_of(
    variants: str, choices: Choices = CHOICES, best: tuple[bool, ...] = (False,), limit: bool = True
) -> Any:
    return make_settings(
        parse_variants(variants, 4, None, words="engine"),
        choices,
        limit=limit,
        best_of_full={("f16", "f16"): best},
    )


def test_full_attention_and_the_limit_run_in_the_better_setting_and_schedules_as_llama_cpp_chooses():
    made = settings_of("full,w8 fadec,w8")
    assert [(s.variant, s.flash_attn) for s in made] == [
        ("full", False),
        ("w8 fadec", None),
        ("w8", None),
        ("limit w8 k0", False),  # once for both: the window is the same
    ]


def test_full_attention_runs_both_ways_if_prefill_and_decode_disagree():
    made = settings_of("full,w8", best=(True, False))
    assert [(s.variant, s.flash_attn) for s in made] == [
        *(("full", True), ("full", False)),
        ("w8", None),
        ("limit w8 k0", True),
    ]


def test_what_the_user_says_goes_before_and_the_variant_before_that():
    made = settings_of("full,w8,full nofa", replace(CHOICES, flash_attn=True, n_ubatch=(64, 128)), limit=False)
    assert [(s.variant, s.n_ubatch, s.flash_attn) for s in made] == [
        *(("full", 64, True), ("full", 128, True)),
        *(("w8", 64, True), ("w8", 128, True)),
        *(("full nofa", 64, False), ("full nofa", 128, False)),
    ]


# Figures


def test_ratios_pair_repetitions_so_that_a_slow_moment_does_not_count():
    rows = (
        Row(FULL, SIZE, (sample(2.0), sample(20.0), sample(4.0))),
        Row(FILE, SIZE, (sample(1.0), sample(10.0), sample(1.0))),
        Row(LIMIT, SIZE, (sample(0.5, None), sample(5.0, None), sample(1.0, None))),
    )
    full, file, limit = figures(a_bench(*rows))
    assert file.prefill == Spread(1000, 100, 1000)
    assert file.prefill_vs_full == Spread(2, 2, 4)
    assert file.prefill_vs_limit == Spread(0.5, 0.5, 1)
    assert file.request_vs_full == Spread(21 / 11, 1.5, 2.5)
    assert full.prefill_vs_full == Spread(1, 1, 1)
    assert (full.prefill_vs_limit, limit.decode, limit.kv_vs_full) == (None, None, None)


def test_full_attention_is_taken_at_its_best_for_each_figure():
    slow_reader = replace(FULL, n_ubatch=2048)
    rows = (
        Row(FULL, SIZE, (sample(2.0, 4.0),)),
        Row(slow_reader, SIZE, (sample(8.0, 1.0),)),
        Row(FILE, SIZE, (sample(1.0, 2.0),)),
    )
    file = figures(a_bench(*rows))[2]
    assert file.prefill_vs_full == Spread(2)
    assert file.decode_vs_full == Spread(0.5)


def test_what_a_stopped_run_measured_once_too_often_has_no_partner():
    rows = (Row(FULL, SIZE, (sample(2.0),)), Row(FILE, SIZE, (sample(1.0), sample(0.1))))
    bench = a_bench(*rows, complete=False)
    file = figures(bench)[1]
    assert (file.repetitions, file.prefill_vs_full) == (2, Spread(2))
    assert "the run was stopped" in markdown(bench)


def test_growth_compares_the_largest_size_with_the_smallest():
    rows = [
        Row(FULL, Size(0, n, 10), (sample(seconds, n_prompt=n),))
        for n, seconds in ((1000, 1.0), (2000, 3.0), (4000, 16.0))
    ]
    found = {g.phase: g for g in growth(a_bench(*rows))}
    assert found["prefill"].ratio == Spread(0.25)
    assert (found["decode"].small, found["decode"].large) == (Size(0, 1000, 10), Size(0, 4000, 10))
    assert growth(a_bench(rows[0])) == []


def test_one_repetition_has_no_spread():
    bench = a_bench(Row(FULL, SIZE, (sample(2.0),)), Row(FILE, SIZE, (sample(1.0),)))
    table = markdown(bench)
    rows = table.split("\n\n")[0]
    assert " 2.00 |" in rows
    assert "(" not in rows
    assert "One repetition of each; -r 3 would show how much the figures vary." in table
    for line in flat(bench):
        assert {value for name, value in line.items() if name.endswith(("_low", "_high"))} == {None}


# Progress


def test_a_terminal_gets_a_bar_with_the_time_left():
    out = io.StringIO()
    with TerminalWatch() as watch:
        console: Any = Console(file=out, force_terminal=True, width=140, highlight=False)
        watch.console = watch._reporter._console = console
        visits = [Measurement(setting, SIZE, 0) for setting in (FULL, FILE)]
        watch.begin(visits, [100, 50])
        for visit in visits:
            watch.visiting(visit)
            watch.on_tokens(500, 1000)
            watch.visited(visit, sample(1.0))
        watch.end()
    shown = out.getvalue()
    assert "1/1 · file (fa on, ub 512) · pp1000+tg10" in shown
    assert "2/2 runs · 0 s left" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
