"""What to tell a user whose layers go to no GPU, though the engine is built for one or some were asked for.

Knows which drivers the kinds of GPU need; nothing of models. Which devices there are, `devices` knows.
"""

from __future__ import annotations

from swaa_local.engine import devices
from swaa_local.engine.context_length import has_gpu
from swaa_local.engine.options import EngineOptions

_ADVICE = {
    "CUDA": "`nvidia-smi` tells whether NVIDIA's driver works",
    "ROCm": "`rocminfo` tells whether AMD's driver works",
    "Vulkan": "install the GPU's Vulkan driver (`vulkaninfo --summary` lists what there is; llvmpipe, which is on the "
    "CPU, does not count)",
}


class NoGPUWarning(UserWarning):
    """Layers were meant for a GPU, and all of them are on the CPU."""


def told_of_a_command(engine: EngineOptions) -> str | None:
    """`without_gpu` for these options, which workers make void."""
    return None if engine.rpc_servers else without_gpu(engine.n_gpu_layers, option="-ngl", verbose=engine.verbose)


def without_gpu(n_gpu_layers: int, *, option: str, verbose: bool = False) -> str | None:
    """What to tell a user who asks for n_gpu_layers on a GPU (-1: all there are); None where it is as they want it.

    option: how they say so. That an engine for CPUs alone has no GPU is told to those only who named a number.
    """
    if n_gpu_layers == 0 or has_gpu(verbose):
        return None
    kinds = devices.built_for()
    if kinds:
        advice = "; ".join(_ADVICE[kind] for kind in kinds if kind in _ADVICE)
        known = f": {advice}" if advice else ""
        return (
            f"the engine is built for {' and '.join(kinds)}, but finds no such GPU, and runs on the CPU{known}; "
            f"{option} 0 asks for the CPU"
        )
    if n_gpu_layers > 0:
        return (
            f"{option} is {n_gpu_layers}, but the engine is built for CPUs alone, and runs there; docs/install.md says "
            "how to build it for a GPU"
        )
    return None
