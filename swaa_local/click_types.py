"""Kinds of values on the command line that several commands take. Knows click and paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from swaa_local.user_input import user_path


class _UserPath(click.Path):
    """click's, with `~` as in the other paths: no shell expands it in --option=~/file, nor in quotes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(user_path(os.fspath(value)), param, ctx)


PATH = _UserPath(path_type=Path)
FILE = _UserPath(path_type=Path, dir_okay=False)


class Numbers(click.ParamType):
    """A list of numbers, `least` or more each: 4096,16384. kind: what the error calls them."""

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
        return numbers
