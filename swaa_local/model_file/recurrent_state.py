"""What the states of a model's recurrent layers take, by its metadata: `llama_hparams::n_embd_r` and `n_embd_s`.

A state is of one position of one sequence, in F32, however long the context is. Knows keys; nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swaa_local.schedule.model_layers import LayerKind, ModelLayers

_F32_BYTES = 4
_BESIDE_ATTENTION = frozenset(("falcon-h1",))
"""Which have a state in every layer."""
_LINEAR_ATTENTION = frozenset(("minimax-01",))


def state_bytes(architecture: str, layers: ModelLayers, get: Callable[[str], Any]) -> tuple[int, ...]:
    """Bytes of each layer's state, of one sequence; 0 for a layer without one. get: the value of a key, or None."""
    of_one = _F32_BYTES * _elements(architecture, lambda name: get(f"{architecture}.{name}"))
    everywhere = architecture in _BESIDE_ATTENTION
    return tuple(of_one if everywhere or kind is LayerKind.RECURRENT else 0 for kind in layers.kinds)


def _elements(architecture: str, value: Callable[[str], Any]) -> int:
    """Of the last inputs of the convolution, and of what has been summed up."""

    def number(name: str) -> int:
        said = value(name)
        return said if isinstance(said, int) else 0

    if l_cache := number("shortconv.l_cache"):
        return number("embedding_length") * (l_cache - 1)
    d_inner, d_state = number("ssm.inner_size"), number("ssm.state_size")
    convolved = max(0, number("ssm.conv_kernel") - 1) * (d_inner + 2 * number("ssm.group_count") * d_state)
    if architecture in _LINEAR_ATTENTION:
        n_head = _first(value("attention.head_count"))
        head_dim = number("attention.key_length") or number("embedding_length") // max(1, n_head)
        return convolved + head_dim**2 * n_head
    return convolved + d_state * d_inner


def _first(value: Any) -> int:
    """Of a number for all layers, or one for each."""
    first = next(iter(value), 0) if isinstance(value, list) else value
    return first if isinstance(first, int) else 0
