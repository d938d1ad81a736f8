"""The model that comes with the package: small, made to answer questions about facts in long documents, no more."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from swaa_local.errors import SWAAError

NAME = "needle.gguf"
TEMPLATE = "needle.jinja"
NOTE = (
    "this is the bundled model: it answers questions about facts in a text and can do nothing else; for a real one: "
    "swaa-local convert unsloth/Qwen3-4B-Instruct-2507-GGUF:Q4_K_M -o qwen.gguf --preset qwen3-4b"
)
"""What a user should know who did not ask for it."""

CHAT_SETTINGS: Mapping[str, Any] = MappingProxyType({"temp": 0.0, "max_tokens": 256})
"""Settings of a chat that the user did not choose. Its answers take under 100 tokens; spoken to without a text it does
not find an end."""


class NoBundledModel(SWAAError):
    """This installation lacks the model."""


def bundled_model() -> Path:
    """The GGUF's path. Raises `NoBundledModel`."""
    return _installed(NAME)


def bundled_template() -> Path:
    """The GGUF's chat template, with thoughts of earlier turns: llama-server knows a thinking model by these.

    Raises `NoBundledModel`.
    """
    return _installed(TEMPLATE)


def is_bundled(path: Path) -> bool:
    """True if the file is the bundled model."""
    with as_file(files("swaa_local") / "assets" / NAME) as ours:
        return ours.is_file() and path.is_file() and path.samefile(ours)


def _installed(name: str) -> Path:
    with as_file(files("swaa_local") / "assets" / name) as path:
        # Wheels are unpacked on installation, so the path stays valid.
        if path.is_file():
            return path
    raise NoBundledModel(f"this installation has no bundled model (swaa_local/assets/{name}); name a GGUF file")
