"""Broken model files, made from a good one: named faults, and random ones that a seed and a number give again.

Reads and writes GGUF with struct from the format's description, independent of `swaa_local` and of gguf-py, because it
must be able to write what those refuse. Knows nothing of who reads the files; `fuzz_gguf.py` does that.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
ALIGNMENT = 32


@dataclass(frozen=True)
class Key:
    """A metadata entry; `value` is encoded."""

    name: bytes
    type: int
    value: bytes

    def encode(self) -> bytes:
        return text(self.name) + struct.pack("<I", self.type) + self.value


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry in the header."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    offset: int

    def encode(self) -> bytes:
        n = len(self.dims)
        return text(self.name) + struct.pack(f"<I{n}QIQ", n, *self.dims, self.type, self.offset)


@dataclass
class Parts:
    """A GGUF taken apart; `encode` puts it together.

    architecture: the prefix of the model's keys. counts: tensors and keys as the header claims; None: the truth.
    """

    architecture: str
    keys: list[Key]
    tensors: list[Tensor]
    data: bytes = field(repr=False)
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)

    def encode(self) -> bytes:
        n_tensors, n_keys = self.counts
        n_tensors = len(self.tensors) if n_tensors is None else n_tensors
        n_keys = len(self.keys) if n_keys is None else n_keys
        header = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        header += b"".join([*(key.encode() for key in self.keys), *(tensor.encode() for tensor in self.tensors)])
        return header + bytes(-len(header) % ALIGNMENT) + self.data

    def get(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name.encode())

    def set(self, name: str, kind: int, value: bytes) -> None:
        """Give a key a value, in its old place if it is there."""
        key = Key(name.encode(), kind, value)
        for index, old in enumerate(self.keys):
            if old.name == key.name:
                self.keys[index] = key
                return
        self.keys.append(key)

    def remove(self, prefix: str) -> None:
        """Take away all keys that begin so."""
        self.keys = [key for key in self.keys if not key.name.startswith(prefix.encode())]


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def number(kind: int, value: float) -> bytes:
    return struct.pack("<" + FORMATS[kind], value)


def array(kind: int, values: list[int] | list[float] | list[bytes]) -> bytes:
    items = (text(v) if isinstance(v, bytes) else number(kind, v) for v in values)
    return struct.pack("<IQ", kind, len(values)) + b"".join(items)


def take_apart(data: bytes) -> Parts:
    """Parts of a whole, little-endian GGUF with the usual alignment; such as are made here, nothing is checked."""
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, 4)
    at = 24

    def read_text() -> bytes:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return data[at - length : at]

    def read(code: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return values

    def skip(kind: int) -> None:
        if kind == STRING:
            read_text()
        elif kind == ARRAY:
            item, n_items = read("IQ")
            for _ in range(n_items):
                skip(item)
        else:
            read(FORMATS[kind])

    keys = []
    for _ in range(n_keys):
        name, (kind,), start = read_text(), read("I"), at
        skip(kind)
        keys.append(Key(name, kind, data[start:at]))
    tensors = []
    for _ in range(n_tensors):
        name, (n_dims,) = read_text(), read("I")
        dims, (kind, offset) = read(f"{n_dims}Q"), read("IQ")
        tensors.append(Tensor(name, dims, kind, offset))
    architecture = next((key.value[8:].decode() for key in keys if key.name == b"general.architecture"), "")
    return Parts(architecture, keys, tensors, data[-(-at // ALIGNMENT) * ALIGNMENT :], version=version)


# Named faults


@dataclass(frozen=True)
class Fault:
    """A broken file that was met, or could be. keys: (name, type, encoded value); {arch} is the architecture."""

    what: str
    keys: tuple[tuple[str, int, bytes], ...]

    def apply(self, parts: Parts) -> None:
        for name, kind, value in self.keys:
            parts.set(name.format(arch=parts.architecture), kind, value)


def _set(what: str, *keys: tuple[str, int, bytes]) -> Fault:
    return Fault(what, keys)


_NAN, _INF = float("nan"), float("inf")
_RINGS = ("swaa.layer_modes", ARRAY, array(I32, [2] * 8))

FAULTS: dict[str, Fault] = {
    "block-count-0": _set("no layers", ("{arch}.block_count", U32, number(U32, 0))),
    "block-count-2e31": _set("2^31 layers", ("{arch}.block_count", U32, number(U32, 2**31))),
    "block-count-513": _set("more layers than the engine holds", ("{arch}.block_count", U32, number(U32, 513))),
    "block-count-negative": _set("-1 layers", ("{arch}.block_count", I32, number(I32, -1))),
    "block-count-text": _set("a number of layers in words", ("{arch}.block_count", STRING, text(b"eight"))),
    "nextn-max": _set("2^32-1 layers for MTP", ("{arch}.nextn_predict_layers", U32, number(U32, 2**32 - 1))),
    "experts-max": _set("2^32-1 experts", ("{arch}.expert_count", U32, number(U32, 2**32 - 1))),
    "experts-used-none": _set("experts, none of them used", ("{arch}.expert_count", U32, number(U32, 8))),
    "experts-used-of-none": _set("experts used, and none there", ("{arch}.expert_used_count", U32, number(U32, 8))),
    "expert-groups-of-none": _set("groups of no experts", ("{arch}.expert_group_count", U32, number(U32, 2))),
    "embedding-0": _set("an embedding of width 0", ("{arch}.embedding_length", U32, number(U32, 0))),
    "heads-0": _set("no heads", ("{arch}.attention.head_count", U32, number(U32, 0))),
    "heads-max": _set("2^32-1 heads", ("{arch}.attention.head_count", U32, number(U32, 2**32 - 1))),
    "kv-heads-0": _set("no KV heads", ("{arch}.attention.head_count_kv", U32, number(U32, 0))),
    "kv-heads-3": _set("KV heads that divide no heads", ("{arch}.attention.head_count_kv", U32, number(U32, 3))),
    "key-length-0": _set("keys of width 0", ("{arch}.attention.key_length", U32, number(U32, 0))),
    "context-0": _set("a context of 0 tokens", ("{arch}.context_length", U32, number(U32, 0))),
    "context-max": _set("a context of 2^32-1 tokens", ("{arch}.context_length", U32, number(U32, 2**32 - 1))),
    "rope-dim-0": _set("RoPE over 0 dimensions", ("{arch}.rope.dimension_count", U32, number(U32, 0))),
    "rope-dim-odd": _set("RoPE over 63 dimensions", ("{arch}.rope.dimension_count", U32, number(U32, 63))),
    "rope-dim-wide": _set("RoPE over more than a head", ("{arch}.rope.dimension_count", U32, number(U32, 128))),
    "rope-type-junk": _set("an unknown RoPE scaling", ("{arch}.rope.scaling.type", STRING, text(b"junk"))),
    "rope-base-nan": _set("a RoPE base that is NaN", ("{arch}.rope.freq_base", F32, number(F32, _NAN))),
    "rope-factor-inf": _set("an infinite RoPE factor", ("{arch}.rope.scaling.factor", F32, number(F32, _INF))),
    "rope-sections-text": _set(
        "RoPE sections that are strings", ("{arch}.rope.dimension_sections", ARRAY, array(STRING, [b"a", b"b", b"c"]))
    ),
    "epsilon-nan": _set("an epsilon that is NaN", ("{arch}.attention.layer_norm_rms_epsilon", F32, number(F32, _NAN))),
    "epsilon-negative": _set("a negative epsilon", ("{arch}.attention.layer_norm_rms_epsilon", F32, number(F32, -1))),
    "window-2e30-rings": _set("rings, a window of 2^30", ("swaa.window", U32, number(U32, 2**30)), _RINGS),
    "sinks-2e30-rings": _set("rings, 2^30 sinks", ("swaa.sinks", U32, number(U32, 2**30)), _RINGS),
    "split-count-text": _set("a split count in words", ("split.count", STRING, text(b"two"))),
    "split-count-negative": _set("a split count below 0", ("split.count", I32, number(I32, -2))),
    "own-window-text": _set(
        "an own window in words",
        ("general.architecture", STRING, text(b"gemma3")),
        ("gemma3.block_count", U32, number(U32, 8)),
        ("gemma3.attention.sliding_window", STRING, text(b"x")),
    ),
    "own-window-texts": _set(
        "own windows in words",
        ("general.architecture", STRING, text(b"gemma3")),
        ("gemma3.block_count", U32, number(U32, 8)),
        ("gemma3.attention.sliding_window", ARRAY, array(STRING, [b"x", b"y"])),
    ),
    "file-type-text": _set("a file type in words", ("general.file_type", STRING, text(b"Q4"))),
    "name-with-escapes": _set(
        "a name with terminal escapes and a forged line",
        ("general.name", STRING, text(b"good\x1b]0;owned\x07\nschedule   all is well\xc2\x9b2J")),
    ),
    "architecture-with-escapes": _set(
        "an architecture with terminal escapes", ("general.architecture", STRING, text(b"qw\x1b[31men3\nok"))
    ),
    "type-with-escapes": _set("a kind with terminal escapes", ("general.type", STRING, text(b"ad\x1b[31mapter\nok"))),
    "template-empty": _set("an empty chat template", ("tokenizer.chat_template", STRING, text(b""))),
    "template-broken": _set("a broken chat template", ("tokenizer.chat_template", STRING, text(b"{% for %}\x1b[31m"))),
    "tokens-text": _set("a vocabulary that is one string", ("tokenizer.ggml.tokens", STRING, text(b"abc"))),
    "tokens-empty": _set("an empty vocabulary", ("tokenizer.ggml.tokens", ARRAY, array(STRING, []))),
    "tokens-few": _set("a vocabulary of two words", ("tokenizer.ggml.tokens", ARRAY, array(STRING, [b"a", b"b"]))),
    "token-types-few": _set("types of two words", ("tokenizer.ggml.token_type", ARRAY, array(I32, [1, 1]))),
    "token-types-floats": _set("types that are floats", ("tokenizer.ggml.token_type", ARRAY, array(F32, [1.0] * 2048))),
    "merges-junk": _set("merges of words that are not there", ("tokenizer.ggml.merges", ARRAY, array(STRING, [b"x"]))),
    "eos-max": _set("an end token of 2^32-1", ("tokenizer.ggml.eos_token_id", U32, number(U32, 2**32 - 1))),
    "vocabulary-junk": _set("an unknown kind of vocabulary", ("tokenizer.ggml.model", STRING, text(b"junk"))),
    **{
        f"vocabulary-as-{kind}": _set(
            f"a vocabulary that says it is one of {kind}", ("tokenizer.ggml.model", STRING, text(kind.encode()))
        )
        for kind in ("llama", "bert", "t5", "rwkv", "plamo2", "gemma4")
    },
    "pre-tokenizer-junk": _set("an unknown pre-tokenizer", ("tokenizer.ggml.pre", STRING, text(b"junk"))),
    "bos-float": _set("a start token that is a float", ("tokenizer.ggml.bos_token_id", F32, number(F32, 1.5))),
    "sampling-junk": _set(
        "sampling defaults that are none",
        ("general.sampling.temp", STRING, text(b"hot")),
        ("general.sampling.top_k", F32, number(F32, _NAN)),
        ("general.sampling.top_p", F32, number(F32, _INF)),
        ("general.sampling.penalty_repeat", I32, number(I32, -7)),
    ),
    "vocabulary-none": _set("no vocabulary", ("tokenizer.ggml.model", STRING, text(b"no_vocab"))),
    "alignment-0": _set("an alignment of 0", ("general.alignment", U32, number(U32, 0))),
    "alignment-text": _set("an alignment in words", ("general.alignment", STRING, text(b"x"))),
}


def write_faults(source: Path, directory: Path) -> dict[str, Path]:
    """One file for each of `FAULTS`, by its name."""
    data, files = source.read_bytes(), {}
    for name, fault in FAULTS.items():
        parts = take_apart(data)
        fault.apply(parts)
        files[name] = directory / f"{name}.gguf"
        files[name].write_bytes(parts.encode())
    return files


# Random faults

_NUMBERS = (0, 1, 2, 3, 7, 127, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 20, (1 << 30), (1 << 31) - 1, 1 << 31)
_MORE_NUMBERS = ((1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -2, -(1 << 31))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-6, 1e38, 3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    *(b"", b"\0", b"junk", b"llama", b"qwen2", b"gpt2", b"bert", b"none", b"yarn", b"linear", b"model", b"x" * 5000),
    *(b"\xff\xfe", b"a\nb", b"\x1b[31mred", b"\xe2\x80\xaeabc", b"{% for %}", b"{{ 1 // 0 }}", "ü".encode() * 300),
)


class Mutator:
    """Random faults of one model file. known_keys: names with {arch} that programs look for, to be added."""

    def __init__(self, source: bytes, *, known_keys: list[str], architectures: list[str], schedule: bool) -> None:
        parts = take_apart(source)
        if not schedule:
            parts.remove("swaa.")
        self._source, self._known, self._architectures = parts.encode(), known_keys, architectures

    def make(self, seed: object) -> tuple[str, bytes]:
        """(what was done, the file); equal seeds give equal files."""
        rng = random.Random(str(seed))
        parts = take_apart(self._source)
        done = [rng.choices(_MUTATIONS, _WEIGHTS)[0](rng, parts, self) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))]
        data = parts.encode()
        if rng.random() < 0.08:
            how, data = _damage(rng, data)
            done.append(how)
        return "; ".join(done), data

    def new_key(self, rng: random.Random, parts: Parts) -> str:
        return rng.choice(self._known).replace("{arch}", parts.architecture)

    def new_architecture(self, rng: random.Random) -> str:
        return rng.choice(self._architectures)


def _any_value(rng: random.Random, kind: int, length: int | None = None) -> bytes:
    if kind == STRING:
        return text(rng.choice(_TEXTS))
    if kind == ARRAY:
        item = rng.choice((*FORMATS, STRING, I32, I32, F32, U32))
        n_items = rng.choice((0, 1, 2, 3, 8, 100)) if length is None else length
        return struct.pack("<IQ", item, n_items) + b"".join(_any_value(rng, item) for _ in range(n_items))
    if kind in (F32, F64):
        return number(kind, rng.choice(_FLOATS)) if rng.random() < 0.8 else rng.randbytes(4 if kind == F32 else 8)
    if kind == BOOL:
        return bytes([rng.choice((0, 1, 1, 255))])
    size = struct.calcsize(FORMATS[kind])
    value = rng.choice((*_NUMBERS, *_MORE_NUMBERS, rng.randrange(1 << 32)))
    return (value % (1 << (8 * size))).to_bytes(size, "little")


def _pick(rng: random.Random, parts: Parts) -> int:
    """A key's place; those of the model and the schedule are likelier than those of the vocabulary."""
    weights = [1 if key.name.startswith((b"tokenizer.", b"general.")) else 3 for key in parts.keys]
    return rng.choices(range(len(parts.keys)), weights)[0]


def _change_value(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    index = _pick(rng, parts)
    key = parts.keys[index]
    if key.type not in (*FORMATS, STRING, ARRAY):
        return "nothing"
    if key.type == ARRAY:
        return _change_array(rng, parts, index)
    parts.keys[index] = replace(key, value=_any_value(rng, key.type))
    return f"value of {key.name!r} is {parts.keys[index].value[:40]!r}"


def _change_array(rng: random.Random, parts: Parts, index: int) -> str:
    key = parts.keys[index]
    item, n_items = struct.unpack_from("<IQ", key.value)
    if item not in (*FORMATS, STRING) or n_items > 100_000:
        return "nothing"
    how = rng.choice(("count", "items", "item type", "shorter", "longer", "one item"))
    body = key.value[12:]
    if how == "count":
        n_items = rng.choice((*_NUMBERS, (1 << 63) - 1, (1 << 64) - 1, n_items - 1, n_items + 1)) % (1 << 64)
    elif how == "item type":
        item = rng.choice((*range(14), 255, 1 << 31))
    elif how == "items":
        body = _any_value(rng, ARRAY, length=n_items if n_items < 4000 else 10)
        item, n_items, body = *struct.unpack_from("<IQ", body), body[12:]
    elif item in FORMATS:
        size = struct.calcsize(FORMATS[item])
        n_items = {"shorter": rng.randrange(n_items + 1), "longer": n_items + rng.randrange(1, 300)}.get(how, n_items)
        body = (body + bytes(size * n_items))[: size * n_items]
        if how == "one item" and n_items:
            at = rng.randrange(n_items) * size
            body = body[:at] + _any_value(rng, item) + body[at + size :]
    else:
        strings = _strings(body, n_items)
        if how == "shorter":
            strings = strings[: rng.randrange(len(strings) + 1)]
        elif how == "longer":
            strings += [rng.choice(_TEXTS) for _ in range(rng.randrange(1, 300))]
        elif strings:
            strings[rng.randrange(len(strings))] = rng.choice((*_TEXTS, rng.choice(strings)))
        n_items, body = len(strings), b"".join(map(text, strings))
    parts.keys[index] = replace(key, value=struct.pack("<IQ", item, n_items) + body)
    return f"array {key.name!r}: {how}, now {n_items} of type {item}"


def _strings(body: bytes, n_items: int) -> list[bytes]:
    found, at = [], 0
    for _ in range(n_items):
        (length,) = struct.unpack_from("<Q", body, at)
        found.append(body[at + 8 : at + 8 + length])
        at += 8 + length
    return found


def _change_type(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    index = _pick(rng, parts)
    kind = rng.choice((*FORMATS, STRING, STRING, ARRAY, ARRAY, 13, 1 << 31))
    value = _any_value(rng, kind) if kind <= F64 else parts.keys[index].value
    parts.keys[index] = replace(parts.keys[index], type=kind, value=value)
    return f"type of {parts.keys[index].name!r} is {kind}, value {value[:40]!r}"


def _remove_key(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    return f"{parts.keys.pop(_pick(rng, parts)).name!r} is missing"


def _repeat_key(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    key = parts.keys[_pick(rng, parts)]
    parts.keys.append(key)
    return f"{key.name!r} twice"


def _rename_key(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    index = _pick(rng, parts)
    old = parts.keys[index].name
    parts.keys[index] = replace(parts.keys[index], name=rng.choice((*_TEXTS, old.upper(), old + b"x")))
    return f"{old!r} is called {parts.keys[index].name[:40]!r}"


def _add_key(rng: random.Random, parts: Parts, mutator: Mutator) -> str:
    name, kind = mutator.new_key(rng, parts), rng.choice((U32, U32, U32, F32, F32, BOOL, STRING, ARRAY, I32, U64))
    # A list for every layer is what many keys may be.
    length = rng.choice((None, 8)) if kind == ARRAY else None
    parts.set(name, kind, _any_value(rng, kind, length))
    return f"{name} of type {kind} is {parts.get(name).value[:40]!r}"


def _change_architecture(rng: random.Random, parts: Parts, mutator: Mutator) -> str:
    """Another architecture with the same keys, so that its loader gets far."""
    old, new = parts.architecture, mutator.new_architecture(rng)
    prefix = old.encode() + b"."
    parts.keys = [
        replace(key, name=new.encode() + b"." + key.name[len(prefix) :]) if key.name.startswith(prefix) else key
        for key in parts.keys
    ]
    parts.set("general.architecture", STRING, text(new.encode()))
    parts.architecture = new
    return f"architecture {new}"


def _change_tensor(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    index = rng.randrange(len(parts.tensors))
    tensor = parts.tensors[index]
    how = rng.choice(("dims", "dims", "type", "type", "offset", "name", "n_dims", "missing", "twice"))
    if how == "missing":
        del parts.tensors[index]
        return f"tensor {tensor.name!r} is missing"
    if how == "twice":
        parts.tensors.insert(index, tensor)
        return f"tensor {tensor.name!r} twice"
    big = (*_NUMBERS, *(n for n in _MORE_NUMBERS if n > 0))
    if how == "dims":
        dims = list(tensor.dims)
        dims[rng.randrange(len(dims))] = rng.choice((*big, dims[0] + 1, dims[0] - 1, dims[0] * 2))
        tensor = replace(tensor, dims=tuple(dims))
    elif how == "n_dims":
        tensor = replace(tensor, dims=rng.choice(((), (1,), (*tensor.dims, 1), (*tensor.dims, 2), (1,) * 5)))
    elif how == "type":
        tensor = replace(tensor, type=rng.choice((*range(45), 1 << 31, (1 << 32) - 1)))
    elif how == "offset":
        tensor = replace(tensor, offset=rng.choice((*big, tensor.offset + 1, tensor.offset + 32)))
    else:
        names = (*_TEXTS, tensor.name[:-1], tensor.name.replace(b"blk.0", b"blk.99"), parts.tensors[0].name)
        tensor = replace(tensor, name=rng.choice(names))
    parts.tensors[index] = tensor
    return f"tensor {tensor.name[:40]!r}: {how}, {tensor.dims} of type {tensor.type} at {tensor.offset}"


def _change_counts(rng: random.Random, parts: Parts, _mutator: Mutator) -> str:
    n_tensors, n_keys = len(parts.tensors), len(parts.keys)
    big = (*_NUMBERS, (1 << 63) - 1, (1 << 64) - 1)
    if rng.random() < 0.2:
        parts.version = rng.choice((0, 1, 2, 4, 3 << 24, 1 << 31))
        return f"version {parts.version}"
    if rng.random() < 0.5:
        parts.counts = (rng.choice((*big, n_tensors - 1, n_tensors + 1)), None)
    else:
        parts.counts = (None, rng.choice((*big, n_keys - 1, n_keys + 1)))
    return f"counts of tensors and keys {parts.counts}"


def _damage(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Damage that knows no format: bytes of the header, or an end that is missing."""
    header_bytes = min(len(data), 70_000)
    if rng.random() < 0.3:
        length = rng.choice((0, 1, 4, 24, rng.randrange(header_bytes), rng.randrange(len(data)), len(data) - 1))
        return f"cut to {length} bytes", data[:length]
    content = bytearray(data)
    places = [rng.randrange(header_bytes) for _ in range(rng.choice((1, 2, 8, 64)))]
    for place in places:
        content[place] = rng.randrange(256)
    return f"{len(places)} bytes of the header changed", bytes(content)


_MUTATIONS: tuple[Callable[[random.Random, Parts, Mutator], str], ...] = (
    _change_value,
    _change_type,
    _remove_key,
    _repeat_key,
    _rename_key,
    _add_key,
    _change_architecture,
    _change_tensor,
    _change_counts,
)
_WEIGHTS = (30, 12, 6, 1, 2, 25, 6, 12, 3)
