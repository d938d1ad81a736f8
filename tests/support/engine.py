"""A thin helper over llama.cpp's C API for the engine tests: models, contexts, batches, memory, state, graph widths.

Nothing of `swaa_local` is used: the C interface that the patches add is declared here a second time, on purpose, so
that these tests hold the interface itself. Every call that can fail raises `EngineError` with llama.cpp's own log.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import llama_cpp.llama_cpp as C
import numpy as np
from llama_cpp._logger import llama_log_callback as default_log_callback

from tests.support.masks import Sched

_lib = C._lib
# The engine tests run on a GPU build with all layers there if this is set, e.g. to 99.
GPU_LAYERS = int(os.environ.get("SWAA_TEST_GPU_LAYERS", "0"))
# CUDA multiplies F32 and F16 matrices in F16 or TF32, with a schedule or without: upstream's own full attention is off
# by 0.02 sigma. Different masks are an order of magnitude further apart.
GPU_TOLERANCE = 0.03

PATCH_SYMBOLS = (
    "llama_model_swaa_set",
    "llama_model_swaa_get",
    "llama_model_swaa_set_tail",
    "llama_model_swaa_tail",
    "llama_swaa_set_prompt_end",
    "llama_model_swaa_set_draft",
    "llama_swaa_set_draft_start",
    "llama_swaa_kv_bytes",
    "llama_model_swaa_layer",
    "llama_swaa_has_ring",
)
MISSING_SYMBOLS = [name for name in PATCH_SYMBOLS if not hasattr(_lib, name)]

if not MISSING_SYMBOLS:
    _u8_p = ctypes.POINTER(ctypes.c_uint8)
    _u32_p = ctypes.POINTER(ctypes.c_uint32)
    _lib.llama_model_swaa_set.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, _u8_p, ctypes.c_size_t]
    _lib.llama_model_swaa_set.restype = ctypes.c_int32
    _lib.llama_model_swaa_get.argtypes = [ctypes.c_void_p, _u32_p, _u32_p, _u8_p, ctypes.c_size_t]
    _lib.llama_model_swaa_get.restype = ctypes.c_bool
    _lib.llama_model_swaa_set_tail.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    _lib.llama_model_swaa_set_tail.restype = ctypes.c_int32
    _lib.llama_model_swaa_tail.argtypes = [ctypes.c_void_p]
    _lib.llama_model_swaa_tail.restype = ctypes.c_uint32
    _lib.llama_swaa_set_prompt_end.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    _lib.llama_swaa_set_prompt_end.restype = None
    _lib.llama_model_swaa_set_draft.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]
    _lib.llama_model_swaa_set_draft.restype = ctypes.c_int32
    _lib.llama_swaa_set_draft_start.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    _lib.llama_swaa_set_draft_start.restype = ctypes.c_bool
    _lib.llama_swaa_kv_bytes.argtypes = [ctypes.c_void_p]
    _lib.llama_swaa_kv_bytes.restype = ctypes.c_size_t
    _lib.llama_model_swaa_layer.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    _lib.llama_model_swaa_layer.restype = ctypes.c_int32
    _lib.llama_swaa_has_ring.argtypes = [ctypes.c_void_p]
    _lib.llama_swaa_has_ring.restype = ctypes.c_bool

FLASH = {
    "on": C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "auto": C.LLAMA_FLASH_ATTN_TYPE_AUTO,
}


class EngineError(Exception):
    """llama.cpp refused; the message is its log."""


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect llama.cpp's log, all levels; join the pieces for lines."""
    pieces: list[str] = []

    @C.llama_log_callback
    def collect(_level: int, text: bytes, _user: int) -> None:
        pieces.append(text.decode(errors="replace"))

    C.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield pieces
    finally:
        C.llama_log_set(default_log_callback, ctypes.c_void_p(0))


@contextmanager
def _scheduler_log(wanted: bool) -> Iterator[None]:
    """A scheduler that is made meanwhile logs each graph that it plans, operation by operation."""
    before = os.environ.get("GGML_SCHED_DEBUG")
    if wanted:
        os.environ["GGML_SCHED_DEBUG"] = "2"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop("GGML_SCHED_DEBUG")
            if before is not None:
                os.environ["GGML_SCHED_DEBUG"] = before


def cpu_features() -> dict[str, str]:
    """What the engine was built to use of the CPU, such as AVX2 or AMX_INT8: "1" each."""
    return dict(re.findall(r"(\w+) = (\d)", C.llama_print_system_info().decode()))


def quantize(path: Path, out: Path, ftype: int) -> None:
    """ftype: one of llama_cpp's LLAMA_FTYPE_*."""
    params = C.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, ftype
    assert C.llama_model_quantize(str(path).encode(), str(out).encode(), params) == 0


class EngineModel:
    """A loaded model. `schedule` replaces the file's through `llama_model_swaa_set`; `overrides` are of swaa.* keys."""

    def __init__(self, path: str | Path, schedule: Sched | None = None, **overrides: int) -> None:
        params = C.llama_model_default_params()
        kv = (C.llama_model_kv_override * (len(overrides) + 1))()
        for slot, (key, value) in zip(kv, overrides.items(), strict=False):
            slot.tag, slot.key, slot.value.val_i64 = C.LLAMA_KV_OVERRIDE_TYPE_INT, f"swaa.{key}".encode(), value
        params.kv_overrides = kv
        params.n_gpu_layers = GPU_LAYERS
        with captured_log() as log:
            C.llama_backend_init()  # loads the backends of a build that has them as modules
            self.ptr = C.llama_model_load_from_file(str(path).encode(), params)
        self.log = "".join(log)
        if not self.ptr:
            raise EngineError(self.log)
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.ptr))
        self.n_layer = C.llama_model_n_layer(self.ptr)
        if schedule is not None:
            self.set_schedule(schedule)

    def set_schedule(self, schedule: Sched) -> None:
        modes = (ctypes.c_uint8 * max(1, len(schedule.layer_modes)))(*schedule.layer_modes)
        with captured_log() as log:
            rc = _lib.llama_model_swaa_set(self.ptr, schedule.window, schedule.sinks, modes, len(schedule.layer_modes))
        if rc != 0:
            raise EngineError("".join(log))

    def get_schedule(self) -> Sched | None:
        window, sinks, modes = ctypes.c_uint32(), ctypes.c_uint32(), (ctypes.c_uint8 * self.n_layer)()
        if not _lib.llama_model_swaa_get(self.ptr, window, sinks, modes, self.n_layer):
            return None
        return Sched(window.value, sinks.value, tuple(modes))

    def set_tail(self, n_tail: int) -> None:
        with captured_log() as log:
            rc = _lib.llama_model_swaa_set_tail(self.ptr, n_tail)
        if rc != 0:
            raise EngineError("".join(log))

    def set_draft(self, window: int, sinks: int) -> None:
        with captured_log() as log:
            rc = _lib.llama_model_swaa_set_draft(self.ptr, window, sinks)
        if rc != 0:
            raise EngineError("".join(log))

    def layer(self, layer: int) -> int:
        """0 if the layer can have any mode, its own window, or -1 without such a layer."""
        return int(_lib.llama_model_swaa_layer(self.ptr, layer))

    @property
    def tail(self) -> int:
        return int(_lib.llama_model_swaa_tail(self.ptr))

    def context(self, **kwargs: Any) -> EngineContext:
        return EngineContext(self, **kwargs)

    def close(self) -> None:
        if self.ptr:
            C.llama_model_free(self.ptr)
            self.ptr = None

    def __enter__(self) -> EngineModel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class AttentionOp(NamedTuple):
    """One attention operation of a graph: its layer, the keys that a query reads, the queries, and their blocks.

    mask: tells one mask of a graph from another, with flash attention.
    out: the address of what it computed.
    """

    layer: int
    n_kv: int
    n_tokens: int
    n_block: int
    mask: int = 0
    out: int = 0


class PlacedOp(NamedTuple):
    """One operation of a graph, and where llama.cpp's scheduler put it.

    op: its name, of which the scheduler tells 10 characters. device: of the backend's name, 5. split: the graph is
    divided into parts that are computed on one device each, and this is in the n-th of them.
    """

    op: str
    name: str
    device: str
    split: int


def parse_placed(log: str) -> list[list[PlacedOp]]:
    """The operations of each graph that the scheduler planned, by its own log (GGML_SCHED_DEBUG=2)."""
    graphs: list[list[PlacedOp]] = []
    for split, op, name, device in re.findall(
        r"^## SPLIT #(\d+): |^node #\s*\d+ \(\s*(\S+)\):\s+(.*?)\s+\(.{5}\) \[\s*(\S+) ", log, re.MULTILINE
    ):
        if split:
            at = int(split)
            if at == 0:
                graphs.append([])
        else:
            graphs[-1].append(PlacedOp(op, name, device, at))
    return graphs


class EngineContext:
    """A context with one thread. Positions continue by themselves unless given; all positions' logits are returned."""

    def __init__(
        self,
        model: EngineModel,
        *,
        n_ctx: int = 1024,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        flash: str = "on",
        kv: str = "F16",
        n_seq_max: int = 1,
        unified: bool = False,
        record: bool = False,
        record_nodes: bool = False,
        record_places: bool = False,
        **params: Any,
    ) -> None:
        """record: fill `attention` with each call. record_nodes: fill `nodes`. record_places: fill `places`, with one
        list for each graph that was planned (one that is used again is not)."""
        self.model, self.n_batch = model, n_batch
        p = C.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = n_ctx, n_batch, n_ubatch or n_batch
        p.n_seq_max, p.kv_unified = n_seq_max, unified
        p.n_threads = p.n_threads_batch = 1
        p.flash_attn_type = FLASH[flash]
        p.type_k = p.type_v = gguf.GGMLQuantizationType[kv].value
        for name, value in params.items():
            setattr(p, name, value)
        self.attention: list[AttentionOp] = []
        self.nodes: list[str] = []
        self._record_nodes = record_nodes
        self.places: list[list[PlacedOp]] = []
        self._record_places = record_places
        self._flash: list[tuple[int, int, int, int]] = []
        if record or record_nodes:
            self._callback = C.ggml_backend_sched_eval_callback(self._observe)
            p.cb_eval = self._callback
        with captured_log() as log, _scheduler_log(record_places):
            self.ptr = C.llama_init_from_model(model.ptr, p)
        self.log = "".join(log)
        if not self.ptr:
            raise EngineError(self.log)
        self.mem = C.llama_get_memory(self.ptr)
        self._batch = C.llama_batch_init(n_batch, 0, max(8, n_seq_max))

    # batches

    def decode(self, entries: Sequence[tuple[int, int, int | Sequence[int]]]) -> np.ndarray:
        """One llama_decode call over (token, position, sequence or sequences); logits (n, n_vocab) in that order."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, pos, seqs) in enumerate(entries):
            seqs = [seqs] if isinstance(seqs, int) else list(seqs)
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, len(seqs), True
            for j, seq in enumerate(seqs):
                batch.seq_id[i][j] = seq
        # drafts have a scheduler of their own, which is made for the first of them
        with captured_log() as log, _scheduler_log(self._record_places):
            rc = C.llama_decode(self.ptr, batch)
        if rc != 0:
            raise EngineError(f"llama_decode: {rc}\n" + "".join(log))
        if self._record_places:
            self.places += parse_placed("".join(log))
        out = np.empty((len(entries), self.model.n_vocab), np.float32)
        for i in range(len(entries)):
            out[i] = np.ctypeslib.as_array(C.llama_get_logits_ith(self.ptr, i), (self.model.n_vocab,))
        return out

    def feed(
        self, tokens: Sequence[int], *, seq: int = 0, pos: int | None = None, chunk: int | None = None
    ) -> np.ndarray:
        """Tokens of one sequence after what it holds, in calls of `chunk` (default n_batch) tokens."""
        start = self.pos_max(seq) + 1 if pos is None else pos
        step = chunk or self.n_batch
        parts = [
            self.decode([(t, start + i + j, seq) for j, t in enumerate(tokens[i : i + step])])
            for i in range(0, len(tokens), step)
        ]
        return np.concatenate(parts)

    def run(self, tokens: Sequence[int], prompt_end: int, *, seq: int = 0, chunk: int | None = None) -> np.ndarray:
        """Prefill tokens[:prompt_end], then decode the rest one by one, with the prompt end set."""
        self.set_prompt_end(seq, prompt_end)
        parts = [self.feed(tokens[:prompt_end], seq=seq, chunk=chunk)]
        parts += [self.feed([t], seq=seq) for t in tokens[prompt_end:]]
        return np.concatenate(parts)

    def set_prompt_end(self, seq: int, pos: int) -> None:
        _lib.llama_swaa_set_prompt_end(self.ptr, seq, pos)

    def set_draft_start(self, seq: int, pos: int) -> None:
        with captured_log() as log:
            done = _lib.llama_swaa_set_draft_start(self.ptr, seq, pos)
        if not done:
            raise EngineError("".join(log))

    # memory

    def rm(self, seq: int, p0: int, p1: int) -> bool:
        return C.llama_memory_seq_rm(self.mem, seq, p0, p1)

    def cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        C.llama_memory_seq_cp(self.mem, src, dst, p0, p1)

    def keep(self, seq: int) -> None:
        C.llama_memory_seq_keep(self.mem, seq)

    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        C.llama_memory_seq_add(self.mem, seq, p0, p1, delta)

    def can_shift(self) -> bool:
        return C.llama_memory_can_shift(self.mem)

    def clear(self) -> None:
        C.llama_memory_clear(self.mem, True)

    def pos_min(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_min(self.mem, seq)

    def pos_max(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_max(self.mem, seq)

    def has_ring(self) -> bool:
        return bool(_lib.llama_swaa_has_ring(self.ptr))

    def kv_bytes(self) -> int:
        return _lib.llama_swaa_kv_bytes(self.ptr)

    def n_reused(self) -> int:
        """Batches whose graph was that of the one before."""
        return C.llama_perf_context(self.ptr).n_reused

    def kv_mib_logged(self) -> float:
        """Sum of llama.cpp's own "KV buffer size = N MiB" lines."""
        return sum(float(m) for m in re.findall(r"KV buffer size = +([\d.]+) MiB", self.log))

    # state

    def state(self, seq: int | None = None) -> bytes:
        """The whole state, or one sequence's."""
        size = C.llama_state_get_size(self.ptr) if seq is None else C.llama_state_seq_get_size(self.ptr, seq)
        buf = (ctypes.c_uint8 * size)()
        if seq is None:
            n = C.llama_state_get_data(self.ptr, buf, size)
        else:
            n = C.llama_state_seq_get_data(self.ptr, buf, size, seq)
        return bytes(buf[:n])

    def load_state(self, data: bytes, seq: int | None = None) -> int:
        """Bytes read."""
        buf = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        with captured_log() as log:
            if seq is None:
                n = C.llama_state_set_data(self.ptr, buf, len(data))
            else:
                n = C.llama_state_seq_set_data(self.ptr, buf, len(data), seq)
        if n == 0:
            raise EngineError("".join(log))
        return n

    # graph

    def _observe(self, tensor: int, ask: bool, _user: int) -> bool:
        if not ask:
            return False
        t = _Tensor.from_address(tensor)
        op, (name, _, layer) = _lib.ggml_op_name(t.op), t.name.rpartition(b"-")
        if self._record_nodes:
            sources = [_describe(s.contents) for s in t.src if s]
            self.nodes.append(f"{op.decode()} {_describe(t)} {list(t.op_params)} <- {sources}")
        if op == b"FLASH_ATTN_EXT":  # has no name of its own; the node of its output that follows names the layer
            k, q = t.src[1].contents, t.src[0].contents
            self._flash.append((k.ne[1], q.ne[1] * q.ne[3], q.ne[3], ctypes.addressof(t.src[3].contents)))
        elif name == b"kqv_out" and self._flash:
            self.attention += [AttentionOp(int(layer), *op, out=t.data) for op in self._flash]
            self._flash.clear()
        elif op == b"SOFT_MAX" and name == b"kq_soft_max":
            self.attention.append(AttentionOp(int(layer), t.ne[0], t.ne[1] * t.ne[3], t.ne[3], out=t.data))
        return False

    def close(self) -> None:
        if self.ptr:
            C.llama_batch_free(self._batch)
            C.llama_free(self.ptr)
            self.ptr = None

    def __enter__(self) -> EngineContext:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of the pinned ggml.h, up to the name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]
_lib.ggml_op_name.argtypes = [ctypes.c_int]
_lib.ggml_op_name.restype = ctypes.c_char_p


def _describe(t: _Tensor) -> str:
    return f"{t.name.decode()} {t.type} {list(t.ne)}"


def worst_ratio(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference over the standard deviation of the wanted logits."""
    return float(np.abs(got - want).max() / want.std())


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: object = "") -> None:
    """Every logit within tolerance * sigma of the wanted one; says which positions are not."""
    if GPU_LAYERS:
        tolerance = max(tolerance, GPU_TOLERANCE)
    assert got.shape == want.shape
    off = np.abs(got - want).max(axis=1) / want.std()
    bad = np.flatnonzero(~(off < tolerance))
    assert not len(bad), (
        f"{what}: logits off by up to {off.max():.2g} sigma (allowed {tolerance:g}) at {len(bad)} of {len(off)} "
        f"positions, from {bad[0]} to {bad[-1]}"
    )
