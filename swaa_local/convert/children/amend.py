"""What upstream's converter takes for something else, mended in its classes before it runs.

Each case is of a family that `convert` is tested with against transformers, and says what would come out without it.
Knows upstream's classes; copies none of their code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def amend_converter() -> None:
    """To be called once, when upstream's modules can be imported."""
    _take_away_missing_layers()
    _pair_what_is_rotated()
    _tell_dense_models()
    _read_mimo()


def _take_away_missing_layers() -> None:
    """Qwen3-Next and Qwen3.5 are published with a layer for multi-token prediction, which upstream's converter expects.
    transformers does not load it, so that it is missing in what was saved after training."""
    from conversion.qwen import _QwenMtpMixin

    original = _QwenMtpMixin.index_tensors

    @functools.wraps(original)
    def index_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = original(self, *args, **kwargs)
        if self.opt_num_mtp_layers == 0:
            self.no_mtp = True
        return tensors

    _QwenMtpMixin.index_tensors = index_tensors


def _pair_what_is_rotated() -> None:
    """Bamba rotates the first half of each head. Upstream's converter puts the rows of Q and K into the order in which
    llama.cpp rotates pairs as if it were all of the head, so that other pairs would be rotated."""
    from conversion.granite import GraniteHybridModel

    set_parameters, modify = GraniteHybridModel.set_gguf_parameters, GraniteHybridModel.modify_tensors

    def is_bamba(self: Any) -> bool:
        return "BambaForCausalLM" in self.hparams.get("architectures", ())

    def n_rotated(self: Any) -> int:
        if not self.hparams.get("attn_rotary_emb"):  # as transformers saves it
            share = (self.hparams.get("rope_parameters") or {}).get("partial_rotary_factor", 0.5)
            head_dim = self.hparams["hidden_size"] // self.hparams["num_attention_heads"]
            self.hparams["attn_rotary_emb"] = int(head_dim * share)
        return int(self.hparams["attn_rotary_emb"])

    @functools.wraps(set_parameters)
    def set_gguf_parameters(self: Any) -> None:
        if is_bamba(self):
            n_rotated(self)
        set_parameters(self)

    @functools.wraps(modify)
    def modify_tensors(self: Any, data_torch: Any, name: str, bid: int | None) -> Iterator[tuple[str, Any]]:
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if not (is_bamba(self) and heads):
            yield from modify(self, data_torch, name, bid)
            return
        n = n_rotated(self)
        rows = data_torch.reshape(self.hparams[heads], -1, *data_torch.shape[1:])
        pairs = rows[:, :n].reshape(len(rows), 2, n // 2, *data_torch.shape[1:]).swapaxes(1, 2)
        rotated = pairs.reshape(len(rows), n, *data_torch.shape[1:])
        self.undo_permute = False  # it is done
        try:
            yield from modify(self, _join(rotated, rows[:, n:]).reshape(data_torch.shape), name, bid)
        finally:
            del self.undo_permute

    GraniteHybridModel.set_gguf_parameters = set_gguf_parameters
    GraniteHybridModel.modify_tensors = modify_tensors


def _join(one: Any, other: Any) -> Any:
    import torch

    return torch.cat([one, other], dim=1)


_LAYERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def _tell_dense_models() -> None:
    """Upstream's converter tells a Nemotron-H with experts by a setting that transformers 5 adds to every one, and
    knows dense layers by the letters of older settings alone: a dense model would become one that lacks its experts.
    """
    from conversion.base import ModelBase

    original = ModelBase.load_hparams

    @functools.wraps(original)
    def load_hparams(dir_model: Path, is_mistral_format: bool) -> dict[str, Any]:
        hparams: dict[str, Any] = original(dir_model, is_mistral_format)
        if hparams.get("model_type") != "nemotron_h":
            return hparams
        said = json.loads((Path(dir_model) / "config.json").read_text(encoding="utf-8"))
        letters = said.get("hybrid_override_pattern")
        if letters is None:
            types = said.get("layers_block_type") or hparams.get("layers_block_type") or ()
            letters = "".join(_LAYERS.get(each, "?") for each in types)
        if "-" in letters and "E" not in letters:
            of_experts = {key for key in hparams if "expert" in key or key in ("n_group", "topk_group")}
            hparams = {key: value for key, value in hparams.items() if key not in of_experts}
            hparams["hybrid_override_pattern"] = letters
        return hparams

    ModelBase.load_hparams = staticmethod(load_hparams)


def _read_mimo() -> None:
    """Of MiMo V2, transformers 5 says for each kind of layer which part of a head is rotated, where upstream's code
    looks for one number, and it does not load the three layers for multi-token prediction, which that expects."""
    from conversion.mimo import MimoV2Model

    set_parameters, index = MimoV2Model.set_gguf_parameters, MimoV2Model.index_tensors

    @functools.wraps(set_parameters)
    def set_gguf_parameters(self: Any) -> None:
        of_full = self.rope_parameters.get("full_attention") or {}
        if "partial_rotary_factor" in of_full:
            self.rope_parameters.setdefault("partial_rotary_factor", of_full["partial_rotary_factor"])
        set_parameters(self)

    @functools.wraps(index)
    def index_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = index(self, *args, **kwargs)
        if not any(name.startswith("model.mtp.") for name in tensors):
            self.no_mtp = True
        return tensors

    MimoV2Model.set_gguf_parameters, MimoV2Model.index_tensors = set_gguf_parameters, index_tensors
