"""Which of a machine's GPUs count: those that llama.cpp gives layers to, each once. The machines here are made up."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest

from swaa_local.engine import devices, memory

GPU, IGPU = 1, 2


class Device(NamedTuple):
    """A device as ggml tells it; free: bytes."""

    kind: int
    backend: int
    name: str
    device_id: bytes | None
    free: int


CUDA, VULKAN = 1, 2
CARD = Device(GPU, CUDA, "GeForce", b"0000:01:00.0", 8 << 30)
CARD_BY_VULKAN = CARD._replace(backend=VULKAN)
INTEGRATED = Device(IGPU, VULKAN, "Iris Xe", b"0000:00:02.0", 20 << 30)
SECOND_INTEGRATED = INTEGRATED._replace(name="other", device_id=b"0000:00:03.0")
TEGRA, TEGRA_BY_VULKAN = (Device(IGPU, backend, "Orin", None, 30 << 30) for backend in (CUDA, VULKAN))

MACHINES = {
    "a laptop with one integrated GPU": ([INTEGRATED], [INTEGRATED]),
    "a laptop with both": ([INTEGRATED, CARD_BY_VULKAN], [CARD_BY_VULKAN]),
    "a card that two backends see": ([CARD, CARD_BY_VULKAN, INTEGRATED], [CARD]),
    "two integrated ones of one backend": ([INTEGRATED, SECOND_INTEGRATED], [INTEGRATED, SECOND_INTEGRATED]),
    "an integrated one that two backends see": ([TEGRA, TEGRA_BY_VULKAN], [TEGRA]),
    "none": ([], []),
}


@pytest.fixture
def machine(request, monkeypatch) -> list[Device]:
    """The devices that count, on a machine of this name."""
    there, usual = MACHINES[request.param]

    def fill(device: int, props) -> None:
        props._obj.device_id = there[device].device_id

    def memory_of(device: int, free, _total) -> None:
        ctypes.cast(free, ctypes.POINTER(ctypes.c_size_t))[0] = there[device].free

    monkeypatch.setattr(devices, "gpus", lambda: list(range(len(there))))
    monkeypatch.setattr(devices, "_dev_type", lambda device: there[device].kind)
    monkeypatch.setattr(devices, "_dev_reg", lambda device: there[device].backend)
    monkeypatch.setattr(devices, "_dev_props", fill)
    monkeypatch.setattr(devices, "_dev_memory", memory_of)
    monkeypatch.setattr(devices, "_dev_description", lambda device: there[device].name.encode())
    return usual


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_memory_and_names_are_of_the_devices_that_get_layers(machine):
    """Memory of a GPU that no layer goes to would make contexts that do not fit."""
    assert len(devices.usual()) == len(machine)
    assert memory.free_gpu_bytes() == (sum(device.free for device in machine) or None)
    assert memory.gpu_names() == tuple(device.name for device in machine)
