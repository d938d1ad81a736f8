"""The engine on Vulkan: the parity grid and the engine's other tests, in processes of their own, and what users see.

SWAA_VULKAN_LIB=DIR names the folder of the libraries of a build with GGML_VULKAN=on, as its wheel holds them in
llama_cpp/lib; without it the installed engine is taken, if it is built for Vulkan. The device is the first GPU, or else
the first device that there is: Mesa's lavapipe computes on the CPU, and ggml takes it only when it is told to. So these
tests take long without a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from tests.support.program import ROOT, environment, run

INSTALLED = Path(llama_cpp.llama_cpp._lib._name).parent
LIBRARIES = Path(os.environ.get("SWAA_VULKAN_LIB", INSTALLED))
IS_NAMED = "SWAA_VULKAN_LIB" in os.environ
_BACKEND = "*ggml-vulkan.*"
pytestmark = [
    pytest.mark.skipif(
        not IS_NAMED and not any(INSTALLED.glob(_BACKEND)),
        reason="SWAA_VULKAN_LIB names no build with Vulkan, and the installed engine is none",
    ),
    pytest.mark.timeout(3600),
]

# Of the tests of the engine, those for which it makes no difference that there is a GPU.
_NOT_OF_A_DEVICE = {
    "test_amx.py",
    "test_context_cost.py",
    "test_cpu_decode.py",
    "test_cpu_mul_mat.py",
    "test_cpu_prefill.py",
    "test_crash.py",
    "test_dequantize.py",
    "test_devices.py",
    "test_draft_control.py",
    "test_exact_passes.py",  # of the CPU's kernels; skipped where there are layers on a GPU
    "test_log.py",
    "test_message_form.py",
    "test_metal.py",
    "test_other_cpu.py",
    "test_process_memory.py",
    "test_rpc.py",
    "test_threads.py",
    "test_upstream.py",
    "test_vulkan.py",
}
TESTS = sorted(file.name for file in Path(__file__).parent.glob("test_*.py") if file.name not in _NOT_OF_A_DEVICE)

_LIST_GPUS = """
import json
from llama_cpp import llama_cpp as c
from swaa_local.engine import devices
c.llama_supports_gpu_offload()
print(json.dumps([[devices.name_of(device), devices.description_of(device)] for device in devices.usual()]))
"""


def gpus(env: dict[str, str]) -> list[list[str]]:
    """Name and description of each device that layers would go to."""
    done = subprocess.run([sys.executable, "-c", _LIST_GPUS], env=env, capture_output=True, text=True, check=True)
    found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@functools.cache
def on_vulkan() -> tuple[dict[str, str], str]:
    """The environment in which this build computes on Vulkan, and what the device is called."""
    env = environment(LLAMA_CPP_LIB_PATH=str(LIBRARIES))
    env.pop("SWAA_STOCK_LIB", None)  # another computer's logits are not the CPU's to the bit
    # Of these tests together: compiling the shaders takes lavapipe minutes, and each process has a cache of its own.
    env.setdefault("MESA_SHADER_CACHE_DIR", env["XDG_CACHE_HOME"])
    for tried in (env, env | {"GGML_VK_VISIBLE_DEVICES": "0"}):
        found = gpus(tried)
        if found and found[0][0].startswith("Vulkan"):
            return tried, found[0][1]
    pytest.fail(f"{LIBRARIES} finds no Vulkan device; `vulkaninfo --summary` tells what there is", pytrace=False)


@pytest.mark.timeout(0)  # without a GPU some files take hours; each of their tests has its limit
@pytest.mark.parametrize("file", TESTS)
def test_the_engine_s_tests_pass_on_vulkan(file: str) -> None:
    """The same tests as on the CPU, with all layers on the device. Parity is compared with transformers."""
    if file.startswith("test_parity"):
        for package in ("torch", "transformers", "sentencepiece"):
            pytest.importorskip(package, reason=f"{package} is not installed, so nothing is compared with transformers")
    env, _ = on_vulkan()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=1200", f"tests/engine/{file}"],
        env=env | {"SWAA_TEST_GPU_LAYERS": "99"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-2000:]


def test_layers_go_to_the_device(tmp_path: Path) -> None:
    """By the command line, which names it."""
    env, device = on_vulkan()
    arguments = ("bench", "-p", "256", "-n", "4", "-r", "1", "-t", "1", "--variants", "file", "-o", "json")
    done = run(*arguments, cwd=tmp_path, **{name: env[name] for name in env if name.startswith(("LLAMA_", "GGML_"))})
    assert done.returncode == 0, done.stderr
    assert device in done.stdout
    assert "finds no such GPU" not in done.stderr


@pytest.mark.parametrize(
    "missing",
    [{"VK_DRIVER_FILES": "/nowhere.json", "VK_ICD_FILENAMES": "/nowhere.json"}, {"GGML_VK_VISIBLE_DEVICES": ""}],
    ids=["no driver", "no device"],
)
def test_a_machine_without_a_device_is_told(missing: dict[str, str], tmp_path: Path) -> None:
    """Once, by what is missing and how to be rid of the note; and the answer comes, from the CPU."""
    arguments = ("chat", "-p", "Hello", "-n", "4", "-t", "1", "-c", "512", "--no-cache")
    env = {"LLAMA_CPP_LIB_PATH": str(LIBRARIES)} | missing
    done = run(*arguments, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the engine is built for Vulkan, but finds no such GPU, and runs on the CPU") == 1
    assert "vulkaninfo --summary" in done.stderr
    silent = run(*arguments, "-ngl", "0", cwd=tmp_path, **env)
    assert silent.returncode == 0, silent.stderr
    assert "GPU" not in silent.stderr
    quiet = run(*arguments, "-q", cwd=tmp_path, **env)
    assert (quiet.returncode, quiet.stderr) == (0, "")
