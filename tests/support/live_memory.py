"""Bytes that a step holds at its peak, counted on PyTorch's meta device, which computes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Of all tensors that operators give while it is entered, but those that were there before."""

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._there = list(there)
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self._live_bytes -= self._sizes.pop(key)
