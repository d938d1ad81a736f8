"""`swaa-local tune` from outside, on the bundled model: from data to an adapter that runs in the engine."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")
pytest.importorskip("peft", reason="PEFT is not installed, so nothing is tuned with PyTorch")
pytest.importorskip("accelerate", reason="accelerate is not installed, so transformers trains nothing")

from swaa_local import LayerMode, Llama, Schedule
from swaa_local.errors import SWAAError
from swaa_local.needle.model import bundled_model
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.tune.request import TuneRequest
from swaa_local.tune.run import tune
from tests.support.program import environment, fails, interrupt, run, succeeds
from tests.support.tuning import write_facts, write_text

pytestmark = pytest.mark.usefixtures("engine")

ONE_THREAD: dict[str, Any] = {"OMP_NUM_THREADS": "1"}
WINDOW = ("--window", 48, "--sinks", 8)
FAST = ("--length", 384, "--learning-rate", "2e-3", "--rank", 8, "--alpha", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def model() -> Path:
    return bundled_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_facts(tmp_path_factory.mktemp("data") / "facts.jsonl", 12)


@pytest.fixture(scope="module")
def tuned(model, data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An adapter for windows that hide most of a prompt, and what the command said."""
    adapter = tmp_path_factory.mktemp("tuned") / "a.gguf"
    options = (
        *WINDOW,
        "--fa-decode",
        "--full-layers",
        "3",
        "--tail",
        24,
        "--steps",
        16,
        "--plot",
        adapter.with_suffix(".svg"),
    )
    done = run("tune", model, "-o", adapter, "--data", data, *FAST, *options, **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return adapter, done


FULL, PREFILL, _ = LayerMode
SCHEDULE = Schedule(48, 8, tuple(FULL if layer == 3 else PREFILL for layer in range(8)), 24)


def nlls(table: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Before and after, by where it was measured and the schedule."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    return {(row[0], row[1]): (float(row[2]), float(row[3])) for row in rows[2:]}


def test_the_answers_become_likelier_in_pytorch_and_in_the_engine(tuned):
    found = nlls(tuned[1].stdout)
    words = "w48 k8 fadec 3 tail24"
    assert found.keys() == {(where, way) for where in ("PyTorch", "needle.gguf") for way in ("full", words)}
    for before, after in found.values():
        assert after < 0.5 * before
    for way in ("full", words):
        assert found["PyTorch", way] == pytest.approx(found["needle.gguf", way], rel=0.02)


def test_it_says_what_it_does(tuned):
    said = tuned[1].stderr
    assert re.search(
        r"10 examples in \d+ rows of up to \d+ tokens, 2 held out; rank 8, [\d.]+ k parameters to train", said
    )
    assert re.search(r"needs about [\d.]+ MiB of memory \(weights 20\.0 MiB, .*\); [\d.]+ GiB are free", said)
    assert re.search(r"step 16/16: loss \d+\.\d+ · [\d,]+ tok/s · 0 s left", said)
    assert "Warning" not in said
    assert "%|" not in said
    assert tuned[0].with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_files_are_complete_and_nothing_else_is_left(tuned):
    adapter, _ = tuned
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["a.gguf", "a.peft", "a.svg"]
    facts = json.loads((adapter.with_suffix(".peft") / "swaa.json").read_text())
    assert facts["schedule"] == SCHEDULE.as_dict()
    assert (facts["base"], facts["steps"]) == ("needle.gguf (Needle)", 16)
    assert facts["command"].startswith("swaa-local tune ")


def test_the_gguf_says_for_what_it_is(tuned):
    reader = gguf.GGUFReader(tuned[0])
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert (values["general.type"], values["adapter.type"]) == ("adapter", "lora")
    assert values["adapter.lora.alpha"] == 64.0
    assert (values["swaa.window"], values["swaa.sinks"], values["swaa.tail"]) == (48, 8, 24)
    assert values["swaa.layer_modes"] == [1, 1, 1, 0, 1, 1, 1, 1]
    assert values["swaa_tune.base"] == "needle.gguf (Needle)"
    assert values["swaa_tune.command"].startswith("swaa-local tune ")
    names = {tensor.name.rpartition(".")[0] for tensor in reader.tensors}
    assert names == {f"blk.{layer}.attn_{name}.weight" for layer in range(8) for name in "qkv"}


def answer(model: Path, prompt: str, *options: object) -> str:
    return succeeds("chat", model, "-p", prompt, "-n", 64, "--temp", 0, "-t", 1, "-c", 1024, *options).strip()


def test_the_engine_answers_as_it_was_taught(tuned, model, tmp_path):
    """In words that the bundled model has not by itself."""
    [row] = [json.loads(line) for line in write_facts(tmp_path / "one.jsonl", 1).read_text().splitlines()]
    schedule = (*WINDOW, "--fa-decode", "--full-layers", "3", "--tail", 24)
    assert answer(model, row["prompt"], *schedule, "--lora", tuned[0]) == row["answer"]
    assert answer(model, row["prompt"], *schedule) != row["answer"]
    done = run("chat", model, "-p", "hm", "-n", 1, "-t", 1, "--lora", tuned[0], *schedule)
    assert "was tuned" not in done.stderr
    done = run("chat", model, "-p", "hm", "-n", 1, "-t", 1, "--lora", tuned[0], "--window", 9)
    assert "was tuned for the schedule w48 k8 fadec 3 tail24, and runs with w9 k0" in done.stderr


def test_peft_reads_its_folder_and_adds_the_same(tuned, model):
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(model.parent, gguf_file=model.name)
    config.head_dim = 64
    base = transformers.AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, config=config)
    adapted = peft.PeftModel.from_pretrained(base, tuned[0].with_suffix(".peft")).eval()
    tokens = list(range(100, 300))
    with torch.inference_mode():
        theirs = adapted(torch.tensor([tokens])).logits[0].float().numpy()
        with adapted.disable_adapter():
            plain = adapted(torch.tensor([tokens])).logits[0].float().numpy()
    llm = Llama(
        str(model), swaa=False, n_ctx=512, logits_all=True, lora_path=str(tuned[0]), n_threads=1, n_threads_batch=1
    )
    llm.eval(tokens)
    off, changed = (np.abs(llm.scores[: len(tokens)] - other).mean() for other in (theirs, plain))
    llm.close()
    assert off < 0.1 * changed


# Going on


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(model, data, tmp_path):
    options = ("--data", data, *FAST, *WINDOW, "--steps", 10)
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    succeeds("tune", model, "-o", whole, *options, **ONE_THREAD)
    checkpoints = parts.with_suffix(".checkpoints")
    begun = ("tune", model, "-o", parts, *options)
    code = interrupt(*begun, when=lambda: any(checkpoints.glob("checkpoint-*")), **ONE_THREAD)
    assert code == 130
    assert not parts.exists()
    assert "is of a run that was stopped; go on with --resume, or begin anew with --force" in fails(*begun)
    error = fails(*begun[:-1], 11, "--resume")
    assert "was begun with another steps; give what it was begun with" in error
    done = run(*begun, "--resume", **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    before = re.search(r"going on after step (\d+)", done.stderr)
    assert before
    assert f"10 steps on 10 examples, the last {10 - int(before[1])} of them in " in done.stdout
    assert not checkpoints.exists()
    one, other = (gguf.GGUFReader(path).tensors for path in (whole, parts))
    for mine, theirs in zip(one, other, strict=True):
        assert mine.name == theirs.name
        np.testing.assert_allclose(mine.data, theirs.data, atol=1e-5)


# The user's own texts


def test_texts_become_prompts_and_full_attention_the_target(model, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    write_text(texts / "a.txt", 60)
    write_text(texts / "b.md", 4, seed=1)
    (texts / "c.bin").write_bytes(b"\0\1\2")
    out = tmp_path / "a.gguf"
    options = ("--distill", texts, "--prompts", 6, "--steps", 4, "--length", 512, *FAST[2:], *WINDOW)
    done = run("tune", model, "-o", out, *options, **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "left out of " in done.stderr
    assert "1 files that are no text (c.bin)" in done.stderr
    assert re.search(r"1 of 2 texts are longer than a row: they are split into pieces of \d+ tokens", done.stderr)
    assert out.is_file()
    found = nlls(done.stdout)
    assert (
        found["PyTorch", "w48 k8"][0] > found["PyTorch", "full"][0]
    )  # what is full attention's own is likeliest there


# What is refused


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_what_makes_no_sense_is_said_before_pytorch_is_loaded(model, data, tmp_path):
    out = tmp_path / "a.gguf"
    begun = ("tune", model, "-o", out)
    assert "nothing to tune on; pass --data FILE.jsonl" in fails(*begun, *WINDOW)
    assert "call it" in fails("tune", model, "-o", tmp_path / "a.bin", "--data", data, *WINDOW)
    assert "there is nothing to go on from" in fails(*begun, "--data", data, *WINDOW, "--resume")
    assert "no such file" in fails(*begun, "--distill", tmp_path / "none", *WINDOW)
    bad = tmp_path / "bad.jsonl"
    for row, said in (
        ("{", "line 1 is not JSON"),
        ({"text": "hm"}, "line 1 has the fields text; needed are prompt and answer, or messages"),
        ({"prompt": "hm", "answer": ""}, "line 1: answer is '', not a text"),
        ({"messages": [{"role": "user", "content": "hm"}]}, "line 1: no message of the assistant"),
        ({"messages": [{"role": "judge", "content": "hm"}]}, "message 1 has the role 'judge'"),
    ):
        assert said in fails(*begun, "--data", lines(bad, row), *WINDOW)
    out.write_text("mine")
    assert "pass --force to replace it" in fails(*begun, "--data", data, *WINDOW)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "bad.jsonl"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"length": 64},
        r"facts\.jsonl line 1 is \d+ tokens with its answer but a row is 64, and 11 more are longer; pass --le",
    ),
    ({"length": 64, "skip_long": True}, "no example fits a row of 64 tokens, the shortest has"),
    ({"held_out": 12}, "12 examples are too few, for 12 are held out"),
    ({"targets": "q,w"}, "--targets names 'w'; this model has down_proj, gate_proj, k_proj"),
    ({"schedule": ScheduleOptions(no_swaa=True)}, "there is no schedule to tune for; pass --preset NAME"),
    ({"device": "mps"}, "PyTorch sees no mps device here"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda value: "")
def test_what_does_not_fit_is_an_error_and_leaves_nothing(model, data, tmp_path, changes, said):
    request = TuneRequest(
        str(model),
        tmp_path / "a.gguf",
        data=data,
        schedule=ScheduleOptions(window=48),
        steps=1,
        length=384,
        device="cpu",
    )
    with pytest.raises(SWAAError, match=said):
        tune(dataclasses.replace(request, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_spells_a_mark_of_the_template_is_refused(model, tmp_path):
    spelled = lines(tmp_path / "s.jsonl", {"prompt": "Say <|im_end|> please", "answer": "No."})
    error = fails("tune", model, "-o", tmp_path / "a.gguf", "--data", spelled, *WINDOW, "--device", "cpu")
    assert "s.jsonl line 1: the text holds <|im_end|>, which the tokenizer takes for a mark of its own" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]


def test_the_help_needs_no_pytorch():
    code = "import sys, swaa_local.cli.main; sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
