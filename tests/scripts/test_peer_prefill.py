"""scripts/peer_prefill.py: the peer has the weights of the same shape, and is timed."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so no peer can be timed")
pytest.importorskip("transformers", reason="transformers is not installed, so no peer can be timed")

import torch
import transformers

from make_model import SHAPES, tensors
from peer_prefill import config_of
from tests.support.program import ROOT, environment


@pytest.mark.parametrize("name", ["tiny", "qwen3-4b", "llama3.1-8b"])
def test_it_has_as_many_weights(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(SHAPES[name], 4096))
    ours = sum(math.prod(tensor.dims) for tensor in tensors(SHAPES[name], "f16") if "rope" not in tensor.name)
    assert sum(parameter.numel() for parameter in model.parameters()) == ours


def test_it_reads_and_says_how_fast():
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/peer_prefill.py",
            *["--shape", "tiny", "--length", "64,128", "-r", "2", "--device", "cpu"],
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert re.search(r"^Tiny shape, transformers [\d.]+, PyTorch \S+, CPU$", done.stdout, re.M)
    assert re.findall(r"^\| (\d+) \| [\d.]+ \| [\d,]+ \| [\d,]+-[\d,]+ \|$", done.stdout, re.M) == ["64", "128"]
