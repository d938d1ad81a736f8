"""One build of llama.cpp in a process of its own, which measures on command.

`start` begins the process on one folder of libraries, so that two builds can be measured in turn. The child drives
llama.cpp's plain C interface, on the CPU, and nothing that the patches add: what is called is the same in both builds.

A cache is filled to a depth within a moment: a few real tokens are evaluated, and a state is restored that repeats
their keys and values as often as needed. Speed does not depend on the values, and these are as large as real ones.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from swaa_local.errors import SWAAError
from swaa_local.files.signals import ended_by

LIBRARY_PATH = "LLAMA_CPP_LIB_PATH"
# Tokens that are evaluated before their keys and values are repeated.
N_REAL = 256
# malloc.h of glibc; setting its default anew makes it stay.
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 128 << 10


class BuildError(SWAAError):
    """A build cannot do what was asked; names the build."""


@dataclass(frozen=True)
class BuildInfo:
    """libraries: their folder. patched: it knows the attention schedule. system_info: llama.cpp's line on the features
    that it was built with. cpu: its model's name. size_bytes: of the model's weights."""

    libraries: str
    patched: bool
    system_info: str
    cpu: str
    size_bytes: int


@dataclass(frozen=True)
class Cache:
    """A context to make, and to fill with `depth` tokens."""

    flash_attn: bool
    type_k: str
    type_v: str
    depth: int
    n_ctx: int
    n_ubatch: int


class Build:
    """The parent's end of a child. Each call waits for the answer; raises `BuildError` with the child's reason."""

    def __init__(self, name: str, connection: Connection, process: Any) -> None:
        self.name = name
        self._connection = connection
        self._process = process

    def load(self, model: Path, n_threads: int, cpu_time: bool) -> BuildInfo:
        """cpu_time: seconds are the process's CPU time instead of the clock's."""
        return self._call("load", str(model), n_threads, cpu_time)

    def free_bytes(self) -> int | None:
        """Memory that contexts can take, as `swaa_local.engine.memory` counts it."""
        return self._call("free_bytes")

    def open(self, cache: Cache) -> int:
        """Make a context, filled and warm; returns the bytes of a token's keys and values in all layers."""
        return self._call("open", cache)

    def prefill(self, cache: Cache, n: int) -> float:
        """Seconds for one prompt of n tokens behind the filled ones, which are all that is left in the cache then."""
        return self._call("prefill", cache, n)

    def decode(self, cache: Cache, n: int) -> float:
        """Seconds for n tokens, one after the other, each done before the next; otherwise as `prefill`."""
        return self._call("decode", cache, n)

    def close(self, cache: Cache) -> None:
        self._call("close", cache)

    def _call(self, what: str, *arguments: Any) -> Any:
        try:
            self._connection.send((what, arguments))
            ok, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            if code is not None and code < 0:
                raise BuildError(ended_by(-code, f"the {self.name} build's process")) from None
            raise BuildError(f"the {self.name} build's process ended (exit code {code})") from None
        if not ok:
            raise BuildError(f"the {self.name} build: {answer}")
        return answer


@contextmanager
def start(name: str, libraries: Path | None) -> Iterator[Build]:
    """A child on these libraries; None: on those that the environment has. Leaving the block ends it."""
    if libraries is not None and not libraries.is_dir():
        raise BuildError(f"{libraries}: no such folder; give the one that holds the {name} build's libllama")
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, libraries and str(libraries.resolve())), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Build(name, ours, process)
    finally:
        process.kill()
        process.join()
        ours.close()


# In the child


def _serve(connection: Connection, libraries: str | None) -> None:
    # The parent hears Ctrl-C too, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if libraries is not None:
        os.environ[LIBRARY_PATH] = libraries
    place_alike()
    engine: Any = None
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            if engine is None:
                engine = _Engine()
            answer = True, engine.call(what, arguments)
        except Exception as error:
            answer = False, str(error) or repr(error)
        connection.send(answer)


def place_alike() -> None:
    """Have glibc map every large buffer by itself, which is what it does until one has been freed.

    From then on it may take others from its heap, at any multiple of 16 bytes, and how llama.cpp's work buffer lies to
    cache lines makes prefill with flash attention 10 % faster or slower: one build would be lucky, the other not.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


class _Engine:
    """Importing llama_cpp loads the libraries, so only here."""

    def __init__(self) -> None:
        from llama_cpp import llama_cpp as c

        from swaa_local.engine import log as engine_log
        from swaa_local.engine import memory
        from swaa_local.engine.kv_types import kv_type_id

        self._c = c
        self._kv_type_id = kv_type_id
        self.free_bytes = memory.free_host_bytes
        self._captured = engine_log.captured
        self._contexts: dict[Cache, _Context] = {}
        self._n_threads = 1
        self._clock: Callable[[], float] = time.perf_counter

    def call(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """Run a method; its `BuildError` also says what llama.cpp logged."""
        with self._captured() as log:
            try:
                return getattr(self, what)(*arguments)
            except BuildError as error:
                raise BuildError(f"{error}: {log.reason}" if log.reason else str(error)) from None

    def load(self, path: str, n_threads: int, cpu_time: bool) -> BuildInfo:
        from swaa_local.engine.machine import cpu_name

        c = self._c
        self._n_threads = n_threads
        self._clock = time.process_time if cpu_time else time.perf_counter
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = c.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise BuildError(f"cannot load {path}")
        self._n_vocab = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model)))
        return BuildInfo(
            libraries=str(Path(c._lib._name).resolve().parent),
            patched=hasattr(c._lib, "llama_model_swaa_set"),
            system_info=c.llama_print_system_info().decode(errors="replace").strip(),
            cpu=cpu_name(),
            size_bytes=int(c.llama_model_size(self._model)),
        )

    def open(self, cache: Cache) -> int:
        c = self._c
        params = c.llama_context_default_params()
        params.n_ctx = cache.n_ctx
        params.n_batch = params.n_ubatch = cache.n_ubatch
        params.n_threads = params.n_threads_batch = self._n_threads
        params.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if cache.flash_attn else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k, params.type_v = self._kv_type_id(cache.type_k), self._kv_type_id(cache.type_v)
        params.offload_kqv = params.op_offload = False
        ctx = c.llama_init_from_model(self._model, params)
        if not ctx:
            raise BuildError(f"cannot make a context of {cache.n_ctx} tokens")
        self._contexts[cache] = _Context(c, ctx, cache, self._n_vocab, self._clock)
        return self._contexts[cache].fill()

    def prefill(self, cache: Cache, n: int) -> float:
        return self._contexts[cache].measure(n, cache.n_ubatch)

    def decode(self, cache: Cache, n: int) -> float:
        return self._contexts[cache].measure(n, 1)

    def close(self, cache: Cache) -> None:
        self._contexts.pop(cache).close()


class _Context:
    """A context of one sequence that holds `cache.depth` tokens whenever it is measured."""

    def __init__(self, c: Any, ctx: Any, cache: Cache, n_vocab: int, clock: Callable[[], float]) -> None:
        self._c = c
        self._ctx = ctx
        self._cache = cache
        self._clock = clock
        self._batch = c.llama_batch_init(cache.n_ubatch, 0, 1)
        for i in range(cache.n_ubatch):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
        self._tokens = np.random.default_rng(0).integers(0, n_vocab, cache.n_ctx, dtype=np.int32).tolist()

    def close(self) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._ctx)

    def fill(self) -> int:
        """To the depth; returns the bytes of a token's keys and values in all layers. Reads the weights on the way, by
        one prompt and one token."""
        n_real = min(N_REAL, self._cache.n_ctx - 1)
        self._evaluate(0, n_real, self._cache.n_ubatch)
        repeated, token_bytes = repeat_state(self._state(), self._cache.depth)
        self._clear(0)
        size = len(repeated)
        if self._cache.depth and not self._c.llama_state_seq_set_data(self._ctx, _pointer(repeated), size, 0):
            raise BuildError(f"cannot restore a state of {self._cache.depth} tokens, {size} bytes")
        self.measure(1, 1)
        return token_bytes

    def measure(self, n: int, n_batch: int) -> float:
        started = self._clock()
        self._evaluate(self._cache.depth, n, n_batch)
        seconds = self._clock() - started
        self._clear(self._cache.depth)
        return seconds

    def _evaluate(self, first: int, n: int, n_batch: int) -> None:
        """Tokens from position `first` on, n_batch at once. Of a prompt only the last one asks for logits."""
        batch = self._batch
        for begin in range(first, first + n, n_batch):
            batch.n_tokens = size = min(n_batch, first + n - begin)
            for i in range(size):
                batch.token[i], batch.pos[i] = self._tokens[begin + i], begin + i
                batch.logits[i] = 0
            batch.logits[size - 1] = n_batch == 1 or begin + size == first + n
            code = self._c.llama_decode(self._ctx, batch)
            if code != 0:
                raise BuildError(f"llama_decode returned {code} at position {begin}")
            self._c.llama_synchronize(self._ctx)

    def _clear(self, first: int) -> None:
        if not self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._ctx), 0, first, -1):
            raise BuildError(f"cannot drop the tokens from position {first} on")

    def _state(self) -> np.ndarray[Any, Any]:
        state = np.empty(self._c.llama_state_seq_get_size(self._ctx, 0), np.uint8)
        self._c.llama_state_seq_get_data(self._ctx, _pointer(state), len(state), 0)
        return state


def _pointer(array: np.ndarray[Any, Any]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


# A sequence's state, as llama_kv_cache::state_write in upstream's src/llama-kv-cache.cpp has it

_NOT_PLAIN = "the model's state is not that of one plain KV cache, and no other can be filled; take another model"


def repeat_state(state: np.ndarray[Any, Any], n: int) -> tuple[np.ndarray[Any, Any], int]:
    """The state of n tokens, at positions from 0 on, whose keys and values are those in `state`, again and again.

    Returns it, and the bytes of one token's keys and values in all layers. Raises `BuildError` for a state that is no
    plain KV cache of one sequence: a recurrent model's, or one with several caches.
    """
    reader = _Reader(state)
    head = reader.take(12)  # magic, sequence, number of streams
    n_cells = reader.u32()
    for position in range(n_cells):
        if (reader.u32(), reader.u32(), reader.u32()) != (position, 1, 0):
            raise BuildError(_NOT_PLAIN)
    form = reader.take(8)
    transposed, n_layer = form.view(np.uint32).tolist()
    rows: list[np.ndarray[Any, Any]] = []  # all layers' K, then all layers' V: shape (width, n_cells, bytes)
    kinds = []
    for i in range(2 * n_layer):
        kinds.append(reader.take(12))
        if i >= n_layer and transposed:  # type, bytes of an element, elements of a token
            size, width = kinds[i][4:].view(np.uint32).tolist()
        else:  # type, bytes of a token
            size, width = int(kinds[i][4:].view(np.uint64)[0]), 1
        rows.append(reader.take(size * width * n_cells).reshape(width, n_cells, size))
    reader.end()

    token_bytes = sum(part.shape[0] * part.shape[2] for part in rows)
    cells = np.zeros((n, 3), np.uint32)  # position, number of sequences, sequence
    cells[:, 0], cells[:, 1] = np.arange(n), 1
    # Filled piece by piece: at full depth it is as large as the cache.
    repeated = np.empty(12 + 4 + 12 * n + 8 + 12 * len(kinds) + n * token_bytes, np.uint8)
    writer = _Writer(repeated)
    for piece in (head, np.array([n], np.uint32), cells, form):
        writer.put(piece)
    for kind, part in zip(kinds, rows, strict=True):
        writer.put(kind)
        for row in part:
            for begin in range(0, n, n_cells):
                writer.put(row[: n - begin])
    return repeated, token_bytes


class _Writer:
    def __init__(self, target: np.ndarray[Any, Any]) -> None:
        self._target = target
        self._at = 0

    def put(self, piece: np.ndarray[Any, Any]) -> None:
        data = piece.reshape(-1).view(np.uint8)
        self._target[self._at : self._at + len(data)] = data
        self._at += len(data)


class _Reader:
    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self._data = data
        self._at = 0

    def take(self, n: int) -> np.ndarray[Any, Any]:
        if n > len(self._data) - self._at:
            raise BuildError(_NOT_PLAIN)
        self._at += n
        return self._data[self._at - n : self._at].copy()

    def u32(self) -> int:
        return int(self.take(4).view(np.uint32)[0])

    def end(self) -> None:
        if self._at != len(self._data):
            raise BuildError(_NOT_PLAIN)
