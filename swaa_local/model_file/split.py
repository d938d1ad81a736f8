"""A model whose tensors lie in several GGUF files, read as if it were one.

The format is that of llama.cpp's gguf-split: the first file has the metadata, each has its own tensors and the keys
`split.*`, and the names tell the number. Knows files; nothing of models or schedules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from swaa_local.errors import GGUFError
from swaa_local.model_file.header import GGUFFile, Segment, TensorInfo, encode_tensor_info

KEY_PREFIX = "split."
KEY_COUNT, KEY_NUMBER, KEY_TENSORS = "split.count", "split.no", "split.tensors.count"
_MOST = (1 << 16) - 1  # llama.cpp reads 16 bits
_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class PartName:
    """The name of a part, with its folder or without: `stem-00001-of-00003.gguf`. number: from 1."""

    stem: str
    number: int
    count: int

    @classmethod
    def parse(cls, name: str) -> PartName | None:
        """None for a name that is none of a part."""
        match = _NAME.fullmatch(name)
        part = match and cls(match["stem"], int(match["number"]), int(match["count"]))
        return part if part and 1 <= part.number <= part.count else None

    def __str__(self) -> str:
        return f"{self.stem}-{self.number:05d}-of-{self.count:05d}.gguf"

    @property
    def all(self) -> tuple[str, ...]:
        """The names of all parts, in order."""
        return tuple(str(replace(self, number=i + 1)) for i in range(self.count))


def whole_models(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """GGUF files as models: the name of each model's first file, with the names of all of its files.

    A model with a part that is missing is there too, with all that it should have.
    """
    models: dict[str, tuple[str, ...]] = {}
    for name in names:
        part = PartName.parse(name)
        files = part.all if part else (name,)
        models[files[0]] = files
    return models


@dataclass
class SplitGGUF(GGUFFile):
    """All parts of a model as one file: metadata of the first, tensors of all, placed one behind the other."""

    parts: list[GGUFFile] = field(default_factory=list)
    _segments: list[Segment] = field(default_factory=list)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def get(self, key: str, default: Any = None) -> Any:
        return self.parts[0].get(key, default)

    def raw(self, key: str) -> bytes:
        return self.parts[0].raw(key)

    def raw_tensor_infos(self) -> bytes:
        return b"".join(map(encode_tensor_info, self.tensors))

    @property
    def segments(self) -> list[Segment]:
        return self._segments

    def place(self) -> None:
        """Give each tensor a place in one data section, and note where its bytes are."""
        self.tensors, self._segments, end = [], [], 0
        for part in self.parts:
            by_place = sorted(part.tensors, key=lambda tensor: tensor.offset)
            # The first part may have no tensor at all.
            ends = [*(tensor.offset for tensor in by_place[1:]), part.data_size]
            moved: dict[str, TensorInfo] = {}
            for tensor, behind in zip(by_place, ends, strict=False):
                length = behind - tensor.offset
                if length < (tensor.n_bytes or 0):
                    raise GGUFError(f"{part.path}: tensor {tensor.name!r} overlaps another; download it again")
                padding = -length % self.alignment
                moved[tensor.name] = replace(tensor, offset=end)
                self._segments.append(Segment(part.path, part.data_offset + tensor.offset, length, padding))
                end += length + padding
            self.tensors += [moved[tensor.name] for tensor in part.tensors]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """A GGUF, whole or in parts; of parts the first is named.

    Raises `GGUFError` for a later part, for parts that are missing or do not belong together, and as `GGUFFile.open`.
    """
    with ExitStack() as opened:
        first = opened.enter_context(GGUFFile.open(path))
        count, number = _whole_number(first, KEY_COUNT), _whole_number(first, KEY_NUMBER)
        if count <= 1:
            opened.pop_all()
            return first
        name = PartName.parse(first.path.name)
        if number > 0:
            its_first = f"; name the first: {name.all[0]}" if name and name.count == count else "; name the first"
            raise GGUFError(f"{first.path}: is part {number + 1} of {count} of a split model{its_first}")
        if name is None or (name.number, name.count) != (1, count):
            stem = name.stem if name else first.path.name.removesuffix(".gguf")
            raise GGUFError(
                f"{first.path}: is the first of {count} parts, but is not called so; llama.cpp finds the others by the "
                f"name: call it {PartName(stem, 1, count)}, and the others {PartName(stem, 2, count)} and so on"
            )
        parts = [first]
        for index, part_name in enumerate(name.all[1:], start=1):
            part_path = first.path.with_name(part_name)
            if not part_path.exists():
                raise GGUFError(
                    f"{part_path}: missing, and it is part {index + 1} of {count} of the model; download it too, all "
                    "parts belong into one folder"
                )
            part = opened.enter_context(GGUFFile.open(part_path))
            is_number, of_count = _whole_number(part, KEY_NUMBER), _whole_number(part, KEY_COUNT)
            if (is_number, of_count) != (index, count):
                raise GGUFError(
                    f"{part_path}: says that it is part {is_number + 1} of {of_count}, and its name that it is "
                    f"part {index + 1} of {count}; download it again"
                )
            parts.append(part)
        whole = SplitGGUF(
            path=first.path,
            version=first.version,
            size=sum(part.size for part in parts),
            keys=first.keys,
            alignment=first.alignment,
            data_offset=first.data_offset,
            parts=parts,
        )
        whole.place()
        _check_tensors(whole)
        opened.pop_all()
        return whole


def _check_tensors(whole: SplitGGUF) -> None:
    wanted = _whole_number(whole, KEY_TENSORS)
    if KEY_TENSORS in whole.keys and wanted != len(whole.tensors):
        raise GGUFError(
            f"{whole.path}: the parts of the model hold {len(whole.tensors)} tensors and should hold {wanted}; "
            "download them again"
        )
    seen: set[str] = set()
    for tensor in whole.tensors:
        if tensor.name in seen:
            raise GGUFError(f"{whole.path}: tensor {tensor.name!r} is in two parts; download them again")
        seen.add(tensor.name)


def _whole_number(file: GGUFFile, key: str) -> int:
    value = file.get(key, 0)
    most = _MOST if key != KEY_TENSORS else 1 << 31
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise GGUFError(f"{file.path}: {key} is {value!r}, expected 0 to {most}; the file is damaged")
    return value
