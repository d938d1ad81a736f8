"""`swaa-local bench` from outside: that it measures what it says, and that its figures agree with each other.

No time is asserted, only what must hold however long things take.
"""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from shlex import split
from statistics import median
from typing import Any

import pytest

from swaa_local.bench import engine
from swaa_local.bench.engine import BenchModel
from swaa_local.bench.results import Setting
from swaa_local.engine import log as engine_log
from swaa_local.engine import native
from swaa_local.engine.options import EngineOptions
from swaa_local.errors import ModelLoadError
from swaa_local.schedule.config import LayerMode, Schedule
from tests.support.program import environment, fails, run, succeeds
from tests.support.tiny import ALWAYS, FULL, PREFILL, ScheduleKeys

pytestmark = pytest.mark.usefixtures("engine")

SCHEDULE = ScheduleKeys(window=64, sinks=4, layer_modes=[FULL, PREFILL, PREFILL, PREFILL])
# (k + W) keys on average: prompts of 136 tokens.
LIMIT_PROMPT = 2 * (64 + 4)


@pytest.fixture(scope="module")
def model(tiny_model_factory) -> Path:
    return tiny_model_factory(schedule=SCHEDULE, n_ctx_train=8192)


def bench(model: Path, arguments: str) -> Any:
    """The JSON of a run with one thread."""
    return json.loads(succeeds("bench", model, "-t", "1", "-o", "json", *split(arguments)))


@pytest.fixture(scope="module")
def measured(model) -> Any:
    return bench(model, "-p 300,700 -n 3 -r 2")


def rows_of(document: Any, **wanted: Any) -> list[Any]:
    return [row for row in document["results"] if all(row[key] == value for key, value in wanted.items())]


# What it measures


def test_every_variant_is_measured_at_every_size_as_often_as_asked(measured):
    assert measured["complete"] is True
    tests = {"pp300+tg3", "pp700+tg3"}
    by_kind = {kind: rows_of(measured, kind=kind) for kind in ("full", "scheduled", "limit")}
    assert {row["test"] for row in by_kind["scheduled"]} == tests
    assert [row["variant"] for row in by_kind["scheduled"]] == ["file", "file"]
    assert [row["variant"] for row in by_kind["limit"]] == ["limit w64 k4"] * 2
    assert {row["test"] for row in by_kind["full"]} == tests
    assert all(len(row["samples"]) == row["repetitions"] == 2 for row in measured["results"])
    [file, _] = by_kind["scheduled"]
    assert (file["window"], file["sinks"], file["layer_modes"]) == (64, 4, [0, 1, 1, 1])
    assert all(row["layer_modes"] == [0, 0, 0, 0] for row in by_kind["full"] + by_kind["limit"])


def test_another_tail_is_measured_and_told(model):
    document = bench(model, "-p 300 -n 0 -r 1 --no-limit --tail 40")
    [file] = rows_of(document, kind="scheduled")
    assert (file["window"], file["sinks"], file["layer_modes"], file["tail"]) == (64, 4, [0, 1, 1, 1], 40)
    assert {row["tail"] for row in rows_of(document, kind="full")} == {0}


def test_the_tail_of_a_prompt_is_decoded(model, monkeypatch):
    """Where the engine is told that a prompt ends: so many tokens before its last one, behind what is in the cache."""
    ends: list[int] = []
    tell = native.llama_swaa_set_prompt_end

    def watched(ctx: Any, seq: int, end: int) -> None:
        ends.append(end)
        tell(ctx, seq, end)

    monkeypatch.setattr(native, "llama_swaa_set_prompt_end", watched)
    schedule = Schedule(64, 4, (LayerMode.FULL, *[LayerMode.PREFILL] * 3), tail=40)
    setting = Setting("tailed", "scheduled", schedule, 512, 256, None, "f16", "f16")
    with BenchModel(model, EngineOptions(n_threads=1)) as loaded, loaded.context(setting, 1024) as context:
        del ends[:]
        context.prefill(300)
        context.prefill(20)
        context.prefill(100)
        assert ends == [260, 300, 380]


@pytest.mark.parametrize("mode", ["none", "layer"])
def test_how_layers_are_divided_can_be_said(model, mode):
    document = bench(model, f"-p 40 -n 1 -r 1 --no-limit --variants full -sm {mode}")
    assert len(rows_of(document, variant="full")) == 1


def test_a_backend_that_divides_no_matrices_is_told_with_what_to_do(model, monkeypatch):
    """As CUDA's is since llama.cpp divides tensors instead; there is none here, so its words stand in."""
    reason = "device CUDA0 does not support split buffers"
    monkeypatch.setattr(engine_log.EngineLog, "reason", property(lambda self: reason))
    monkeypatch.setattr(engine._c, "llama_model_load_from_file", lambda *_: None)
    with pytest.raises(ModelLoadError, match=r"split buffers, which -sm row .* takes; pass -sm layer"):
        BenchModel(model, EngineOptions(split_mode="row"))


def test_the_figures_agree_with_the_samples(measured):
    for row in measured["results"]:
        rates = [sample["n_prompt"] / sample["prefill_s"] for sample in row["samples"]]
        assert row["prefill_tokens_per_s"] == pytest.approx(median(rates))
        assert row["prefill_tokens_per_s_low"] == pytest.approx(min(rates))
        assert row["prefill_tokens_per_s_high"] == pytest.approx(max(rates))
        if row["kind"] == "limit":
            continue
        assert all(sample["ttft_s"] >= sample["prefill_s"] for sample in row["samples"])
        assert row["decode_tokens_per_s"] == pytest.approx(median(3 / sample["decode_s"] for sample in row["samples"]))
        assert row["request_s"] == pytest.approx(median(s["ttft_s"] + s["decode_s"] for s in row["samples"]))


def test_ratios_are_taken_within_a_repetition_against_full_attention_at_its_best(measured):
    for test in ("pp300+tg3", "pp700+tg3"):
        fulls = rows_of(measured, kind="full", test=test)
        best = max(fulls, key=lambda row: row["prefill_tokens_per_s"])
        [file] = rows_of(measured, variant="file", test=test)
        ratios = [b["prefill_s"] / a["prefill_s"] for a, b in zip(file["samples"], best["samples"], strict=True)]
        assert file["prefill_vs_full"] == pytest.approx(median(ratios))
        assert best["prefill_vs_full"] == 1
        [limit] = rows_of(measured, kind="limit", test=test)
        over_limit = [
            (a["n_prompt"] / a["prefill_s"]) / (b["n_prompt"] / b["prefill_s"])
            for a, b in zip(file["samples"], limit["samples"], strict=True)
        ]
        assert file["prefill_vs_limit"] == pytest.approx(median(over_limit))


def test_the_limit_reads_whole_short_prompts_until_as_many_tokens_have_passed(measured):
    for row in rows_of(measured, kind="limit"):
        assert row["n_prompt_read"] % LIMIT_PROMPT == 0
        assert 0 <= row["n_prompt_read"] - row["n_prompt"] < LIMIT_PROMPT
        assert row["n_ctx"] == 256  # they fit a context of their own
        assert row["decode_tokens_per_s"] is None


def test_full_attention_runs_in_the_setting_that_a_test_finds_faster(measured):
    [probe] = measured["flash_attention_of_full"]
    assert probe["n_prompt"] <= 4096
    best = "on" if probe["prefill_on"] >= probe["prefill_off"] else "off"
    used = [row["flash_attn"] for row in rows_of(measured, kind="full", n_prompt=700)]
    assert best in used
    if len(used) == 2:  # decode likes the other one
        decode_best = "on" if probe["decode_on"] >= probe["decode_off"] else "off"
        assert decode_best != best
    assert {row["flash_attn"] for row in rows_of(measured, kind="limit")} == {best}


def test_kv_bytes_are_those_that_inspect_works_out(measured, model):
    for row in rows_of(measured, variant="file"):
        shown = json.loads(succeeds("inspect", model, "-c", row["n_ctx"], "--json"))
        assert row["kv_bytes"] == shown["scheduled"]["kv_bytes"]
    [always] = rows_of(
        bench(model, '-p 700 -n 0 -r 1 -ub 64 --no-limit -fa on --variants "full,w32 k2"'), variant="w32 k2"
    )
    [full] = rows_of(measured, kind="full", n_prompt=700)[:1]
    assert always["kv_vs_full"] == pytest.approx(always["kv_bytes"] / full["kv_bytes"])
    assert always["kv_bytes"] < full["kv_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part of a run is Linux's to tell")
def test_peak_memory_holds_weights_and_cache(measured):
    for row in measured["results"]:
        assert row["host_bytes"] > measured["settings"]["model_size"] + row["kv_bytes"]
        assert row["device_bytes"] is None or row["device_bytes"] >= 0


def test_what_is_measured_is_what_the_engine_runs(model):
    """The same tokens through `Llama` give the same first token and the same next one, so phases are right."""
    import numpy as np

    from swaa_local import Llama
    from swaa_local.bench.engine import BenchModel
    from swaa_local.bench.results import Setting
    from swaa_local.engine.options import EngineOptions
    from swaa_local.schedule.config import Schedule

    schedule = Schedule(32, 2, (PREFILL, ALWAYS, PREFILL, ALWAYS))
    settings = [Setting("x", "scheduled", s, 64, 32, True, "f16", "f16") for s in (schedule, Schedule.full(4))]
    found = []
    with BenchModel(model, EngineOptions(n_threads=1, n_gpu_layers=0)) as loaded:
        for setting in settings:
            with loaded.context(setting, 512) as context:
                context.prefill(100, prompt_end=200)
                context.prefill(100)
                logits = [context.logits().copy()]
                assert context.first_token() == logits[0].argmax()
                for _ in range(2):
                    context.decode(1)
                    logits.append(context.logits().copy())
                found.append(logits)
                tokens = [int(token) for token in context._tokens[:202]]
    assert all(abs(a - b).max() > 0.1 * b.std() for a, b in zip(*found, strict=True))  # the schedule matters here
    for logits, setting in zip(found, settings, strict=True):
        llm = Llama(
            str(model),
            swaa=setting.schedule,
            n_ctx=512,
            n_batch=64,
            n_ubatch=32,
            n_threads=1,
            n_threads_batch=1,
            flash_attn=True,
            n_gpu_layers=0,
        )
        for own, (part, decode) in zip(
            logits, ((tokens[:200], False), (tokens[200:201], True), (tokens[201:], True)), strict=True
        ):
            llm.eval(part, decode=decode)
            its = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
            np.testing.assert_allclose(own, its, atol=0.02 * its.std())
        llm.close()


# Sizes and settings


def test_depth_alone_decodes_there_and_the_caches_are_kept(model):
    document = bench(model, '-d 128,400 -n 4 -r 2 --variants "full fa,full nofa,file,w32 k2 q8_0"')
    assert {(row["test"], row["n_depth"], row["n_prompt"]) for row in document["results"]} == {
        ("tg4 @ d128", 128, 0),
        ("tg4 @ d400", 400, 0),
    }
    assert len(document["results"]) == 8  # and no limit: that is one of prefill
    assert document["flash_attention_of_full"] == []  # all is said
    for row in document["results"]:
        assert row["prefill_tokens_per_s"] is None
        assert row["decode_tokens_per_s"] > 0
        assert row["decode_vs_full"] > 0
    [quantized] = rows_of(document, variant="w32 k2 q8_0", n_depth=400)
    assert (quantized["type_k"], quantized["type_v"], quantized["flash_attn"]) == ("q8_0", "q8_0", "on")
    assert {row["phase"] for row in document["growth"]} == {"decode"}


def test_drafts_are_compared_with_full_attention_without_them(model):
    words = '"full fa,full fa spec2@1,file fa spec@0.5"'
    document = bench(model, f"-d 200 -n 9 -r 2 --draft-window 64 --variants {words}")
    assert [
        (row["variant"], row["kind"], row["n_draft"], row["assumed_acceptance"]) for row in document["results"]
    ] == [
        ("full fa", "full", 0, None),
        ("full fa spec2@1", "scheduled", 2, 1.0),
        ("file fa spec@0.5", "scheduled", 4, 0.5),
    ]
    for row in document["results"]:
        assert row["decode_tokens_per_s"] == pytest.approx(median(9 / sample["decode_s"] for sample in row["samples"]))
        assert row["decode_vs_full"] > 0


@pytest.mark.parametrize(("acceptance", "sizes"), [(1.0, [3, 3, 3]), (0.0, [3] * 7 + [2, 1])])
def test_a_pass_reads_what_was_drafted_and_keeps_what_is_accepted(model, monkeypatch, acceptance, sizes):
    from swaa_local.bench.engine import BenchModel
    from swaa_local.bench.results import Setting
    from swaa_local.engine.options import EngineOptions
    from swaa_local.schedule.config import Schedule
    from swaa_local.schedule.variants import AssumedDrafts

    drafts = AssumedDrafts(2, acceptance)
    with BenchModel(model, EngineOptions(n_threads=1, draft_window=64)) as loaded:
        full = Schedule.full(loaded.n_layer)
        setting = Setting("x", "scheduled", full, 64, 64, True, "f16", "f16", drafts=drafts)
        with loaded.context(setting, 512) as context:
            context.prefill(200)
            passes: list[int] = []
            decode = context._decode

            def note_passes(n: int, *, last: bool, every: bool = False) -> None:
                if every:
                    passes.append(n)
                decode(n, last=last, every=every)

            monkeypatch.setattr(context, "_decode", note_passes)
            context.decode(9)
            assert context.n_past == 209
            assert passes == sizes


def test_whole_requests_and_several_n_ubatch(model):
    document = bench(
        model, "-pg 256,4 -pg 128,2 -d 0,64 -ub 32,128 -r 1 -fa on --no-limit --window 64 --full-layers 1::2"
    )
    assert {row["test"] for row in document["results"]} == {
        "pp256+tg4",
        "pp128+tg2",
        "pp256+tg4 @ d64",
        "pp128+tg2 @ d64",
    }
    assert {row["variant"] for row in document["results"]} == {"full", "w64 k0 1,3"}
    for test in {row["test"] for row in document["results"]}:
        rows = rows_of(document, test=test)
        assert sorted((row["variant"], row["n_ubatch"]) for row in rows) == [
            ("full", 32),
            ("full", 128),
            ("w64 k0 1,3", 32),
            ("w64 k0 1,3", 128),
        ]
        best = min(row["request_s"] for row in rows if row["variant"] == "full")
        for row in rows:
            assert row["request_vs_full"] == pytest.approx(best / row["request_s"])


def test_without_a_schedule_known_ones_are_compared(tiny_model):
    done = run("bench", tiny_model, *split("-p 64 -n 0 -r 1 -t 1 -fa on -o jsonl"))
    assert done.returncode == 0, done.stderr
    assert "has no schedule; comparing full,quality,speed (choose with --variants" in done.stderr
    assert [json.loads(line)["variant"] for line in done.stdout.splitlines()][:3] == ["full", "quality", "speed"]


def test_the_limit_is_left_out_where_it_means_nothing(model, tmp_path):
    done = run("bench", model, *split("-p 100,150 -n 0 -r 1 -t 1 -fa on"))
    assert "no limit for prompts below 2(W+k) tokens (136)" in done.stderr
    rows = [line.split("|")[1:] for line in done.stdout.splitlines() if "| pp" in line.replace("  ", "")]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        *(("full", "pp100"), ("file", "pp100")),
        *(("full", "pp150"), ("file", "pp150"), ("limit w64 k4", "pp150")),
    ]
    alone = run("bench", model, *split("-p 100 -n 0 -r 1 -t 1 -fa on"))
    assert "vs limit" not in alone.stdout
    assert "limit:" not in alone.stdout


def test_a_prompt_within_the_window_is_no_comparison(model):
    note = "at most 60 tokens are measured, which the window of file holds whole"
    assert note in run("bench", model, *split("-p 60 -n 0 -r 1 -t 1 -fa on")).stderr
    assert "holds whole" not in run("bench", model, *split("-p 65 -n 0 -r 1 -t 1 -fa on")).stderr


def test_no_swaa_measures_full_attention_alone(model):
    document = bench(model, "-p 64 -n 0 -r 1 --no-swaa -ctk q8_0 -ctv q8_0")
    [row] = document["results"]
    assert (row["variant"], row["flash_attn"], row["type_k"]) == ("full", "on", "q8_0")
    assert document["flash_attention_of_full"] == []


# What it says


def test_tables_have_a_row_for_each_variant_and_size(model):
    arguments = ("bench", model, *split("-p 200,400 -n 2 -r 2 -t 1 -fa on"))
    table = succeeds(*arguments)
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in table.splitlines()
        if "| pp" in line.replace("  ", "")
    ]
    assert [(row[0], row[1]) for row in rows] == [
        (variant, test) for test in ("pp200+tg2", "pp400+tg2") for variant in ("full", "file", "limit w64 k4")
    ]
    assert "prefill 400 / 200" in table
    assert "decode at depth 400 / 200" in table
    assert "Medians of 2 interleaved repetitions" in table
    text = succeeds(*arguments, "-o", "csv")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["variant"] for line in lines] == ["full", "file", "limit w64 k4"] * 2
    assert all(float(line["prefill_tokens_per_s"]) > 0 and line["cpu_info"] for line in lines)
    assert json.loads(lines[1]["layer_modes"]) == [0, 1, 1, 1]


def test_progress_tells_what_is_left_and_goes_to_stderr(model):
    done = run("bench", model, *split("-p 150 -n 2 -r 2 -t 1 -fa on -o csv"))
    assert done.stdout.startswith("model_filename,")
    shown = [line for line in done.stderr.splitlines() if " runs" in line]
    assert len(shown) == 6
    assert shown[0].startswith("1/2 · full (fa on, ub 512) · pp150+tg2: ")
    assert "1/6 runs · " in shown[0]
    assert shown[-1].endswith("6/6 runs · 0 s left")
    # Each repetition begins with another setting.
    assert [line.split(" · ")[1].split(" (")[0] for line in shown] == [
        *("full", "file", "limit w64 k4"),
        *("file", "limit w64 k4", "full"),
    ]


def test_a_plot_is_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    done = run("bench", model, *split("-p 64,128 -n 2 -r 1 -t 1 -fa on"), "--plot", tmp_path / "p.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.svg").read_text().lstrip().startswith("<?xml")
    assert f"wrote {tmp_path / 'p.svg'}" in done.stderr


def test_ctrl_c_shows_the_figures_so_far(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "swaa_local", "bench", str(model), *split("-p 150 -n 2 -r 100000 -t 1 -fa on -o json")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("2/100000"):
                break
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "stopped; these are the figures so far" in error
    document = json.loads(out)
    assert document["complete"] is False
    assert {row["variant"] for row in document["results"]} == {"full", "file", "limit w64 k4"}


def test_a_failure_in_the_middle_loses_no_figures(model, monkeypatch):
    from swaa_local.bench.engine import BenchModel
    from swaa_local.bench.run import BenchFailed, BenchRequest, bench
    from swaa_local.engine.options import EngineOptions
    from swaa_local.errors import ModelLoadError

    make, made = BenchModel.context, []

    def context(self: BenchModel, setting: Any, n_ctx: int) -> Any:
        made.append(setting)
        if len(made) == 5:
            raise ModelLoadError("out of memory")
        return make(self, setting, n_ctx)

    monkeypatch.setattr(BenchModel, "context", context)
    engine = EngineOptions(n_threads=1, flash_attn=True)
    with pytest.raises(BenchFailed, match="out of memory") as failed:
        bench(BenchRequest(model, prompts=(150,), gens=(1,), repetitions=2, engine=engine))
    assert failed.value.bench.complete is False
    assert {(row.setting.variant, len(row.samples)) for row in failed.value.bench.rows} == {
        *(("full", 1), ("file", 2), ("limit w64 k4", 1)),
    }


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ("-p 0 -n 0", 1, "nothing to measure: -p 0 and -n 0 leave no tokens"),
        ("-ub 512 -b 256", 1, "-ub 512 is more than -b 256"),
        (
            "--variants 'full nofa q8_0'",
            1,
            "variant 'full nofa q8_0': a quantized V cache (q8_0) needs flash attention",
        ),
        ("-fa off -ctv q8_0", 1, "variant 'full': a quantized V cache (q8_0) needs flash attention"),
        ("--variants 'full fa nofa'", 1, "'fa' and 'nofa' exclude each other"),
        ("--variants full,fa", 1, "variant 'fa': unknown word 'fa'"),
        ("--variants 'full think'", 1, "variant 'full think': unknown word 'full'"),
        ("--variants full --window 8", 2, "--variants names all schedules"),
        ("-p 12,x", 2, "'12,x' is not a list of numbers"),
        ("-pg 12", 2, "'12' is not a pair of positive numbers such as 4096,512"),
        ("-p 100000000", 1, "needs a KV cache of"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(arguments, code, reason, model):
    assert reason in fails("bench", model, "-t", "1", *split(arguments), code=code)


def test_eval_does_not_take_the_words_of_bench(model, tmp_path):
    error = fails("eval", model, "--variants", "full nofa", "--results", tmp_path / "r.jsonl")
    assert "unknown word" in error
