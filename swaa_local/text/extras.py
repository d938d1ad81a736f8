"""How optional packages are installed, as messages say it. Knows no package."""

from __future__ import annotations


def install(extra: str) -> str:
    """The command for one of this project's extras. An environment of uv has no pip, and pip's another Python."""
    return f"pip install 'swaa-local[{extra}]', or with uv: uv sync --extra {extra}"
