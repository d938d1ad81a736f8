"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny import write_tiny_gguf

if TYPE_CHECKING:
    from engine import EngineModel


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


@pytest.fixture(scope="session")
def engine() -> None:
    """The patched engine; without it every test that needs it fails, for it is a dependency."""
    from engine import MISSING_SYMBOLS

    if MISSING_SYMBOLS:
        pytest.fail(
            f"the installed llama-cpp-python lacks {', '.join(MISSING_SYMBOLS)}; run `pip install ./patches`",
            pytrace=False,
        )


@pytest.fixture(scope="session")
def load_model(engine: None, tiny_model_factory: Callable[..., Path]) -> Iterator[Callable[..., EngineModel]]:
    """`load_model(schedule=None, **write_tiny_gguf's keywords) -> EngineModel`, loaded once per argument list.

    The schedule is set through the C interface, so tests must not change the model's schedule.
    """
    from engine import EngineModel

    models: dict[str, EngineModel] = {}
    with ExitStack() as stack:

        def load(schedule: Any = None, **kwargs: Any) -> EngineModel:
            key = repr((schedule, sorted(kwargs.items())))
            if key not in models:
                models[key] = stack.enter_context(EngineModel(tiny_model_factory(**kwargs), schedule))
            return models[key]

        yield load
