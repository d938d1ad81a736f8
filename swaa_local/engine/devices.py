"""llama.cpp's devices: this machine's, those of workers, and which one a layer is on.

Knows ggml's device interface. A device is a pointer of ggml's, which lives as long as the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.engine import log as engine_log
from swaa_local.engine import native
from swaa_local.engine.workers import WorkerAddress, WorkerError, check_workers
from swaa_local.errors import OutOfRange

_GPU, _IGPU = 1, 2  # ggml_backend_dev_type
_lib = _c._lib
_size_p = ctypes.POINTER(ctypes.c_size_t)


class _Props(ctypes.Structure):
    """struct ggml_backend_dev_props, up to what is used of it, and room for the rest."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("rest", ctypes.c_uint8 * 64),
    )


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_lib, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_dev_count = _function("ggml_backend_dev_count", ctypes.c_size_t)
_dev_get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
_dev_type = _function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_dev_name = _function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
_dev_description = _function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
_dev_memory = _function("ggml_backend_dev_memory", None, ctypes.c_void_p, _size_p, _size_p)
_dev_props = _function("ggml_backend_dev_get_props", None, ctypes.c_void_p, ctypes.POINTER(_Props))
_dev_reg = _function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)
_reg_name = _function("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p)
_reg_by_name = _function("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)
_reg_dev_count = _function("ggml_backend_reg_dev_count", ctypes.c_size_t, ctypes.c_void_p)
_reg_dev_get = _function("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_reg_proc = _function("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


def this_machines() -> list[int]:
    """All devices of this machine, the CPU's too."""
    return [_dev_get(index) for index in range(_dev_count())]


def gpus() -> list[int]:
    """GPUs of this machine."""
    return [device for device in this_machines() if _dev_type(device) in (_GPU, _IGPU)]


def name_of(device: int) -> str:
    """As llama.cpp's options call it: CPU, CUDA0."""
    return str(_dev_name(device).decode(errors="replace"))


def description_of(device: int) -> str:
    """The model of a GPU or CPU; a worker's address."""
    return str(_dev_description(device).decode(errors="replace"))


def free_bytes(devices: Sequence[int]) -> int | None:
    """Free memory of these devices together, by their own account; None if they do not tell."""
    found = 0
    for device in devices:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found += free.value
    return found or None


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
            n_devices = len(_local() if self.devices is None else self.devices)
            if len(shares) > max(1, n_devices):
                raise OutOfRange(f"tensor_split has {len(shares)} shares, for {n_devices} devices; give one for each")
        self._array = None if self.devices is None else (ctypes.c_void_p * (len(self.devices) + 1))(*self.devices, None)

    def fill(self, params: Any) -> None:
        """Name the devices to these `llama_model_params`."""
        if self._array is not None:
            params.devices = ctypes.cast(self._array, ctypes.c_void_p)


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
        rpc = _reg_by_name(b"RPC")
        if not rpc:
            raise WorkerError(f"this build of llama.cpp has no RPC backend; {native.REMEDY}, without GGML_RPC=OFF")
        # One that serves this process answers no other connection meanwhile.
        connected = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_char_p)(_reg_proc(rpc, b"ggml_backend_rpc_is_connected"))
        check_workers([address for address in addresses if not connected(str(address).encode())])
        add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(_reg_proc(rpc, b"ggml_backend_rpc_add_server"))
        devices = []
        for address in addresses:
            worker = add(str(address).encode())
            if not worker:
                raise WorkerError(log.reason or f"the worker {address} has no device")
            devices += [_reg_dev_get(worker, index) for index in range(_reg_dev_count(worker))]
        return devices + _local()


def _local() -> list[int]:
    """This machine's GPUs as llama.cpp chooses them: each once, and integrated ones if there is no other."""
    discrete = [device for device in gpus() if _dev_type(device) == _GPU]
    chosen: dict[bytes | int, int] = {}
    for device in discrete or gpus():
        props = _Props()
        _dev_props(device, ctypes.byref(props))
        chosen.setdefault(props.device_id or device, device)
    return list(chosen.values())


def is_workers(device: int) -> bool:
    """Whether this device is a worker's."""
    return bool(_reg_name(_dev_reg(device)) == b"RPC")


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
        f"the worker {description_of(device)} is lost: it ended, could not compute, or the network failed; "
        "start it again, and load the model again"
    )


def in_words(layers: Sequence[int]) -> str:
    """Where the layers are: `layers 0-13 on 192.168.1.5:50052, 14-27 on this CPU`. layers: the device of each."""
    words, first = [], 0
    for device, run in groupby(layers):
        last = first + len(list(run)) - 1
        if is_workers(device):
            where = description_of(device)
        else:
            where = "this CPU" if _dev_type(device) not in (_GPU, _IGPU) else f"{name_of(device)} of this machine"
        words.append(f"{first}-{last} on {where}" if last > first else f"{first} on {where}")
        first = last + 1
    return "layers " + ", ".join(words)
