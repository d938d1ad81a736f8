"""The LoRA adapter of a `Llama`: loaded between its model and its context, set in each context, and freed with them.

Uses what `upstream.RELIED_ON` lists. Knows nothing of how the model was loaded, nor of an adapter's file (`adapter`).
"""

from __future__ import annotations

import warnings

import llama_cpp

from swaa_local.engine.adapter import AdapterWarning, LoadedAdapter
from swaa_local.model_file.adapter import adapter_remarks
from swaa_local.schedule.config import Schedule


class AdaptedLlama(llama_cpp.Llama):
    """What `upstream.LoadedLlama` does with an adapter, where there is one."""

    schedule: Schedule | None
    _adapter_path: str | None
    _adapter: LoadedAdapter | None = None

    def _load_adapter(self) -> None:
        """Before there is a context: it reserves graphs for the adapters that it finds."""
        if self._adapter_path is None or self.model_params.vocab_only:
            return
        self._adapter = LoadedAdapter(self.model, self._adapter_path, self.lora_scale, verbose=self.verbose)
        self._stack.callback(self._adapter.free)
        self._warn_of_adapter(stacklevel=6)

    def _attach_adapter(self) -> None:
        self.lora_path, self._lora_adapter = self._adapter_path, self._adapter  # as upstream calls them
        if self._adapter is not None:
            self._adapter.attach(self.ctx)

    def _warn_of_adapter(self, *, stacklevel: int) -> None:
        if self._adapter is not None:
            for remark in adapter_remarks(self._adapter.info, self.model_path, [self.schedule]):
                warnings.warn(remark, AdapterWarning, stacklevel=stacklevel)
