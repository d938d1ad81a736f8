"""English sentences that no pattern made: from the docstrings of Python's own standard library, for training alone.

They depend on the Python version, which the training log names beside a hash of them. Nothing of them is stored.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
_SENTENCE = re.compile(r"(?<=[.!?]) (?=[A-Z])")
# Prose: no code, no quotes, no number of five digits, which could pass for a fact's value.
_PROSE = re.compile(r"[A-Z][a-z]*(?:[ ,;:'()/-]+[A-Za-z0-9_.-]*[A-Za-z0-9_])+\.")


def read_docstrings(root: Path | None = None) -> list[str]:
    """Sentences of 5 to 40 words, sorted, each once; of the running Python's library unless `root` says otherwise."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            found.update(_sentences_of(path))
    return sorted(found)


def _sentences_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # a file that is meant to be broken
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    sentences: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
            for paragraph in docstring.split("\n\n"):
                sentences += filter(is_prose, _SENTENCE.split(" ".join(paragraph.split())))
    return sentences


def is_prose(sentence: str) -> bool:
    return (
        5 <= len(sentence.split()) <= 40
        and sentence.isascii()
        and _PROSE.fullmatch(sentence) is not None
        and re.search(r"\d{5}", sentence) is None
        and sum(character in "_./()" for character in sentence) <= 4
    )
