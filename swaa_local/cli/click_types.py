"""Kinds of values on the command line that several commands take. Knows click, paths and the engine's bounds."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import click
import click.shell_completion

from swaa_local.engine.workers import WorkerAddress, parse_split
from swaa_local.files.user_input import user_path
from swaa_local.model_file.adapter import Adapter
from swaa_local.schedule.config import MAX_TOKENS
from swaa_local.text.units import parse_bytes


class _UserPath(click.Path):
    """click's, with `~` as in the other paths: no shell expands it in --option=~/file, nor in quotes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(user_path(os.fspath(value)), param, ctx)


PATH = _UserPath(path_type=Path)
FILE = _UserPath(path_type=Path, dir_okay=False)


class _Named(click.ParamType):
    """Shown in the help by its name as it is."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


class _Lora(_Named):
    """A LoRA adapter: FILE or FILE:SCALE."""

    name = "FILE[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Adapter:
        return value if isinstance(value, Adapter) else Adapter.parse(value)


class _Loras(_Lora):
    """Several, separated by commas."""

    name = "FILE[:SCALE],..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, tuple) else Adapter.parse_list(value)


LORA, LORAS = _Lora(), _Loras()


class _Workers(_Named):
    """Addresses of workers, separated by commas."""

    name = "HOST:PORT,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, tuple) else WorkerAddress.parse_list(value)


class _Split(_Named):
    """Shares of the layers, one for each device."""

    name = "N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return value if isinstance(value, tuple) else parse_split(value)
        except ValueError:
            self.fail(f"{value!r} is not a list of shares such as 3,1", param, ctx)


WORKERS, SPLIT = _Workers(), _Split()


class Real(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number.", param, ctx)
        number = float(super().convert(number, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class Factor(click.ParamType):
    """A finite number from `least` to `most`. (click.FloatRange prints bounds into the help, where nobody gets near
    these.)"""

    name = "factor"

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number such as 4 or 0.5", param, ctx)
        if not self._least <= number <= self._most:
            least, most = (f"{bound:.6f}".rstrip("0").rstrip(".") for bound in (self._least, self._most))
            self.fail(f"{value} is not between {least} and {most}", param, ctx)
        return number


class Number(click.ParamType):
    """A whole number from `least` to `most`. name: of what is counted. words: names of some numbers.

    (click.IntRange prints bounds into the help.)
    """

    def __init__(self, name: str, least: int, most: int, *, words: Mapping[str, int] | None = None) -> None:
        self.name = name
        self._least, self._most, self._words = least, most, words or {}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(self._words.get(value, value))
        except ValueError:
            self.fail(f"{value!r} is not a number of {self.name}", param, ctx)
        if not self._least <= number <= self._most:
            self.fail(f"{number} is not between {self._least} and {self._most}", param, ctx)
        return number


def tokens(least: int) -> Number:
    """A number of tokens."""
    return Number("tokens", least, MAX_TOKENS)


class _OnOffAuto(_Named):
    """A switch that may decide by itself: True, False or None. Takes llama.cpp's other words, too."""

    name = "[on|off|auto]"
    _WORDS: ClassVar[Mapping[str, bool | None]] = {
        **dict.fromkeys(("on", "enabled", "true", "1"), True),
        **dict.fromkeys(("off", "disabled", "false", "0"), False),
        **dict.fromkeys(("auto", "-1"), None),
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | None:
        if isinstance(value, bool):
            return value
        if value not in self._WORDS:
            self.fail(f"{value!r} is not on, off or auto", param, ctx)
        return self._WORDS[value]

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        words = ("on", "off", "auto")
        return [click.shell_completion.CompletionItem(word) for word in words if word.startswith(incomplete)]


ON_OFF_AUTO = _OnOffAuto()


class Numbers(click.ParamType):
    """A list of numbers of tokens, `least` or more each: 4096,16384. kind: what the error calls them."""

    name = "numbers"

    def __init__(self, least: int, kind: str) -> None:
        self._least, self._kind = least, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < self._least:
            self.fail(f"{value!r} is not a list of {self._kind} such as 4096,16384", param, ctx)
        if max(numbers) > MAX_TOKENS:
            self.fail(f"{max(numbers)} is more than {MAX_TOKENS}", param, ctx)
        return numbers


class _Bytes(click.ParamType):
    """A size: 800M, 10G, 1.5T, or bytes. The units are binary, as those of the messages."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 800M or 10G", param, ctx)


BYTES = _Bytes()
