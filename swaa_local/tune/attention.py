"""Which kind of attention computes a schedule's masks on a device, found out by trying it.

Knows the kinds and the sizes of a model's heads; nothing else of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.tune import varlen
from swaa_local.tune.masks import dense_mask
from swaa_local.tune.request import Attention, AttentionKind, TuneError

_MOST = 0.05  # of the largest value; bfloat16 has 0.01


def choose_attention(wanted: Attention, device: str, config: Any, note: Callable[[str], None]) -> AttentionKind:
    """`auto` is what skips hidden keys fastest on the device. config: the model's; note: told why a GPU does not take
    flash attention. Raises `TuneError` where it was asked for and cannot run."""
    if wanted == "sdpa":
        return wanted
    why_not = _why_no_flash(device, config)
    if why_not is None:
        return "flash"
    if wanted == "flash":
        raise TuneError(f"windows cannot go through flash attention here: {why_not}; pass --attention auto")
    if device == "cuda":
        note(f"attention is masked, which windows do not make cheaper; flash attention does not run: {why_not}")
    return "sdpa"


def _why_no_flash(device: str, config: Any) -> str | None:
    if device != "cuda":
        return f"it needs a CUDA GPU, and the device is {device}"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"
    n_head, n_head_kv, head_dim = heads(config)
    return why_no_flash(device, n_head, n_head_kv, head_dim)


def heads(config: Any) -> tuple[int, int, int]:
    """How many of queries, how many of keys and values, and their size."""
    n_head = config.num_attention_heads
    n_head_kv = getattr(config, "num_key_value_heads", None) or n_head
    return n_head, n_head_kv, getattr(config, "head_dim", None) or config.hidden_size // n_head


def why_no_flash(device: str, n_head: int, n_head_kv: int, head_dim: int) -> str | None:
    """What keeps flash attention from a schedule's masks on this device, for heads like these; None where nothing does.

    A short row is tried, there and back: builds of PyTorch and GPUs differ in what they have, and in what they say.
    """
    texts, schedule = ((70, 40), (30, 30)), Schedule(8, 3, (LayerMode.PREFILL,))
    mask = dense_mask(texts, LayerMode.PREFILL, schedule, "cpu")[0]
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (
        torch.randn(n, 100, head_dim, generator=generator) for n in (n_head, n_head_kv, n_head_kv, n_head)
    )
    exact = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    keys, values = (tensor.repeat_interleave(n_head // n_head_kv, 0) for tensor in exact[1:])
    wanted = torch.nn.functional.scaled_dot_product_attention(exact[0], keys, values, mask)
    (wanted * weights).sum().backward()
    try:
        q, k, v = tried = [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in (q, k, v)]
        calls = varlen.calls_of(texts, LayerMode.PREFILL, schedule, device)
        out = varlen.attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), calls, None).transpose(0, 1)
        (out * weights.to(device)).sum().backward()
        found = [out.detach(), *(tensor.grad for tensor in tried)]
    except (RuntimeError, AttributeError, TypeError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"PyTorch {torch.__version__} cannot run it: {what[:200]}"
    for mine, theirs in zip(found, [wanted.detach(), *(tensor.grad for tensor in exact)], strict=True):
        assert mine is not None
        assert theirs is not None
        if not (mine.float().cpu() - theirs).abs().max() < _MOST * theirs.abs().max():  # nor for what is no number
            return f"PyTorch {torch.__version__} gives other results than under a mask"
    return None
