"""scripts/make_model.py from outside: its files load, say the same for a seed, and are never half there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import gguf
import pytest

from tests.support.program import ROOT, environment, succeeds

SCRIPT = [sys.executable, str(ROOT / "scripts" / "make_model.py")]
# Parameters of the whole models as published, in billions, and one of their dimensions: layers, feed forward.
PUBLISHED = {
    "qwen3-0.6b": (0.596, 28, 3072),
    "qwen3-4b": (4.022, 36, 9728),
    "llama3.1-8b": (8.030, 32, 14336),
    "qwen3-30b-a3b": (30.532, 48, 768),
}


def make(*args: object, code: int = 0) -> str:
    done = subprocess.run([*SCRIPT, *map(str, args)], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", PUBLISHED)
def test_the_shapes_are_the_published_ones(shape):
    from make_model import SHAPES, tensors

    billions, n_layer, n_ff = PUBLISHED[shape]
    made = SHAPES[shape]
    assert (made.n_layer, made.n_ff) == (n_layer, n_ff)
    n_parameters = 0
    for tensor in tensors(made, "f16"):
        if tensor.name != "rope_freqs.weight":
            n = 1
            for dim in tensor.dims:
                n *= dim
            n_parameters += n
    assert n_parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("shape", "type_name"),
    [
        ("qwen3-0.6b", "q4_0"),
        ("qwen3-4b", "q4_0"),
        ("llama3.1-8b", "q4_0"),
        ("qwen3-30b-a3b", "q4_0"),
        ("tiny", "f16"),
        ("tiny", "q8_0"),
    ],
)
def test_each_shape_loads_and_decodes(shape, type_name, tmp_path):
    import numpy as np

    from swaa_local import Llama

    path = tmp_path / "m.gguf"
    make("--shape", shape, "--type", type_name, "--layers", 1, "-o", path)
    llm = Llama(str(path), n_ctx=256, n_batch=32, n_ubatch=32, n_threads=1, n_threads_batch=1, logits_all=True)
    try:
        tokens = llm.tokenize(b"Hello, \xc3\xa9 world", add_bos=False)
        assert llm.detokenize(tokens) == b"Hello, \xc3\xa9 world"
        llm.eval(tokens)
        llm.eval([tokens[0]], decode=True)
        logits = llm.scores[: len(tokens) + 1]
        assert np.isfinite(logits).all()
        assert logits.std() > 0
        assert abs(logits[0] - logits[-1]).max() > 0  # neither all zero nor blind to its input
    finally:
        llm.close()


def test_the_same_seed_gives_the_same_file(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make("--shape", "tiny", "--seed", seed, "-o", tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "f16"])
def test_weights_are_finite_and_of_the_size_that_keeps_activations(type_name, tmp_path):
    path = tmp_path / "m.gguf"
    make("--shape", "tiny", "--type", type_name, "-o", path)
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 2:
            # Halves have a power of two as their scale.
            assert 0.5 < (values**2).mean() * values.shape[1] < 2, tensor.name


@pytest.mark.parametrize(
    "schedule",
    [
        ("--window", 64, "--sinks", 4, "--full-layers", "1::2", "--fa-decode"),
        ("--window", 64, "--fa-decode", "--tail", 9),
        ("--preset", "speed"),
        ("--preset", "speed", "--tail", 9),
    ],
    ids=str,
)
def test_a_schedule_is_stored_as_convert_stores_it(tmp_path, schedule):
    path = tmp_path / "m.gguf"
    make("--shape", "tiny", "-o", path, "--ctx", 1000, *schedule)
    shown = json.loads(succeeds("inspect", path, "--json"))
    plain, converted = tmp_path / "plain.gguf", tmp_path / "converted.gguf"
    make("--shape", "tiny", "-o", plain, "--ctx", 1000)
    succeeds("convert", plain, "-o", converted, *schedule)
    assert shown["schedule"] == json.loads(succeeds("inspect", converted, "--json"))["schedule"] is not None
    assert "1000" in json.dumps(shown)


def test_what_makes_no_sense_is_refused_and_leaves_no_file(tmp_path):
    path = tmp_path / "m.gguf"
    for args, code, reason in (
        (("--layers", 5), 1, "Tiny has 4 layers; --layers 5 is more"),
        (("--sinks", 4), 2, "needs a window"),
        (("--tail", 4), 2, "needs a window"),
        (("--window", 8, "--tail", 4), 1, "--tail 4 has no effect without FA decode"),
        (("--window", 8, "--fa-decode", "--tail", -1), 1, "-1"),
        (("--window", 8, "--full-layers", "4"), 1, "past the model's 4 layers"),
        (("--preset", "quality", "--window", 8), 2, "a preset is a whole schedule"),
    ):
        assert reason in make("--shape", "tiny", "-o", path, *args, code=code)
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    assert "m.gguf exists; pass --force" in make("--shape", "tiny", "-o", path, code=1)
    assert path.read_text() == "mine"
    make("--shape", "tiny", "-o", path, "--force")
    assert path.read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(number, tmp_path):
    process = subprocess.Popen(
        [*SCRIPT, "--shape", "qwen3-4b", "-o", str(tmp_path / "m.gguf")],
        env=environment(),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while not list(tmp_path.glob(".swaa-local-*/*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, error
    assert b"Traceback" not in error
    assert list(tmp_path.iterdir()) == []
