"""The engine's dequantization against gguf-py's, which is of numpy."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from swaa_local.engine.dequantize import dequantize, is_quantized

pytestmark = pytest.mark.usefixtures("engine")

PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
KINDS = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits and kind.name not in PLAIN]


def some_blocks(kind: gguf.GGMLQuantizationType, rows: int, n_block: int) -> np.ndarray:
    """Any bytes are blocks; those in which a scale is no number, or a huge one, are left out."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    made = np.random.default_rng(int(kind)).integers(0, 256, (rows * n_block * 8, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(made, kind)
    sane = made[np.isfinite(values).all(1) & (abs(values) < 1e4).all(1)]
    assert len(sane) >= rows * n_block
    return sane[: rows * n_block].reshape(rows, n_block * size)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_is_gguf_s_to_the_bit(kind):
    blocks = some_blocks(kind, 6, 5)
    assert is_quantized(kind)
    np.testing.assert_array_equal(dequantize(blocks, kind), gguf.quants.dequantize(blocks, kind))


def test_chunks_of_threads_join(monkeypatch):
    monkeypatch.setattr("swaa_local.engine.dequantize._CHUNK", 96)
    kind = gguf.GGMLQuantizationType.Q4_0
    blocks = some_blocks(kind, 7, 11).reshape(7, 1, -1)
    found = dequantize(blocks, kind)
    assert found.shape == (7, 1, 11 * 32)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(blocks, kind))


def test_plain_types_and_those_of_later_engines_are_not_quantized():
    assert not any(is_quantized(gguf.GGMLQuantizationType[name]) for name in PLAIN)
    assert not is_quantized(100_000)


def test_half_a_block_is_an_error():
    with pytest.raises(ValueError, match="17 bytes are not whole blocks of 18"):
        dequantize(np.zeros((2, 17), dtype=np.uint8), gguf.GGMLQuantizationType.Q4_0)
