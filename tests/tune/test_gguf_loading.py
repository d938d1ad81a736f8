"""A GGUF that is read quickly is what transformers reads by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed, so nothing is tuned")
pytest.importorskip("transformers", reason="transformers is not installed, so nothing is tuned")

import gguf
import torch
import transformers

from swaa_local.model_file.header import GGUFFile, encode_tensor_info
from swaa_local.tune.gguf_loading import quick_gguf
from swaa_local.tune.request import TuneError
from tests.support.program import ROOT

pytestmark = pytest.mark.usefixtures("engine")

NEEDLE = ROOT / "swaa_local/assets/needle.gguf"


def load(path: Path):
    """Tokenizer and model. transformers' table of keys lacks the size of heads in some releases."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.head_dim = 64
    return (
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
        transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config),
    )


def test_it_is_what_transformers_reads():
    with quick_gguf(NEEDLE):
        tokenizer, model = load(NEEDLE)
    their_tokenizer, theirs = load(NEEDLE)
    assert tokenizer.get_vocab() == their_tokenizer.get_vocab()
    assert tokenizer.special_tokens_map == their_tokenizer.special_tokens_map
    assert tokenizer.chat_template == their_tokenizer.chat_template
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    assert config.items() <= theirs.config.to_dict().items()
    weights = theirs.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_gguf_py_is_given_back():
    names = ("GGUFReader", "dequantize", "get_tensor_name_map")
    before = [getattr(gguf, name) for name in names]
    with quick_gguf(NEEDLE):
        assert not any(getattr(gguf, name) is function for name, function in zip(names, before, strict=True))
    assert [getattr(gguf, name) for name in names] == before
    with pytest.raises(KeyError), quick_gguf(NEEDLE):
        raise KeyError
    assert [getattr(gguf, name) for name in names] == before


def test_another_file_is_read_by_gguf_py(tmp_path):
    reader = type(gguf.GGUFReader(NEEDLE))
    other = tmp_path / "other.gguf"
    other.write_bytes(NEEDLE.read_bytes())
    with quick_gguf(NEEDLE):
        assert isinstance(gguf.GGUFReader(other), reader)
        assert not isinstance(gguf.GGUFReader(NEEDLE), reader)


def test_a_type_that_nobody_knows_is_named(tmp_path):
    with GGUFFile.open(NEEDLE) as file:
        first = file.tensors[0]
        end = file.tensor_info_span[0] + len(encode_tensor_info(first))
    data = bytearray(NEEDLE.read_bytes())
    data[end - 12 : end - 8] = (4711).to_bytes(4, "little")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(TuneError, match=f"tensor '{first.name}' cannot be read: 4711"), quick_gguf(broken):
        pass
