"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_factory(**write_tiny_gguf's keywords) -> Path`; equal keywords give the same file: read only."""
    directory = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(**kwargs: Any) -> Path:
        key = repr(sorted(kwargs.items()))
        if key not in made:
            made[key] = write_tiny_gguf(directory / f"tiny-{len(made)}.gguf", **kwargs)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_model_factory: Callable[..., Path]) -> Path:
    """A four-layer Qwen3 without a schedule."""
    return tiny_model_factory()
