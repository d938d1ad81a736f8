"""Where a model's layers go: this machine's devices and workers', which one a layer is on, and which worker is lost.

Knows llama.cpp's model parameters and the RPC backend; ggml's devices are in `devices`, how a worker answers in
`workers`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.engine import devices, native
from swaa_local.engine import log as engine_log
from swaa_local.engine.workers import WorkerAddress, WorkerError, check_workers
from swaa_local.errors import OutOfRange


class Placement:
    """Where layers may go, as `llama_model_params` say it; to be kept until the model is loaded.

    devices: None leaves the choice to llama.cpp, which takes the GPUs of this machine. Raises `WorkerError` for a
    worker that cannot be used and `OutOfRange` for more shares than there are devices.
    """

    def __init__(
        self,
        workers: Sequence[WorkerAddress],
        shares: Sequence[float] | None = None,
        *,
        split_mode: int = _c.LLAMA_SPLIT_MODE_LAYER,
        verbose: bool = False,
    ) -> None:
        if workers and split_mode == _c.LLAMA_SPLIT_MODE_ROW:
            raise WorkerError(
                "-sm row (split_mode 2) divides matrices between GPUs of one machine; workers take layers: -sm layer"
            )
        self.devices = with_workers(workers, verbose=verbose) if workers else None
        if shares is not None:  # else no device is asked for
            n_devices = len(devices.usual() if self.devices is None else self.devices)
            if len(shares) > max(1, n_devices):
                raise OutOfRange(f"tensor_split has {len(shares)} shares, for {n_devices} devices; give one for each")
        self._array = None if self.devices is None else (ctypes.c_void_p * (len(self.devices) + 1))(*self.devices, None)

    def fill(self, params: Any) -> None:
        """Name the devices to these `llama_model_params`."""
        if self._array is not None:
            params.devices = ctypes.cast(self._array, ctypes.c_void_p)


def advise(reason: str | None) -> str | None:
    """Why a model could not be placed, in llama.cpp's words, with what to do where more is known."""
    if reason and "does not support split buffers" in reason:  # load_tensors() in llama-model.cpp
        return f"{reason}, which -sm row (split_mode 2) takes; pass -sm layer"
    return reason


def of_params(params: Any) -> list[int] | None:
    """The devices that `llama_model_params` name; None if they leave the choice to llama.cpp."""
    if not params.devices:
        return None
    named = ctypes.cast(params.devices, ctypes.POINTER(ctypes.c_void_p))
    found: list[int] = []
    while (device := named[len(found)]) is not None:
        found.append(device)
    return found


def with_workers(addresses: Sequence[WorkerAddress], *, verbose: bool = False) -> list[int]:
    """Devices for a model's layers, in the order in which llama.cpp fills them: the workers', then this machine's GPUs.

    They are not registered, so a model that names no workers does not get layers there. Raises `WorkerError`.
    """
    with engine_log.captured(verbose) as log:
        _c.llama_supports_rpc()  # loads the backends
        connected = devices.rpc_function("ggml_backend_rpc_is_connected", ctypes.c_bool, ctypes.c_char_p)
        add = devices.rpc_function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)
        if connected is None:
            raise WorkerError(f"this build of llama.cpp has no RPC backend; {native.REMEDY}, without GGML_RPC=OFF")
        # One that serves this process answers no other connection meanwhile.
        check_workers([address for address in addresses if not connected(str(address).encode())])
        lent: list[int] = []
        for address in addresses:
            worker = add(str(address).encode())
            if not worker:
                raise WorkerError(log.reason or f"the worker {address} has no device")
            lent += devices.of_server(worker)
        return lent + devices.usual()


def layer_devices(model: Any) -> tuple[int, ...]:
    """The device of each layer, and last the output's. model: a `llama_model_p`."""
    n_layer = _c.llama_model_n_layer(model)
    return tuple(native.llama_model_layer_dev(model, layer) for layer in range(n_layer + 1))


def lost_worker(ctx: Any) -> str | None:
    """What to tell of a worker that this context has lost; None without one. ctx: a `llama_context_p`."""
    device = native.llama_lost_dev(ctx)
    if device is None:
        return None
    return (
        f"the worker {devices.description_of(device)} is lost: it ended, could not compute, or the network failed; "
        "start it again, and load the model again"
    )


def in_words(layers: Sequence[int]) -> str:
    """Where the layers are: `layers 0-13 on 192.168.1.5:50052, 14-27 on this CPU`. layers: the device of each."""
    words, first = [], 0
    for device, run in groupby(layers):
        last = first + len(list(run)) - 1
        if devices.is_workers(device):
            where = devices.description_of(device)
        else:
            where = f"{devices.name_of(device)} of this machine" if devices.is_gpu(device) else "this CPU"
        words.append(f"{first}-{last} on {where}" if last > first else f"{first} on {where}")
        first = last + 1
    return "layers " + ", ".join(words)
