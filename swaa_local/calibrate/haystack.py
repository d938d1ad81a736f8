"""The prose that questions are about: the user's documents, or sentences made of patterns. Knows text; no tokens."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swaa_local.calibrate.results import CalibrateError
from swaa_local.files.input_file import read_input
from swaa_local.needle.documents import Filler

Part = Literal["search", "check"]
"""Questions of the search, and those of the final check, which the search must not have seen."""

_UNIT = re.compile(r"""(?s).+?(?:[.!?]["')\]\u2019\u201d]*\s+|\n\s*|$)""")
_LONGEST_UNIT = 2000  # characters: text without any sentence, such as a table, is cut there
_HIDDEN = re.compile(r"(^|/)\.")


@dataclass(frozen=True)
class Haystack:
    """units: sentences or lines with the white space behind them, so that joined they are the documents again; none for
    prose that is made anew for every text."""

    units: tuple[str, ...] = ()

    def take(self, rng: random.Random, part: Part) -> Units:
        """Sentences for one text, without an end: the documents from a random place of the part on, and around."""
        if not self.units:
            return Units(rng, ())
        half = len(self.units) // 2
        start = int(rng.random() * max(1, half)) + (half if part == "check" else 0)
        return Units(rng, (*self.units[start:], *self.units[:start]))


class Units:
    """Sentences in turn."""

    def __init__(self, rng: random.Random, units: Sequence[str]) -> None:
        self._rng, self._units, self._next, self._filler = rng, units, 0, Filler()

    def next(self) -> str:
        if not self._units:
            return self._filler.sentence(self._rng) + " "
        unit = self._units[self._next % len(self._units)]
        self._next += 1
        return unit


def split_units(text: str) -> tuple[str, ...]:
    """Sentences and lines; joined they are the text."""
    units = []
    for match in _UNIT.finditer(text):
        unit = match[0]
        units += [unit[i : i + _LONGEST_UNIT] for i in range(0, len(unit), _LONGEST_UNIT)]
    return tuple(units)


def read_haystack(paths: Sequence[Path]) -> Haystack:
    """The documents of files, and of all text files in folders. Raises `CalibrateError`.

    In a folder, what is no text in UTF-8 is left out, and so is what is hidden; a file that is named must be text.
    """
    texts = []
    for path in paths:
        if path.is_dir():
            found = [text for file in _files_in(path) if (text := _text_of(file, must=False)) is not None]
            if not found:
                raise CalibrateError(f"{path} has no text files (in UTF-8); name a folder or a file with prose")
            texts += found
        else:
            text = _text_of(path, must=True)
            assert text is not None
            texts.append(text)
    return Haystack(split_units("\n\n".join(texts)))


def _files_in(folder: Path) -> list[Path]:
    return sorted(
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if not _HIDDEN.search((Path(root) / name).relative_to(folder).as_posix())
    )


def _text_of(path: Path, *, must: bool) -> str | None:
    try:
        text = read_input(path, str(path)).decode("utf-8-sig")
    except OSError as error:
        if not must:
            return None
        raise CalibrateError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if not must:
            return None
        raise CalibrateError(
            f"{path} is not UTF-8 (byte {error.start + 1}); convert it, for instance with iconv"
        ) from None
    if "\0" in text or not text.strip():
        if not must:
            return None
        what = "empty" if not text.strip() else "no text: it holds zero bytes"
        raise CalibrateError(f"{path} is {what}; --data takes prose, in text files or folders of them")
    return text
