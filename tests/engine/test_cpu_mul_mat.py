"""Quantized weights by several columns on the CPU, against numpy over the values that the weights hold.

ggml quantizes the columns, to 8 bits in blocks of 32; the oracle does as well, by gguf-py.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GT

from tests.support import flash_op as op

pytestmark = pytest.mark.usefixtures("engine")

TYPES = [GT.Q4_0, GT.Q4_1, GT.Q5_0, GT.Q5_1, GT.Q8_0]
_mul_mat = op._declare("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)


def product(weights: np.ndarray, kind: GT, columns: np.ndarray, n_threads: int = 1) -> np.ndarray:
    """weights: [row][k], packed. columns: [column][k]. Returns [column][row]."""
    op._cpu_init()
    context = op._init(op._InitParams(64 * 2**20, None, False))
    try:
        n_rows, (n_columns, k) = len(weights), columns.shape
        w = op._new_tensor(context, kind, 2, (c_int64 * 2)(k, n_rows))
        x = op._new_tensor(context, GT.F32, 2, (c_int64 * 2)(k, n_columns))
        for tensor, array in ((w, weights), (x, columns)):
            ctypes.memmove(op._data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        out = _mul_mat(context, w, x)
        graph = op._new_graph(context)
        op._expand(graph, out)
        assert op._compute(context, graph, n_threads) == 0
        got = np.ctypeslib.as_array(ctypes.cast(op._data(out), POINTER(c_float)), (n_columns, n_rows))
        return got.copy()
    finally:
        op._free(context)


def operands(kind: GT, n_rows: int, k: int, n_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, packed, of all signs and with a mean; columns whose blocks differ in size."""
    rng = np.random.default_rng(n_rows + k + n_columns)
    weights = rng.standard_normal((n_rows, k)) + 0.3
    columns = rng.standard_normal((n_columns, k)) * 2.0 ** rng.integers(-6, 6, (n_columns, k // 32)).repeat(32, axis=1)
    return op.pack(weights.astype(np.float32), kind), columns.astype(np.float32)


def expected(weights: np.ndarray, kind: GT, columns: np.ndarray) -> np.ndarray:
    return op.unpack(op.pack(columns, GT.Q8_0), GT.Q8_0) @ op.unpack(weights, kind).T


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_columns", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 200])
def test_any_number_of_columns(kind, n_columns):
    weights, columns = operands(kind, 70, 576, n_columns)
    assert op.nmse(product(weights, kind, columns), expected(weights, kind, columns)) < 1e-5


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n_rows", "k"), [(1, 32), (4, 64), (33, 992), (64, 1024), (65, 1056), (200, 3104)])
def test_any_size(kind, n_rows, k):
    """Of more blocks than are taken at a time, with a rest or without; and more columns than rows."""
    weights, columns = operands(kind, n_rows, k, 5)
    assert op.nmse(product(weights, kind, columns), expected(weights, kind, columns)) < 1e-5


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_the_largest_values(kind):
    """No sum of products saturates."""
    weights, columns = operands(kind, 64, 256, 6)
    weights = op.pack(np.sign(op.unpack(weights, kind)).astype(np.float32), kind)
    columns = np.sign(columns)
    assert op.nmse(product(weights, kind, columns), expected(weights, kind, columns)) < 1e-5


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_column_does_not_depend_on_its_neighbours(kind):
    weights, columns = operands(kind, 128, 512, 8)
    together = product(weights, kind, columns)
    for n in (1, 2, 3, 5):
        np.testing.assert_allclose(product(weights, kind, columns[:n]), together[:n], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_the_same_for_any_number_of_threads(kind):
    for n_rows, n_columns in ((300, 5), (300, 150), (8, 150), (1, 9)):
        weights, columns = operands(kind, n_rows, 512, n_columns)
        one = product(weights, kind, columns)
        assert op.nmse(one, expected(weights, kind, columns)) < 1e-5
        for n_threads in (2, 3, 7):
            assert np.array_equal(product(weights, kind, columns, n_threads=n_threads), one)
