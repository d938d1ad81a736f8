"""Tiny random models for tests, written with numpy and gguf-py alone.

`write_tiny_gguf` makes a complete GGUF (weights, a working byte-fallback tokenizer, a chat template) that any build of
llama.cpp loads. The weights are random but scaled so that attention is peaked and matters: logits change strongly with
the mask. `tiny_weights` returns the same weights as arrays for `reference_numpy`.

Knows nothing of `swaa_local`: the schedule keys are written here by hand, so that tests of the library's own reading
and writing have an oracle. Models made by transformers are in `tiny_hf.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.gguf_writer import GGUFValue

FULL, PREFILL, ALWAYS = 0, 1, 2

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_USER_DEFINED = ["<think>", "</think>"]
_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_PRINTABLE = ["\u2581"] + [chr(c) for c in range(0x21, 0x7F)]
VOCAB: list[str] = _SPECIAL + _USER_DEFINED + _BYTES + _PRINTABLE
N_VOCAB = len(VOCAB)
EOT_ID = VOCAB.index("<|im_end|>")

HEAD_DIM = 64 if os.environ.get("SWAA_TEST_GPU_LAYERS", "0") != "0" else 32
"""Elements of a head. CUDA has no flash attention for heads of 32: llama.cpp would compute it on the CPU."""

ARCHES = ("llama", "qwen2", "qwen3", "qwen3moe")


class ScheduleKeys(NamedTuple):
    """The `swaa.*` values of a GGUF (DESIGN section 3), unchecked, so that bad files can be written too."""

    window: int
    sinks: int
    layer_modes: Sequence[int]
    version: int = 1
    tail: int | None = None


@dataclass(frozen=True)
class TinyShape:
    """Shape of a tiny model. `head_dim` is a multiple of 32, so that q8_0 and q4_0 caches work."""

    arch: str = "qwen3"
    n_layer: int = 4
    n_embd: int = 4 * HEAD_DIM
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = HEAD_DIM
    n_ff: int = 96
    n_expert: int = 4
    n_expert_used: int = 2
    n_ctx_train: int = 4096
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    n_vocab: int = N_VOCAB


def with_own_windows(window: int, has_window: Sequence[bool]) -> dict[str, Any]:
    """Keywords for `write_tiny_gguf` that make a model whose layers have sliding windows of their own where it says so.

    llama.cpp computes Mellum as Qwen3 MoE with such windows, so `reference_numpy` knows it by that name.
    """
    keys = {"sliding_window": window, "sliding_window_pattern": [bool(each) for each in has_window]}
    extra = {f"mellum.attention.{name}": value for name, value in keys.items()}
    return {"arch": "qwen3moe", "file_arch": "mellum", "n_layer": len(has_window), "extra": extra}


def tiny_weights(shape: TinyShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under their GGUF tensor names, shape (rows = outputs, columns = inputs).

    Scores q.k/sqrt(d) get a standard deviation of about 1, and the parts of a layer are balanced so that one key more
    or less in the mask moves some logits by about half of their standard deviation, while an f16 KV cache and the
    flash attention of the CPU move them by less than 1 % of it. Rows of the output matrix that belong to special and
    byte tokens are zero: greedy text is printable ASCII and ends by length, not by chance.
    """
    if shape.arch not in ARCHES:
        raise ValueError(f"tiny models are written for {', '.join(ARCHES)}, not {shape.arch!r}")
    rng = np.random.default_rng(seed)
    e, d, ff = shape.n_embd, shape.head_dim, shape.n_ff
    q, kv = shape.n_head * d, shape.n_head_kv * d
    qk_norm = shape.arch in ("qwen3", "qwen3moe")

    def mat(*dims: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(dims) * gain / np.sqrt(dims[-1])).astype(np.float32)

    def norm(n: int, gain: float = 1.0) -> np.ndarray:
        return (gain * (1 + 0.1 * rng.standard_normal(n))).astype(np.float32)

    w = {"token_embd.weight": rng.standard_normal((shape.n_vocab, e)).astype(np.float32)}
    for i in range(shape.n_layer):
        p = f"blk.{i}."
        w[p + "attn_norm.weight"] = norm(e)
        w[p + "attn_q.weight"] = mat(q, e)
        w[p + "attn_k.weight"] = mat(kv, e)
        w[p + "attn_v.weight"] = mat(kv, e)
        w[p + "attn_output.weight"] = mat(e, q, gain=0.6)
        if shape.arch == "qwen2":
            w[p + "attn_q.bias"] = norm(q, 0.2)
            w[p + "attn_k.bias"] = norm(kv, 0.2)
            w[p + "attn_v.bias"] = norm(kv, 0.2)
        if qk_norm:
            w[p + "attn_q_norm.weight"] = norm(d)
            w[p + "attn_k_norm.weight"] = norm(d)
        w[p + "ffn_norm.weight"] = norm(e)
        if shape.arch == "qwen3moe":
            n = shape.n_expert
            # Experts alike and a decided router, so that a rounding error that flips a close choice costs little.
            w[p + "ffn_gate_inp.weight"] = mat(n, e, gain=24.0)
            w[p + "ffn_gate_exps.weight"] = mat(ff, e) + mat(n, ff, e, gain=0.06)
            w[p + "ffn_up_exps.weight"] = mat(ff, e) + mat(n, ff, e, gain=0.06)
            w[p + "ffn_down_exps.weight"] = 0.3 * mat(e, ff) + mat(n, e, ff, gain=0.02)
        else:
            w[p + "ffn_gate.weight"] = mat(ff, e)
            w[p + "ffn_up.weight"] = mat(ff, e)
            w[p + "ffn_down.weight"] = mat(e, ff, gain=0.3)
    w["output_norm.weight"] = norm(e)
    w["output.weight"] = mat(shape.n_vocab, e)
    w["output.weight"][[i for i, t in enumerate(VOCAB[: shape.n_vocab]) if not _is_text(t)]] = 0
    return w


def _is_text(token: str) -> bool:
    return len(token) == 1 or token == "<0x0A>"


def write_tiny_gguf(
    path: str | Path,
    *,
    arch: str = "qwen3",
    n_layer: int = 4,
    n_ctx_train: int = 4096,
    seed: int = 0,
    chat_template: str | None = CHATML,
    extra: Mapping[str, Any] | None = None,
    schedule: ScheduleKeys | Any | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    weight_type: str = "F32",
    file_arch: str | None = None,
    **dims: Any,
) -> Path:
    """Write a tiny model and return its path.

    `extra`: further keys (bool, int -> u32, negative int -> i32, float -> f32, str, list; `GGUFValue` for any other
    type). `schedule`: anything with `window`, `sinks` and `layer_modes`, written as the `swaa.*` keys.
    `weights`: instead of `tiny_weights(shape, seed)`. `weight_type`: of the matrices, such as Q8_0, in gguf-py's
    rounding. `file_arch`: claim another architecture than `arch`.
    `dims`: further fields of `TinyShape`.
    """
    shape = TinyShape(arch=arch, n_layer=n_layer, n_ctx_train=n_ctx_train, **dims)
    writer = gguf.GGUFWriter(str(path), file_arch or arch)
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    if arch == "qwen3moe":
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff)
    add_tokenizer(writer, chat_template)
    if schedule is not None:
        writer.add_uint32("swaa.version", getattr(schedule, "version", 1))
        writer.add_uint32("swaa.window", schedule.window)
        writer.add_uint32("swaa.sinks", schedule.sinks)
        writer.add_array("swaa.layer_modes", [int(m) for m in schedule.layer_modes])
        if (tail := getattr(schedule, "tail", None)) is not None:
            writer.add_uint32("swaa.tail", tail)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    kind = gguf.GGMLQuantizationType[weight_type]
    for name, array in (tiny_weights(shape, seed) if weights is None else weights).items():
        if is_matrix(name) and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def is_matrix(name: str) -> bool:
    """Whether `weight_type` applies. Norms, biases and routers stay as they are, as in every model."""
    return name.endswith(".weight") and "norm" not in name and "gate_inp" not in name


def add_tokenizer(writer: gguf.GGUFWriter, chat_template: str | None = CHATML) -> None:
    """SentencePiece-style tokenizer of single ASCII characters with byte fallback: any text survives the round trip."""
    kinds = dict.fromkeys(_BYTES, gguf.TokenType.BYTE) | dict.fromkeys(_SPECIAL[1:], gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(_USER_DEFINED, gguf.TokenType.USER_DEFINED) | {"<unk>": gguf.TokenType.UNKNOWN}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(VOCAB)
    writer.add_token_scores([0.0 if t in kinds else -1.0 for t in VOCAB])
    writer.add_token_types([kinds.get(t, gguf.TokenType.NORMAL) for t in VOCAB])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(VOCAB.index("<|endoftext|>"))
    writer.add_eos_token_id(EOT_ID)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, GGUFValue):
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, list(value))
    else:
        raise TypeError(f"{key}: no GGUF type for {value!r}")


def random_tokens(n: int, seed: int = 1, n_vocab: int = N_VOCAB) -> list[int]:
    """`n` random ordinary tokens, no control tokens."""
    return np.random.default_rng(seed).integers(len(_SPECIAL) + len(_USER_DEFINED), n_vocab, n).tolist()
