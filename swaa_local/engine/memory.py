"""How much context fits: what a loaded model's context costs, and what the machine has free.

Knows llama.cpp's models and devices and the operating system's accounts; nothing of tokens. All sizes are in bytes
unless named otherwise. Estimates err on the safe side: an explicit `n_ctx` overrides them, unless the machine cannot
have what its KV cache alone takes (`most_host_bytes`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from llama_cpp import llama_cpp as _c

from swaa_local.engine import devices, model_meta
from swaa_local.engine.checkpoints import most_of_checkpoints
from swaa_local.engine.kv_types import KV_TYPE_NAMES
from swaa_local.errors import ContextTooLarge
from swaa_local.model_file.model_info import ModelInfo
from swaa_local.model_file.recurrent_state import state_bytes
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.schedule.cost import CELL_PADDING, kv_bytes
from swaa_local.schedule.model_layers import LayerKind

MIN_N_CTX = 4096
"""Tokens that `n_ctx` is never lowered below: less cannot hold a document and an answer."""

_MIB = 1 << 20
# What the context needs beside the KV cache whatever its length: activations, logits, the program itself.
_OVERHEAD = 256 * _MIB
# Share of the free memory that is left to others.
_HEADROOM = 0.1


# What llama.cpp keeps for each cell beside K and V: its position, its sequences (llama-kv-cells.h).
_CELL_BYTES = 52

# psutil warns of figures that containers hide and that nothing here asks for.
warnings.filterwarnings("ignore", r".* memory stats couldn't be determined", RuntimeWarning)


@dataclass(frozen=True)
class ContextCost:
    """What a context costs, split over host and GPU as llama.cpp splits the layers.

    n_embd_k, n_embd_v: elements of keys and values for one token, by layer. n_gpu_layers: layers whose KV cache is on
    the GPU, counted from the last. n_scores: columns of the logits kept on the host per context token, 0 if none are.
    swa_full: whether windows of the model's own have all cells. state_bytes: of a recurrent layer for one sequence, by
    layer; empty where none is recurrent. n_seq_max, unified: sequences, and whether they share the cells.
    n_checkpoints: kept of each sequence at most (llama-server); None: as `Checkpoints` keeps them.
    """

    schedule: Schedule
    n_embd_k: tuple[int, ...]
    n_embd_v: tuple[int, ...]
    type_k: str
    type_v: str
    n_head: int
    n_ubatch: int
    flash_attn: bool
    n_gpu_layers: int = 0
    n_scores: int = 0
    swa_full: bool = False
    state_bytes: tuple[int, ...] = ()
    n_seq_max: int = 1
    unified: bool = False
    n_checkpoints: int | None = 0

    def host(self, n_ctx: int) -> int:
        on_host = self.host_kv(n_ctx) + n_ctx * 4 * (1 + self.n_scores) + self.checkpoints(n_ctx)
        return on_host + (0 if self.n_gpu_layers else self._graph(n_ctx))

    def host_kv(self, n_ctx: int) -> int:
        """What is filled when the context is made, however little is read into it."""
        split = self.schedule.n_layer - self.n_gpu_layers
        return self.kv(n_ctx, range(split)) + _CELL_BYTES * self._streams * max(self._cells(n_ctx))

    def gpu(self, n_ctx: int) -> int:
        split = self.schedule.n_layer - self.n_gpu_layers
        return self.kv(n_ctx, range(split, self.schedule.n_layer)) + self._graph(n_ctx) if self.n_gpu_layers else 0

    def kv(self, n_ctx: int, layers: range | None = None) -> int:
        """The KV cache of these layers and their recurrent states; default: of all."""
        cells = self._cells(n_ctx)
        layers = range(self.schedule.n_layer) if layers is None else layers
        of_cells = sum(self._kv_bytes(i, cells[i]) for i in layers)
        return of_cells * self._streams + self.n_seq_max * sum(self._states[i] for i in layers)

    def checkpoints(self, n_ctx: int) -> int:
        """What is kept at most beside the context to go back to: of each, the recurrent states and the rings."""
        cells = self._cells(n_ctx)
        rings = sum(self._kv_bytes(i, cells[i]) for i in self._rings)
        states = sum(self._states)
        of_each = states + rings + _CELL_BYTES * max((cells[i] for i in self._rings), default=0)
        if self.n_checkpoints is None:
            return most_of_checkpoints(states, of_each, n_ctx) if states else 0
        return self.n_checkpoints * self.n_seq_max * of_each

    @property
    def _rings(self) -> tuple[int, ...]:
        own = () if self.swa_full else self.schedule.model.of_kind(LayerKind.OWN_WINDOW)
        return (*self.schedule.layers(LayerMode.ALWAYS), *own)

    @property
    def _states(self) -> tuple[int, ...]:
        return self.state_bytes or (0,) * self.schedule.n_layer

    @property
    def _streams(self) -> int:
        return 1 if self.unified else self.n_seq_max

    def _kv_bytes(self, layer: int, cells: int) -> int:
        if not cells:
            return 0
        return kv_bytes(cells, self.n_embd_k[layer], self.n_embd_v[layer], self.type_k, self.type_v)

    def _cells(self, n_ctx: int) -> tuple[int, ...]:
        return self.schedule.kv_cells(
            n_ctx, n_ubatch=self.n_ubatch, n_seq_max=self.n_seq_max, unified=self.unified, swa_full=self.swa_full
        )

    def _graph(self, n_ctx: int) -> int:
        """The part of the compute buffer that grows with the widest layer's cache, which a ring may be: the mask (f32
        and f16), and without flash attention the scores of all heads."""
        widest = max(self._cells(n_ctx))
        return widest * self.n_ubatch * (6 if self.flash_attn else 8 + 4 * self.n_head)


def longest_n_ctx(
    model: Any,
    schedule: Schedule | None,
    params: Any,
    *,
    n_ubatch: int,
    n_gpu_layers: int,
    logits_all: bool,
    mapped: bool,
    used: Sequence[int] | None = None,
) -> int:
    """The longest context, up to the model's own, that this machine's free memory holds; see `fit_n_ctx`.

    model: a loaded `llama_model_p`. params: the `llama_context_params` to be, but for n_ubatch. mapped: the weights are
    a mapped file, which must stay in memory though the system counts it as free. used: as in `free_gpu_bytes`.
    """
    cost = context_cost(model, schedule, params, n_ubatch=n_ubatch, n_gpu_layers=n_gpu_layers, logits_all=logits_all)
    cost = replace(cost, n_checkpoints=None)
    on_host = _c.llama_model_size(model) * (1 - cost.n_gpu_layers / cost.schedule.n_layer) if mapped else 0
    return fit_n_ctx(
        cost,
        _c.llama_model_n_ctx_train(model),
        free_host=free_host_bytes(mapped=int(on_host)),
        free_gpu=free_gpu_bytes(used) if cost.n_gpu_layers else None,
    )


def context_cost(
    model: Any, schedule: Schedule | None, params: Any, *, n_ubatch: int, n_gpu_layers: int, logits_all: bool
) -> ContextCost:
    """What a context of `model` costs, without checkpoints; arguments as in `longest_n_ctx`."""
    # The rest of this module serves a build without schedules too, which lacks what these need.
    from swaa_local.engine import native
    from swaa_local.engine.schedule import get_layers

    arch = model_meta.text(model, "general.architecture") or ""
    n_head = max(1, _c.llama_model_n_head(model))
    head_dim = _c.llama_model_n_embd(model) // n_head
    layers = get_layers(model)
    schedule = schedule or Schedule.full(layers)

    def n_embd(length: str) -> tuple[int, ...]:
        usual = model_meta.number(model, f"{arch}.attention.{length}") or head_dim
        own = model_meta.number(model, f"{arch}.attention.{length}_swa") or usual
        dims = {LayerKind.OWN_WINDOW: own}
        heads = (native.llama_model_swaa_n_head_kv(model, layer) for layer in range(layers.n_layer))
        return tuple(n * dims.get(kind, usual) for n, kind in zip(heads, layers.kinds, strict=True))

    on_gpu = n_gpu_layers - 1 if params.offload_kqv else 0  # llama.cpp counts the output as one more layer
    return ContextCost(
        schedule=schedule,
        n_embd_k=n_embd("key_length"),
        n_embd_v=n_embd("value_length"),
        type_k=KV_TYPE_NAMES[params.type_k],
        type_v=KV_TYPE_NAMES[params.type_v],
        n_head=n_head,
        n_ubatch=n_ubatch,
        flash_attn=params.flash_attn_type != _c.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        n_gpu_layers=max(0, min(on_gpu, schedule.n_layer)),
        n_scores=_c.llama_vocab_n_tokens(_c.llama_model_get_vocab(model)) if logits_all else 0,
        swa_full=bool(params.swa_full),
        state_bytes=state_bytes(arch, layers, functools.partial(model_meta.number, model)),
    )


def header_cost(
    info: ModelInfo,
    schedule: Schedule | None,
    *,
    n_ubatch: int,
    type_k: str = "f16",
    type_v: str = "f16",
    n_gpu_layers: int = 0,
    swa_full: bool = False,
    n_seq_max: int = 1,
    unified: bool = False,
    n_checkpoints: int = 0,
) -> ContextCost:
    """What a context costs of a model whose cache is a plain one, by its header. Arguments as in `longest_n_ctx` and
    `ContextCost`."""
    schedule = schedule or Schedule.full(info.layers)
    return ContextCost(
        schedule=schedule,
        n_embd_k=info.n_embd_k,
        n_embd_v=info.n_embd_v,
        type_k=type_k,
        type_v=type_v,
        n_head=max(info.n_head),
        n_ubatch=n_ubatch,
        flash_attn=True,
        n_gpu_layers=max(0, min(n_gpu_layers - 1, schedule.n_layer)),
        swa_full=swa_full,
        state_bytes=info.state_bytes,
        n_seq_max=n_seq_max,
        unified=unified,
        n_checkpoints=n_checkpoints,
    )


def fit_n_ctx(cost: ContextCost, n_ctx_train: int, *, free_host: int | None, free_gpu: int | None) -> int:
    """The largest context in tokens, at most the model's own, that fits; `MIN_N_CTX` (or the model's own) if none does.

    free_host, free_gpu: None where the machine does not tell; then it does not limit.
    """
    fits = largest_n_ctx(cost, n_ctx_train, free_host=free_host, free_gpu=free_gpu)
    return max(fits, min(MIN_N_CTX, n_ctx_train))


def largest_n_ctx(cost: ContextCost, n_ctx: int, *, free_host: int | None, free_gpu: int | None) -> int:
    """The largest context in tokens, at most n_ctx, that fits; 0 if none does. Arguments as in `fit_n_ctx`."""

    def fits(tokens: int) -> bool:
        return _within(cost.host(tokens), free_host) and (not cost.n_gpu_layers or _within(cost.gpu(tokens), free_gpu))

    if n_ctx and fits(n_ctx):
        return n_ctx
    low, high = 0, n_ctx // CELL_PADDING  # in padded steps: `low` fits or is none, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CELL_PADDING) else (low, middle)
    return low * CELL_PADDING


def _within(cost: int, free: int | None) -> bool:
    return free is None or cost + _OVERHEAD <= free * (1 - _HEADROOM)


def check_fits(cost: ContextCost, n_ctx: int) -> None:
    """Raise `ContextTooLarge` for a context whose KV cache and states the host cannot have, whatever it swaps out.

    The host fills it when the context is made, and the kernel kills who fills more than there is. GPUs refuse by
    themselves.
    """
    most, needed = most_host_bytes(), cost.host_kv(n_ctx)
    if most is not None and needed > most:
        free = free_host_bytes()
        fits = largest_n_ctx(cost, n_ctx, free_host=most if free is None else min(most, free), free_gpu=None)
        raise ContextTooLarge(n_ctx, needed, most, fits)


def free_host_bytes(*, mapped: int = 0) -> int | None:
    """Memory that can be taken without swapping; None if the system does not tell.

    mapped: bytes of a mapped model file that must stay in memory, which the system counts as free.
    """
    ram = _ram()
    free = min((n for n in (ram and ram.available, _cgroup()) if n is not None), default=None)
    return None if free is None else max(0, free - mapped)


def free_gpu_bytes(used: Sequence[int] | None = None) -> int | None:
    """Free memory of the GPUs that layers go to, by their drivers' account; None without one or if they do not tell.

    used: the devices, where they are others (`placement.with_workers`).
    """
    return devices.free_bytes(devices.usual() if used is None else used)


def gpu_names() -> tuple[str, ...]:
    """What llama.cpp calls the GPUs that layers go to."""
    return tuple(devices.description_of(device) for device in devices.usual())


def most_host_bytes() -> int | None:
    """Memory that this process could get at the very most, swap included; None if the system does not tell.

    Errs on the large side: whoever asks for more than this would not get it.
    """
    ram = _ram()
    if ram is None or not psutil.LINUX:  # others make swap files as they need them
        return ram and ram.total
    swap = psutil.swap_memory().free
    # The system's estimate of what is available leaves out some of the caches, among them all of ZFS's.
    most = ram.available + swap + _zfs_cache() + ram.total // 20
    group = _cgroup()
    return most if group is None else min(most, group + swap + ram.total // 20)


def _ram() -> Any:
    """The machine's memory (psutil's `svmem`); None if the system does not tell."""
    try:
        return psutil.virtual_memory()
    except (OSError, psutil.Error):
        return None


def _zfs_cache() -> int:
    try:
        lines = Path("/proc/spl/kstat/zfs/arcstats").read_text().splitlines()
        return next(int(line.split()[2]) for line in lines if line.startswith("size "))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0


def _cgroup() -> int | None:
    """A container's limit less its use; its file cache, which can be reclaimed, is not counted as use."""
    root = Path("/sys/fs/cgroup")
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "file "),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache "),
    ):
        try:
            bound = (root / limit).read_text().strip()
            lines = (root / stat).read_text().splitlines()
            reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith(cache))
            if bound != "max":
                return int(bound) - int((root / used).read_text()) + reclaimable
        except (OSError, ValueError, IndexError):
            continue
    return None
