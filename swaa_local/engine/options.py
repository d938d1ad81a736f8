"""How the engine is to run, as a user asks for it: plain data, importable without the engine. Names are llama.cpp's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from swaa_local.engine.workers import WorkerAddress
from swaa_local.files.fingerprint import fingerprint
from swaa_local.model_file.adapter import Adapter

SPLIT_MODES = ("none", "layer", "row")
"""How layers are divided between devices, in the order of llama.cpp's numbers."""
ROPE_SCALINGS = ("none", "linear", "yarn")
"""How positions beyond those of the training are met, in the order of llama.cpp's numbers."""

ROPE = ("rope_scaling", "rope_scale", "yarn_orig_ctx")
"""The fields that say how RoPE is scaled."""
ROPE_SCALES = (1e-6, 1e6)
"""Least and most of `rope_scale`."""


@dataclass(frozen=True)
class EngineOptions:
    """What the user said of the engine; None where they said nothing. Threads and tokens are counts."""

    n_gpu_layers: int = -1
    rpc_servers: tuple[WorkerAddress, ...] = ()
    split_mode: str | None = None
    tensor_split: tuple[float, ...] | None = None
    main_gpu: int | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    flash_attn: bool | None = None
    type_k: str | None = None
    type_v: str | None = None
    rope_scaling: str | None = None
    rope_scale: float | None = None
    yarn_orig_ctx: int | None = None
    lora: Adapter | None = None
    draft_window: int | None = None
    speculate: bool | Literal["auto"] = "auto"
    verbose: bool = False

    def for_log(self) -> dict[str, Any]:
        """What answers and their times depend on, for a log that must not mix those of others: plain data.

        What nobody said of adapters, devices and RoPE is not named, so that logs from before there were any go on.
        """
        names = (
            "n_threads",
            "n_threads_batch",
            "n_batch",
            "n_ubatch",
            "n_gpu_layers",
            "flash_attn",
            "type_k",
            "type_v",
        )
        lora = {} if self.lora is None else {"lora": str(self.lora), "lora_sha256": fingerprint(self.lora.path)}
        said = {name: value for name, value in self.placement().items() if getattr(self, name)}
        rope = {name: getattr(self, name) for name in ROPE if getattr(self, name) is not None}
        return lora | said | rope | {name: getattr(self, name) for name in names}

    def arguments(self) -> dict[str, Any]:
        """Keywords of `Llama`. Threads of -t serve the prompt too where -tb is not given."""
        from swaa_local.engine.kv_types import kv_type_id

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("lora", *ROPE):
            del given[name]
        if self.lora is not None:
            given |= {"lora_path": str(self.lora.path), "lora_scale": self.lora.scale}
        given |= self.placement() | self._rope()
        given["n_threads_batch"] = self.n_threads_batch or self.n_threads
        for name in ("type_k", "type_v"):
            given[name] = None if given[name] is None else kv_type_id(given[name])
        if self.n_ubatch is None:
            del given["n_ubatch"]
        return given

    def _rope(self) -> dict[str, Any]:
        """`Llama`'s keywords for those of RoPE; 0 is the model's own."""
        scaling = -1 if self.rope_scaling is None else ROPE_SCALINGS.index(self.rope_scaling)
        return {
            "rope_scaling_type": scaling,
            "rope_freq_scale": 1 / self.rope_scale if self.rope_scale else 0.0,
            "yarn_orig_ctx": self.yarn_orig_ctx or 0,
        }

    @property
    def scales_rope(self) -> bool:
        """Whether the user meets longer texts than the model was trained on, by their own word."""
        return self.rope_scale is not None or self.rope_scaling not in (None, "none")

    def placement(self) -> dict[str, Any]:
        """Those of the keywords that say on which device a layer is."""
        return {
            "rpc_servers": [str(address) for address in self.rpc_servers],
            "split_mode": SPLIT_MODES.index(self.split_mode or "layer"),
            "tensor_split": None if self.tensor_split is None else list(self.tensor_split),
            "main_gpu": self.main_gpu or 0,
        }
