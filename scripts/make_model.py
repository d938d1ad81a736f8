#!/usr/bin/env python3
"""Write a GGUF with the shape of a real model and random weights, to measure speed offline.

    scripts/make_model.py --shape qwen3-4b --type q4_0 -o qwen3-4b.gguf
    scripts/make_model.py --shape qwen3-0.6b --layers 4 -o small.gguf                     # only its first layers
    scripts/make_model.py --shape llama3.1-8b -o l.gguf --window 2048 --sinks 100 --full-layers 1::2 --fa-decode
    swaa-local bench qwen3-4b.gguf -p 4096,16384 --variants "full,w2048 k100 fadec 1::2"

Speed does not depend on the values of the weights, so a file like this measures what the real one would. What the
model says is noise: its vocabulary has the real size, but holds single characters, bytes and made-up words. Needs
numpy and gguf, no PyTorch and no network. Tensors are made and written piece by piece, so memory stays small.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swaa_local.errors import SWAAError
from swaa_local.files.output_file import check_output, publish, terminable, workplace
from swaa_local.model_file.schedule_keys import (
    KEY_LAYER_MODES,
    KEY_SINKS,
    KEY_TAIL,
    KEY_VERSION,
    KEY_WINDOW,
    SCHEDULE_VERSION,
)
from swaa_local.schedule.choice import ScheduleOptions
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.presets import PRESETS, get_preset
from swaa_local.text.units import format_bytes

N_CTX = 131072
CHUNK_BYTES = 32 << 20
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Dimensions as in the `config.json` that the model was published with. n_ff: of an expert, where there are any."""

    name: str
    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    tied: bool
    """The output matrix is the embedding."""
    head_dim: int = 128
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_dense: int = 0
    """Of a layer without experts; metadata only."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3's: factor, low and high frequency factor, original context."""


SHAPES = {
    # Qwen/Qwen3-0.6B, Qwen/Qwen3-4B, meta-llama/Llama-3.1-8B, Qwen/Qwen3-30B-A3B
    "qwen3-0.6b": Shape("Qwen3-0.6B", "qwen3", 28, 1024, 16, 8, 3072, 151936, tied=True),
    "qwen3-4b": Shape("Qwen3-4B", "qwen3", 36, 2560, 32, 8, 9728, 151936, tied=True),
    "llama3.1-8b": Shape(
        *("Llama-3.1-8B", "llama", 32, 4096, 32, 8, 14336, 128256),
        tied=False,
        rope_base=5e5,
        norm_eps=1e-5,
        rope_scaling=(8.0, 1.0, 4.0, 8192),
    ),
    "qwen3-30b-a3b": Shape(
        *("Qwen3-30B-A3B", "qwen3moe", 48, 2048, 32, 4, 768, 151936),
        tied=False,
        n_expert=128,
        n_expert_used=8,
        n_ff_dense=6144,
    ),
    "tiny": Shape("Tiny", "qwen3", 4, 128, 4, 2, 256, 512, tied=True, head_dim=32),
}
FILE_TYPES = {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "f16": "MOSTLY_F16"}


@dataclass(frozen=True)
class Tensor:
    """dims: rows before columns, as numpy has them; the last is the one that quantization divides into blocks."""

    name: str
    dims: tuple[int, ...]
    type: Type
    values: np.ndarray[Any, Any] | None = None
    """None: random."""

    @property
    def n_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.dims) // block * size


def tensors(shape: Shape, type_name: str) -> Iterator[Tensor]:
    """All tensors of the model in the order of the file, in the types that llama-quantize gives them."""
    matrix = Type[type_name.upper()]
    # llama-quantize keeps more of the output matrix, be it the embedding or not.
    output = Type.Q6_K if matrix is Type.Q4_0 and shape.n_embd % gguf.GGML_QUANT_SIZES[Type.Q6_K][0] == 0 else matrix
    e, q, kv, ff = shape.n_embd, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim, shape.n_ff

    def ones(name: str, n: int) -> Tensor:
        return Tensor(f"{name}.weight", (n,), Type.F32, np.ones(n, np.float32))

    def weights(name: str, *dims: int, type: Type = matrix) -> Tensor:
        return Tensor(f"{name}.weight", dims, type)

    yield weights("token_embd", shape.n_vocab, e, type=output if shape.tied else matrix)
    yield ones("output_norm", e)
    if not shape.tied:
        yield weights("output", shape.n_vocab, e, type=output)
    if shape.rope_scaling is not None:
        factors = rope_factors(shape)
        yield Tensor("rope_freqs.weight", factors.shape, Type.F32, factors)
    for i in range(shape.n_layer):
        layer = f"blk.{i}."
        yield ones(layer + "attn_norm", e)
        yield weights(layer + "attn_q", q, e)
        yield weights(layer + "attn_k", kv, e)
        yield weights(layer + "attn_v", kv, e)
        if shape.arch != "llama":
            yield ones(layer + "attn_q_norm", shape.head_dim)
            yield ones(layer + "attn_k_norm", shape.head_dim)
        yield weights(layer + "attn_output", e, q)
        yield ones(layer + "ffn_norm", e)
        if shape.n_expert:
            n = shape.n_expert
            yield weights(layer + "ffn_gate_inp", n, e, type=Type.F32)
            yield weights(layer + "ffn_gate_exps", n, ff, e)
            yield weights(layer + "ffn_up_exps", n, ff, e)
            yield weights(layer + "ffn_down_exps", n, e, ff)
        else:
            yield weights(layer + "ffn_gate", ff, e)
            yield weights(layer + "ffn_up", ff, e)
            yield weights(layer + "ffn_down", e, ff)


def rope_factors(shape: Shape) -> np.ndarray[Any, Any]:
    """What Llama 3 divides each RoPE frequency by: high ones by 1, low ones by `factor`, smooth between."""
    assert shape.rope_scaling is not None
    factor, low, high, n_ctx = shape.rope_scaling
    wavelengths = 2 * math.pi * shape.rope_base ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    smooth = np.clip((n_ctx / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def random_rows(tensor: Tensor, rng: np.random.Generator) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor's bytes in pieces: weights around 0, about as large as keeps activations at the size of their inputs.

    Quantized values are random bits under one fixed scale, halves random bits with a fixed exponent: nothing is
    infinite or NaN.
    """
    spread = tensor.dims[-1] ** -0.5
    block, size = gguf.GGML_QUANT_SIZES[tensor.type]
    left = math.prod(tensor.dims) // block
    while left:
        n = min(left, CHUNK_BYTES // size)
        left -= n
        if tensor.type is Type.F32:
            yield rng.standard_normal(n, dtype=np.float32) * np.float32(spread)
            continue
        n_words = -(-n * size // 8)
        raw = rng.integers(0, 1 << 64, n_words, dtype=np.uint64).view(np.uint8)[: n * size]
        if tensor.type is Type.F16:
            halves = raw.view("<u2")
            exponent = 15 + round(math.log2(spread / 1.53))  # a mantissa between 1 and 2 has 1.53 as its mean square
            halves &= 0x83FF
            halves |= exponent << 10
            yield halves
            continue
        blocks = raw.reshape(n, size)
        # Root mean squares of uniform integers: 8 bits, 4 bits and 6 bits, the last under 8-bit scales, here 16.
        if tensor.type is Type.Q8_0:
            scale, at = spread / 73.9, slice(0, 2)
        elif tensor.type is Type.Q4_0:
            scale, at = spread / 4.64, slice(0, 2)
        else:
            scale, at = spread / (18.5 * 16), slice(208, 210)
            blocks[:, 192:208] = 16
        blocks[:, at] = np.frombuffer(np.array(scale, "<f2").tobytes(), np.uint8)
        yield blocks


def vocabulary(n: int) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a SentencePiece vocabulary: control tokens, bytes, characters, made-up words."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    plain = ["\u2581", *(chr(c) for c in range(0x21, 0x7F))]
    n_words = n - 1 - len(control) - len(bytes_) - len(plain)
    syllables = [a + b for a in "bcdfghjklmnpqrstvwxz" for b in "aeiou"]
    for i in range(n_words):
        (high, middle), low = divmod(i // 100, 100), i % 100
        plain.append(f"\u2581{syllables[high]}{syllables[middle]}{syllables[low]}")
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.BYTE] * len(bytes_)
    scores = [0.0] * len(kinds) + [-float(i) for i in range(len(plain))]
    return ["<unk>", *control, *bytes_, *plain], scores, kinds + [gguf.TokenType.NORMAL] * len(plain)


def write_metadata(
    writer: gguf.GGUFWriter, shape: Shape, type_name: str, n_ctx: int, schedule: Schedule | None
) -> None:
    writer.add_name(f"{shape.name} shape, random weights")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type_name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff_dense or shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert_used)
        writer.add_expert_feed_forward_length(shape.n_ff)
    tokens, scores, kinds = vocabulary(shape.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHATML)
    if schedule is not None:
        writer.add_uint32(KEY_VERSION, SCHEDULE_VERSION)
        writer.add_uint32(KEY_WINDOW, schedule.window)
        writer.add_uint32(KEY_SINKS, schedule.sinks)
        writer.add_array(KEY_LAYER_MODES, [int(mode) for mode in schedule.layer_modes])
        if schedule.tail:
            writer.add_uint32(KEY_TAIL, schedule.tail)


def write_model(
    path: Path, shape: Shape, type_name: str, *, n_ctx: int, schedule: Schedule | None, seed: int, progress: Progress
) -> None:
    """Write the file. Equal arguments give equal bytes."""
    planned = list(tensors(shape, type_name))
    progress.total = sum(tensor.n_bytes for tensor in planned)
    rng = np.random.Generator(np.random.SFC64(seed))
    with closing(gguf.GGUFWriter(str(path), shape.arch)) as writer:
        write_metadata(writer, shape, type_name, n_ctx, schedule)
        for tensor in planned:
            # The writer takes a dtype for the types that numpy has too, and overrides it with raw_dtype.
            writer.add_tensor_info(tensor.name, tensor.dims, np.dtype(np.float32), tensor.n_bytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        for tensor in planned:
            for piece in random_rows(tensor, rng) if tensor.values is None else [tensor.values]:
                piece.tofile(out)
                progress.wrote(piece.nbytes)
            writer.write_padding(out, tensor.n_bytes)


class Progress:
    """One line on stderr, redrawn if that is a terminal."""

    def __init__(self, name: str) -> None:
        self.total = 0
        self._name = name
        self._done = 0
        self._started = self._shown = time.monotonic()

    def wrote(self, n_bytes: int) -> None:
        self._done += n_bytes
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self._shown > 0.2 or self._done == self.total):
            self._shown = now
            left = (now - self._started) * (self.total / self._done - 1)
            share = f"{format_bytes(self._done)} of {format_bytes(self.total)}"
            end = "\n" if self._done == self.total else ""
            print(f"\r\x1b[K{self._name}: {share} · {left:.0f} s left", end=end, file=sys.stderr, flush=True)


def check_space(path: Path, needed: int) -> None:
    usage = shutil.disk_usage(path.absolute().parent)
    if usage.total and needed > usage.free:
        raise SWAAError(f"not enough space for {path}: {format_bytes(needed)} needed, {format_bytes(usage.free)} free")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES, help="the model whose shape to take")
    parser.add_argument("--type", default="q8_0", choices=FILE_TYPES, help="of the weights [q8_0]")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the GGUF to write [SHAPE-TYPE.gguf]")
    parser.add_argument("--layers", type=positive, metavar="N", help="only so many layers [all]")
    parser.add_argument(
        "--ctx",
        type=positive,
        default=N_CTX,
        metavar="TOKENS",
        help=f"context that it claims to be trained on [{N_CTX}]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights; the same seed gives the same file [0]")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    schedule = parser.add_argument_group("schedule", "stored in the file; as swaa-local convert takes it")
    schedule.add_argument("--preset", metavar="NAME", choices=PRESETS, help="a published one")
    schedule.add_argument(
        "--window", type=positive, metavar="TOKENS", help="sliding window W, the token itself included"
    )
    schedule.add_argument("--sinks", type=int, metavar="TOKENS", help="first tokens that stay visible to everyone [0]")
    schedule.add_argument(
        "--full-layers", metavar="LAYERS", help="layers that keep full attention: 1,3,5 or 0-3 or 1::2"
    )
    schedule.add_argument("--fa-decode", action="store_true", help="full attention for generated tokens")
    schedule.add_argument(
        "--tail", type=int, metavar="TOKENS", help="last tokens of a prompt with full attention [the preset's, or 0]"
    )
    options = parser.parse_args(arguments)
    details = options.sinks is not None or options.full_layers is not None or options.fa_decode
    if options.preset is not None and (options.window is not None or details):
        parser.error("a preset is a whole schedule; leave out the schedule's other options")
    if options.preset is None and options.window is None and (details or options.tail is not None):
        parser.error("a schedule needs a window: add --window TOKENS or --preset NAME")
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def chosen_schedule(options: argparse.Namespace, n_layer: int) -> Schedule | None:
    config = ScheduleOptions(
        preset=get_preset(options.preset) if options.preset is not None else None,
        window=options.window,
        sinks=options.sinks,
        full_layers=options.full_layers,
        fa_decode=options.fa_decode or None,
        tail=options.tail,
    ).config(n_layer)
    return config.schedule(n_layer) if config else None


def make_model(options: argparse.Namespace) -> Path:
    """Write what the options say, and return where it is. Raises `SWAAError`; then there is no file."""
    shape: Shape = SHAPES[options.shape]
    if options.layers is not None:
        if options.layers > shape.n_layer:
            raise SWAAError(f"{shape.name} has {shape.n_layer} layers; --layers {options.layers} is more")
        shape = replace(shape, n_layer=options.layers)
    schedule = chosen_schedule(options, shape.n_layer)
    output: Path = options.output or Path(f"{options.shape}-{options.type}.gguf")
    check_output(output, force=options.force)
    check_space(output, sum(tensor.n_bytes for tensor in tensors(shape, options.type)))
    with terminable(), workplace(output) as folder:
        result = folder / "result.gguf"
        write_model(
            result,
            shape,
            options.type,
            n_ctx=options.ctx,
            schedule=schedule,
            seed=options.seed,
            progress=Progress(output.name),
        )
        publish(result, output, force=options.force)
    return output


def main() -> None:
    options = parse_arguments()
    started = time.monotonic()
    try:
        output = make_model(options)
    except (SWAAError, OSError) as error:
        sys.exit(f"make_model.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    seconds = time.monotonic() - started
    print(f"wrote {output} ({format_bytes(output.stat().st_size)}) in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
