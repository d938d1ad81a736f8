"""LoRA adapters in the engine: loaded for a model, attached to each of its contexts, freed before the model.

What a file's header says, `model_file.adapter` knows. Models are `llama_model_p`, contexts `llama_context_p`.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as _c

from swaa_local.engine import log as engine_log
from swaa_local.engine import model_meta
from swaa_local.errors import GGUFError, ModelLoadError
from swaa_local.model_file.adapter import AdapterInfo, read_adapter
from swaa_local.text.printable import printable


class AdapterWarning(UserWarning):
    """An adapter runs on another model, or under another schedule, than it was tuned for."""


class LoadedAdapter:
    """An adapter and the model that it was loaded for. `free` it before the model."""

    def __init__(self, model: Any, path: str | os.PathLike[str], scale: float, *, verbose: bool) -> None:
        """Raises `ModelLoadError` for a file that is no adapter for this model.

        To be called before there is a context, which reserves its graphs for the adapters that it finds.
        """
        self.path, self.scale = Path(path), scale
        try:
            self.info: AdapterInfo = read_adapter(self.path)
        except GGUFError as error:
            raise ModelLoadError(f"the LoRA adapter {path} does not load: {error}") from error
        with engine_log.captured(verbose) as log:
            self._adapter = _c.llama_adapter_lora_init(model, os.fsencode(path))
        if not self._adapter:
            reason = self._other_architecture(model) or log.reason
            raise ModelLoadError(f"the LoRA adapter {path} does not load: {reason}")

    def _other_architecture(self, model: Any) -> str | None:
        mine = model_meta.text(model, "general.architecture") or "unknown"
        if self.info.architecture == mine:
            return None
        return f"it is for a model of architecture {printable(self.info.architecture)}, and this is {printable(mine)}"

    def attach(self, ctx: Any) -> None:
        """Make a new context use it."""
        adapters, scales = (_c.llama_adapter_lora_p_ctypes * 1)(self._adapter), (ctypes.c_float * 1)(self.scale)
        if _c.llama_set_adapters_lora(ctx, adapters, 1, scales):
            raise ModelLoadError(f"the LoRA adapter {self.path} cannot be set")

    def free(self) -> None:
        if self._adapter:
            _c.llama_adapter_lora_free(self._adapter)
            self._adapter = None
