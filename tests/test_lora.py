"""`--lora` and `Llama(lora_path=...)`: an adapter under every schedule is as good as weights that it is merged into.

The oracle is the model with the merged weights, in a file of its own or in numpy. `convert --lora` is held against
PEFT's own merge.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from swaa_local import Llama, Schedule, SWAAConfig
from swaa_local.bench.engine import BenchModel
from swaa_local.bench.results import Setting
from swaa_local.calibrate.measure import Bench as CalibrateBench
from swaa_local.calibrate.request import CalibrateRequest
from swaa_local.calibrate.request import config as calibrate_config
from swaa_local.engine.adapter import AdapterWarning
from swaa_local.engine.options import EngineOptions
from swaa_local.errors import GGUFError
from swaa_local.model_file.adapter import Adapter
from tests.support.adapters import merged, write_adapter
from tests.support.engine import worst_ratio
from tests.support.masks import Sched
from tests.support.program import environment, fails, run, succeeds
from tests.support.reference_numpy import forward
from tests.support.serving import serving
from tests.support.tiny import (
    ALWAYS,
    FULL,
    PREFILL,
    ScheduleKeys,
    TinyShape,
    random_tokens,
    tiny_weights,
    write_tiny_gguf,
)

pytestmark = pytest.mark.usefixtures("engine")

SCALE = 0.5
STORED = ScheduleKeys(24, 4, (PREFILL, FULL, ALWAYS, PREFILL))
SCHEDULES = {
    "the file's": STORED,
    "full": None,
    "windowed prefill": Sched(24, 4, (PREFILL,) * 4),
    "rings": Sched(16, 2, (ALWAYS,) * 4),
}
TOKENS, PROMPT = random_tokens(200), 180
KWARGS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return tiny_weights(TinyShape())


@pytest.fixture(scope="module")
def model(tiny_model_factory) -> Path:
    return tiny_model_factory(schedule=STORED, n_ctx_train=8192)


@pytest.fixture(scope="module")
def merged_model(tmp_path_factory, weights) -> Path:
    """The model with SCALE times the adapter in its weights."""
    path = tmp_path_factory.mktemp("merged") / "merged.gguf"
    return write_tiny_gguf(path, schedule=STORED, n_ctx_train=8192, weights=merged(weights, scale=SCALE))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, weights) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "a:dapter.gguf", weights)


def tuned(path: Path, weights: dict[str, np.ndarray], schedule: Any, base: dict[str, np.ndarray]) -> Path:
    """As `swaa-local tune` leaves it: with its schedule and its base."""
    fingerprint = hashlib.sha256(base["output_norm.weight"].astype(np.float32).tobytes()).hexdigest()
    texts = {"swaa_tune.base": "org/base", "swaa_tune.base_sha256": fingerprint, "swaa_tune.command": "swaa-local tune"}
    return write_adapter(path, weights, schedule=schedule, texts=texts)


def config(schedule: Any) -> Any:
    return False if schedule is None else Schedule(schedule.window, schedule.sinks, tuple(schedule.layer_modes))


# Llama


def test_an_adapter_under_every_schedule(model, adapter, weights):
    """Set one after the other on one model: each makes the context anew, and the adapter stays."""
    llm = Llama(
        str(model),
        lora_path=str(adapter),
        lora_scale=SCALE,
        logits_all=True,
        flash_attn=False,
        type_k=0,
        type_v=0,
        **KWARGS,
    )
    both = merged(weights, scale=SCALE)
    for name, schedule in [*SCHEDULES.items(), *SCHEDULES.items()]:
        llm.set_schedule(None if name == "the file's" else config(schedule))
        llm.eval(TOKENS[:PROMPT])
        for token in TOKENS[PROMPT:]:
            llm.eval([token], decode=True)
        sched = Sched(*STORED[:3]) if name == "the file's" else schedule
        want = forward(TOKENS, sched, PROMPT, weights=both)
        assert worst_ratio(llm.scores[: len(TOKENS)], want) < 1e-3, name
        assert worst_ratio(forward(TOKENS, sched, PROMPT, weights=weights), want) > 0.2, name
    llm.close()


def warned(model: Path, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Llama(str(model), **KWARGS, **kwargs).close()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught if issubclass(warning.category, AdapterWarning)]


def test_another_schedule_or_another_base_is_told_with_both_names(model, tiny_model_factory, weights, tmp_path):
    mine = tuned(tmp_path / "mine.gguf", weights, STORED, weights)
    assert warned(model, lora_path=str(mine)) == []
    said = warned(model, lora_path=str(mine), swaa=SWAAConfig(8))
    assert said == [
        "the LoRA adapter mine.gguf was tuned for the schedule w24 k4 fadec in 0,3 1, and runs with w8 k0",
    ]
    [said] = warned(model, lora_path=str(mine), swaa=False)
    assert said.endswith("runs with full attention")
    other = tiny_model_factory(schedule=STORED, seed=3)
    [said] = warned(other, lora_path=str(mine))
    assert said == f"the LoRA adapter mine.gguf was tuned on org/base, and this is another model: {other.name} (tiny)"
    # with no schedule of its own, it was tuned with full attention
    full = tuned(tmp_path / "full.gguf", weights, None, weights)
    assert warned(model, lora_path=str(full), swaa=False) == []
    [said] = warned(model, lora_path=str(full))
    assert "was tuned for the schedule full attention, and runs with w24" in said


def test_an_adapter_of_other_origin_says_nothing(model, adapter):
    assert warned(model, lora_path=str(adapter)) == []


def test_set_schedule_tells_too(model, weights, tmp_path):
    llm = Llama(str(model), lora_path=str(tuned(tmp_path / "mine.gguf", weights, STORED, weights)), **KWARGS)
    with pytest.warns(AdapterWarning, match="runs with w16 k0"):
        llm.set_schedule(SWAAConfig(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.set_schedule(None)
    llm.close()


# The file's name and the scale


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("a.gguf:0.5", "a.gguf", 0.5),
        ("a.gguf:-2", "a.gguf", -2.0),
        ("C:a.gguf", "C:a.gguf", 1.0),
    ],
)
def test_file_and_scale(text, path, scale):
    assert Adapter.parse(text) == Adapter(Path(path), scale)


def test_a_file_that_is_called_so_is_meant(tmp_path):
    path = tmp_path / "a:0.5"
    path.touch()
    assert Adapter.parse(str(path)) == Adapter(path)
    assert Adapter.parse(f"{path}:0.25") == Adapter(path, 0.25)
    assert Adapter.parse_list(f"{path},b.gguf:2") == (Adapter(path), Adapter(Path("b.gguf"), 2.0))
    with pytest.raises(GGUFError, match="a finite number, not nan"):
        Adapter.parse("a.gguf:nan")


# The commands


def chat(model: Path, *options: object) -> str:
    return succeeds("chat", model, "-p", "What is it?", "-n", 24, "--temp", 0, "-t", 1, "-c", 512, *options)


@pytest.mark.parametrize("schedule", [(), ("--no-swaa",), ("--window", 16)], ids=["file", "full", "rings"])
def test_chat(model, merged_model, adapter, schedule):
    assert chat(model, "--lora", f"{adapter}:{SCALE}", *schedule) == chat(merged_model, *schedule)
    assert chat(model, *schedule) != chat(merged_model, *schedule)


def test_chat_notes_another_schedule(model, weights, tmp_path):
    mine = tuned(tmp_path / "mine.gguf", weights, STORED, weights)
    done = run("chat", model, "--lora", mine, "--window", 8, "-p", "hm", "-n", 2, "-t", 1, "-c", 512)
    assert "was tuned for the schedule w24 k4 fadec in 0,3 1, and runs with w8 k0" in done.stderr
    done = run("chat", model, "--lora", mine, "-p", "hm", "-n", 2, "-t", 1, "-c", 512)
    assert "was tuned" not in done.stderr


def test_an_adapter_of_another_architecture_names_both(model, weights, tmp_path):
    other = write_adapter(tmp_path / "other.gguf", weights, arch="llama")
    said = fails("chat", model, "--lora", other, "-p", "hm", "-t", 1, "-c", 512)
    assert "does not load: it is for a model of architecture llama, and this is qwen3" in said


@pytest.mark.parametrize("command", ["chat", "bench", "eval", "serve"])
def test_what_is_no_adapter_is_an_error(command, model, tmp_path):
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    options: dict[str, tuple[object, ...]] = {"chat": ("-p", "hm"), "serve": ("--port", 0)}
    for what, said in ((model, "is of type model and not a LoRA adapter"), (tmp_path / "none.gguf", "No such file")):
        assert said in fails(command, model, "--lora", what, *options.get(command, ()))
    assert "an adapter as PEFT writes it" in fails(command, model, "--lora", peft, *options.get(command, ()))


def test_bench_measures_with_the_adapter(model, merged_model, adapter):
    setting = Setting("file", "scheduled", config(STORED), 512, 512, False, "f32", "f32")

    def logits(path: Path, lora: Adapter | None) -> np.ndarray:
        options = EngineOptions(n_threads=1, lora=lora)
        with BenchModel(path, options) as bench, bench.context(setting, 256) as context:
            context.prefill(100)
            return context.logits().copy()

    want = logits(merged_model, None)
    assert worst_ratio(logits(model, Adapter(adapter, SCALE)), want) < 1e-3
    assert worst_ratio(logits(model, None), want) > 0.1


def test_bench_says_with_which(model, adapter, weights, tmp_path):
    options = ("-p", 64, "-n", 0, "-r", 1, "-t", 1, "--no-limit", "-fa", "on")
    table = succeeds("bench", model, "--lora", f"{adapter}:{SCALE}", *options)
    assert f"LoRA adapter {adapter}:{SCALE}" in table
    document = json.loads(succeeds("bench", model, "--lora", f"{adapter}:{SCALE}", *options, "-o", "json"))
    assert document["settings"]["lora"] == f"{adapter}:{SCALE}"
    mine = tuned(tmp_path / "mine.gguf", weights, STORED, weights)
    assert "was tuned" not in run("bench", model, "--lora", mine, *options).stderr  # file is among the variants
    assert (
        "and runs with full attention or w8 k0"
        in run("bench", model, "--lora", mine, *options, "--variants", "full,w8 k0").stderr
    )


def answers(results: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in results.read_bytes().splitlines()]
    return [(line["variant"], line["answer"]) for line in lines if line["kind"] == "answer"]


def test_eval_asks_with_the_adapter(model, merged_model, adapter, tmp_path):
    options = ("--task", "niah_single_1", "--length", 700, "-n", 2, "--max-tokens", 12, "-t", 1)
    options += ("--variants", "full,file,w32 k2")
    found = {}
    for name, path, lora in (
        ("adapter", model, ("--lora", f"{adapter}:{SCALE}")),
        ("merged", merged_model, ()),
        ("plain", model, ()),
    ):
        succeeds("eval", path, *options, *lora, "--results", tmp_path / f"{name}.jsonl")
        found[name] = answers(tmp_path / f"{name}.jsonl")
    assert found["adapter"] == found["merged"] != found["plain"]
    # answers with and without it are not mixed
    error = fails("eval", model, *options, "--results", tmp_path / "adapter.jsonl")
    assert "is of another configuration: lora was " in error


def test_calibrate_measures_with_the_adapter(model, merged_model, adapter):
    """Its trials are those of the model with the adapter, and are not mixed with others."""
    prompt, answer = random_tokens(100), random_tokens(8, seed=2)

    def score(path: Path, lora: Adapter | None) -> np.ndarray:
        with closing(CalibrateBench(path, 512, EngineOptions(n_threads=1, lora=lora))) as bench:
            return bench.llm.score(prompt, answer).logprobs

    want = score(merged_model, None)
    np.testing.assert_allclose(score(model, Adapter(adapter, SCALE)), want, atol=0.05)
    assert np.abs(score(model, None) - want).max() > 0.5
    request = CalibrateRequest(model, model, engine=EngineOptions(lora=Adapter(adapter, SCALE)))
    assert calibrate_config(request, 4096, [256])["lora"] == f"{adapter}:{SCALE}"
    assert "lora" not in calibrate_config(CalibrateRequest(model, model), 4096, [256])


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_serve(model, adapter, weights, tmp_path, scale):
    plain = adapter.with_name("adapter.gguf")
    plain.write_bytes(adapter.read_bytes())
    both = write_tiny_gguf(tmp_path / "m.gguf", schedule=STORED, weights=merged(weights, scale=scale))
    prompt = random_tokens(150, seed=4)
    llm = Llama(str(both), n_ctx=512, n_batch=64, n_ubatch=32, n_threads=1, n_threads_batch=1)
    want = [int(token) for _, token in zip(range(16), llm.generate(prompt, temp=0.0), strict=False)]
    llm.close()
    sizes = ("-c", 512, "-np", 1, "-b", 64, "-ub", 32)
    with serving(model, *sizes, "--lora", plain if scale == 1 else f"{plain}:{scale}") as server:
        assert server.complete(prompt, 16)["tokens"] == want
        assert [each["scale"] for each in server.get("/lora-adapters")[1]] == [scale]


def test_serve_notes_another_schedule(model, weights, tmp_path):
    mine = tuned(tmp_path / "mine.gguf", weights, STORED, weights)
    with serving(model, "-c", 512, "--lora", mine, "--no-swaa") as server:
        assert "was tuned for the schedule w24 k4 fadec in 0,3 1, and runs with full attention" in server.log


def test_serve_takes_no_scale_for_a_name_with_a_colon(model, adapter):
    assert "whose name has a colon; rename it" in fails("serve", model, "--port", 0, "--lora", f"{adapter}:{SCALE}")


# convert --lora


def test_convert_says_what_a_gguf_cannot_do(model, adapter, tmp_path):
    error = fails("convert", model, "-o", tmp_path / "o.gguf", "--window", 8, "--lora", adapter)
    assert "is a GGUF, and convert does not change its weights; give chat, serve, bench or eval --lora" in error


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


def test_convert_merges_as_peft_does(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is converted")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed, so nothing is converted")
    pytest.importorskip(
        "sentencepiece", reason="sentencepiece is not installed, so transformers cannot be compared with"
    )
    peft = pytest.importorskip("peft", reason="PEFT is not installed, so nothing is compared with PyTorch")
    from tests.support.tiny_hf import converter_folder, write_checkpoint

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = write_checkpoint(tmp_path / "base", "llama")  # of which the converter changes the order of rows
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    peft_folder, adapter = tmp_path / "peft", tmp_path / "adapter.gguf"
    model.save_pretrained(peft_folder)
    done = subprocess.run(
        [
            sys.executable,
            converter_folder() / "convert_lora_to_gguf.py",
            peft_folder,
            "--base",
            base,
            "--outfile",
            adapter,
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling = {name: 0.25 * value for name, value in module.scaling.items()}
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in base.glob("tokenizer*"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    schedule = ("--window", 24, "--fa-decode")
    for name, source, options in (
        ("ours", base, (*schedule, "--lora", f"{adapter}:0.25")),
        ("plain", base, ()),
        ("theirs", tmp_path / "merged", ()),
    ):
        succeeds("convert", source, "-o", tmp_path / f"{name}.gguf", "--outtype", "f32", *options)
    ours, theirs, plain = (tensors(tmp_path / f"{name}.gguf") for name in ("ours", "theirs", "plain"))
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not np.array_equal(ours[name], plain[name])}
    assert changed == {f"blk.{i}.attn_{name}.weight" for i in range(4) for name in "qkv"}
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
    # quantized after the merge
    succeeds("convert", base, "-o", tmp_path / "q8.gguf", "--outtype", "q8_0", "--lora", f"{adapter}:0.25")
    quantized = tensors(tmp_path / "q8.gguf")["blk.0.attn_q.weight"]
    assert (
        np.abs(quantized - ours["blk.0.attn_q.weight"]).max()
        < 0.1 * np.abs(quantized - plain["blk.0.attn_q.weight"]).max()
    )
    # another model's adapter
    other = write_checkpoint(tmp_path / "other", "qwen3, wide heads")
    error = fails("convert", other, "-o", tmp_path / "o.gguf", "--lora", adapter)
    assert re.search(
        r"changes blk\.0\.attn_\w\.weight with the shape \(\d+, \d+\), .* it was made for another model", error
    )
    assert not (tmp_path / "o.gguf").exists()
