"""Quantized weights by several columns on the CPU, against numpy over the values that the weights hold.

ggml quantizes the columns, to 8 bits in blocks of 32 (256 for weights of Q4_K and Q6_K); the oracle does as well.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GT
from llama_cpp import llama_cpp as C

from tests.support import flash_op as op
from tests.support.engine import GPU_LAYERS, EngineModel, cpu_features, quantize
from tests.support.tiny import write_tiny_gguf

pytestmark = pytest.mark.usefixtures("engine")
x86 = pytest.mark.skipif(cpu_features().get("AVX2") != "1", reason="the kernel for quantized weights is for AVX2")

K_TYPES = [GT.Q4_K, GT.Q6_K]
TYPES = [GT.Q4_0, GT.Q4_1, GT.Q5_0, GT.Q5_1, GT.Q8_0, *K_TYPES]
_mul_mat = op._declare("ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
_mul_mat_id = op._declare("ggml_mul_mat_id", c_void_p, *[c_void_p] * 4)
N_EXPERTS, N_USED = 8, 3


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


def experts_product(
    weights: np.ndarray, kind: GT, columns: np.ndarray, ids: np.ndarray, n_threads: int = 1, *, by_expert: bool = False
) -> np.ndarray:
    """weights: [expert][row][k], packed. columns: [token][1 or chosen][k]; ids: [token][chosen].

    Returns [token][chosen][row].
    by_expert: the columns lie in memory as [chosen][token][k].
    """
    op._cpu_init()
    context = op._init(op._InitParams(64 * 2**20, None, False))
    try:
        n_rows, k = weights.shape[1], columns.shape[2]
        w = op._new_tensor(context, kind, 3, (c_int64 * 3)(k, n_rows, len(weights)))
        lying = np.ascontiguousarray(columns.swapaxes(0, 1) if by_expert else columns)
        x = op._new_tensor(context, GT.F32, 3, (c_int64 * 3)(*reversed(lying.shape)))
        i = op._new_tensor(context, GT.I32, 2, (c_int64 * 2)(*reversed(ids.shape)))
        for tensor, array in ((w, weights), (x, lying), (i, ids.astype(np.int32))):
            ctypes.memmove(op._data(tensor), array.ctypes.data, array.nbytes)
        out = _mul_mat_id(context, w, op._permute(context, x, 0, 2, 1, 3) if by_expert else x, i)
        graph = op._new_graph(context)
        op._expand(graph, out)
        assert op._compute(context, graph, n_threads) == 0
        shape = (*ids.shape, n_rows)
        return np.ctypeslib.as_array(ctypes.cast(op._data(out), POINTER(c_float)), shape).copy()
    finally:
        op._free(context)


def experts(kind: GT, n_rows: int, k: int, n_tokens: int, n_columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, columns and ids: every token chooses expert 0, only the first one 1, none 7, some each of the others."""
    rng = np.random.default_rng(n_tokens + n_rows)
    weights, columns = operands(kind, N_EXPERTS * n_rows, k, n_tokens * n_columns)
    others = [rng.permutation(np.arange(2, N_EXPERTS - 1))[: N_USED - 1] for _ in range(n_tokens)]
    ids = np.array([rng.permutation([0, *chosen]) for chosen in others])
    ids[0] = [2, 1, 0]
    return weights.reshape(N_EXPERTS, n_rows, -1), columns.reshape(n_tokens, n_columns, k), ids


def expected_of_experts(weights: np.ndarray, kind: GT, columns: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.array(
        [
            [expected(weights[e], kind, columns[t, c % columns.shape[1]][None])[0] for c, e in enumerate(chosen)]
            for t, chosen in enumerate(ids)
        ]
    )


def operands(kind: GT, n_rows: int, k: int, n_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, packed, of all signs and with a mean; columns whose blocks differ in size."""
    rng = np.random.default_rng(n_rows + k + n_columns)
    columns = rng.standard_normal((n_columns, k)) * 2.0 ** rng.integers(-6, 6, (n_columns, k // 32)).repeat(32, axis=1)
    if kind in K_TYPES:
        return random_blocks(rng, kind, n_rows, k), columns.astype(np.float32)
    weights = rng.standard_normal((n_rows, k)) + 0.3
    return op.pack(weights.astype(np.float32), kind), columns.astype(np.float32)


def random_blocks(rng: np.random.Generator, kind: GT, n_rows: int, k: int) -> np.ndarray:
    """Blocks of 256 with any bits, but for their scales, which gguf-py reads and cannot write."""
    n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (n_rows, k // 256, n_bytes), np.uint8)
    at = (0, 2) if kind == GT.Q4_K else (n_bytes - 2,)
    for i in at:
        scales = rng.uniform(1e-3, 1e-2, (n_rows, k // 256, 1)).astype(np.float16)
        blocks[..., i : i + 2] = scales.view(np.uint8)
    return blocks.reshape(n_rows, -1)


def expected(weights: np.ndarray, kind: GT, columns: np.ndarray) -> np.ndarray:
    if kind in K_TYPES:
        rounded = rounded_to_8_bits(columns.reshape(-1, 256)).reshape(columns.shape)
    else:
        rounded = op.unpack(op.pack(columns, GT.Q8_0), GT.Q8_0)
    return rounded @ op.unpack(weights, kind).T


def rounded_to_8_bits(blocks: np.ndarray) -> np.ndarray:
    """[block][256]: each a multiple of its scale, which takes the largest value to -127."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-127)
    return np.minimum(127, np.rint(blocks / scale)) * scale


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_columns", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 200])
def test_any_number_of_columns(kind, n_columns):
    weights, columns = operands(kind, 70, 768 if kind in K_TYPES else 576, n_columns)
    assert op.nmse(product(weights, kind, columns), expected(weights, kind, columns)) < 1e-5


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n_rows", "k"), [(1, 32), (4, 64), (33, 992), (64, 1024), (65, 1056), (200, 3104)])
def test_any_size(kind, n_rows, k):
    """Of more blocks than are taken at a time, with a rest or without; and more columns than rows."""
    k = -(-k // 256) * 256 if kind in K_TYPES else k
    weights, columns = operands(kind, n_rows, k, 5)
    assert op.nmse(product(weights, kind, columns), expected(weights, kind, columns)) < 1e-5


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_the_largest_values(kind):
    """No sum of products saturates."""
    weights, columns = operands(kind, 64, 256, 6)
    if kind in K_TYPES:
        scales = slice(0, 16) if kind == GT.Q4_K else slice(192, 210)
        weights = np.where(np.isin(np.arange(weights.shape[1]), np.r_[scales]), weights, np.uint8(0xFF))
    else:
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


# gate and up: all experts of a token by the same column; down: each by its own
@pytest.mark.parametrize("n_columns", [1, N_USED], ids=["one column a token", "one column an expert"])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 5, 8, 9, 13, 17, 40])
def test_experts(kind, n_tokens, n_columns):
    weights, columns, ids = experts(kind, 70, 768 if kind in K_TYPES else 608, n_tokens, n_columns)
    want = expected_of_experts(weights, kind, columns, ids)
    one = experts_product(weights, kind, columns, ids)
    assert op.nmse(one, want) < 1e-5
    for n_threads in (2, 3):
        assert np.array_equal(experts_product(weights, kind, columns, ids, n_threads), one)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_rows", [1, 5, 16, 65, 200])
def test_experts_of_any_size(kind, n_rows):
    """More threads than rows, and several chunks; columns that do not lie one behind another."""
    weights, columns, ids = experts(kind, n_rows, 256, 6, N_USED)
    want = expected_of_experts(weights, kind, columns, ids)
    for n_threads in (1, 3):
        for by_expert in (False, True):
            got = experts_product(weights, kind, columns, ids, n_threads, by_expert=by_expert)
            assert op.nmse(got, want) < 1e-5


@x86
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_token_gets_the_same_bits_of_its_experts_beside_others(kind):
    weights, columns, ids = experts(kind, 70, 768, 8, 1)
    together = experts_product(weights, kind, columns, ids)
    for t in range(len(ids)):
        assert np.array_equal(experts_product(weights, kind, columns[t : t + 1], ids[t : t + 1])[0], together[t])


@x86
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_an_expert_is_computed_as_a_matrix_is(kind):
    """By the same kernel, so to the same bits: other kernels add in other orders."""
    weights, columns, ids = experts(kind, 70, 768, 8, 1)
    got = experts_product(weights, kind, columns, ids)
    for t, chosen in enumerate(ids):
        for c, e in enumerate(chosen):
            assert np.array_equal(got[t, c], product(weights[e], kind, columns[t])[0])


# x86's repacked products of Q4_K with many columns are slower than those of the weights as they are.
@pytest.mark.skipif(GPU_LAYERS > 0, reason="weights on a GPU are not repacked")
def test_weights_that_are_read_faster_as_they_are_are_not_repacked(tmp_path: Path):
    has = cpu_features()
    if has.get("AVX2") != "1" or "AMX_INT8" in has:
        pytest.skip("for x86 with AVX2 and without AMX, whose weights have a form of their own")
    plain = write_tiny_gguf(tmp_path / "plain.gguf", n_embd=256, n_ff=512)
    repacked = {}
    for name in ("Q4_0", "Q4_K_S"):
        quantize(plain, tmp_path / f"{name}.gguf", getattr(C, f"LLAMA_FTYPE_MOSTLY_{name}"))
        with EngineModel(tmp_path / f"{name}.gguf") as model:
            repacked[name] = "CPU_REPACK model buffer size" in model.log
    assert repacked == {"Q4_0": True, "Q4_K_S": False}
