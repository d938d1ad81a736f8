"""Questions about long texts, and how their answers are judged: the tasks of `swaa-local eval` by name.

Each module knows one kind of question; none knows models or files of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swaa_local.tasks.aggregation import CommonWords, FrequentWords
from swaa_local.tasks.base import Question, Task, TaskError
from swaa_local.tasks.essay import Essay
from swaa_local.tasks.facts_task import Facts
from swaa_local.tasks.needles import Needles
from swaa_local.tasks.quoting import Quoting
from swaa_local.tasks.tracking import VariableTracking

__all__ = ["GROUPS", "TASKS", "Question", "Task", "TaskError", "make_tasks", "needs_haystack"]

SYNTH = "-synth"

_ESSAY_TASKS: dict[str, Callable[[str, Essay], Task]] = {
    "niah_single_2": lambda name, essay: Needles(name, "essay", essay=essay),
    "niah_single_3": lambda name, essay: Needles(name, "essay", value="uuids", essay=essay),
    "niah_multikey_1": lambda name, essay: Needles(name, "essay", n_keys=4, essay=essay),
    "niah_multivalue": lambda name, essay: Needles(name, "essay", n_values=4, essay=essay),
    "niah_multiquery": lambda name, essay: Needles(name, "essay", n_queries=4, essay=essay),
    "quote": Quoting,
    "quote_first": lambda name, essay: Quoting(name, essay, question_first=True),
}
_OTHERS: tuple[Task, ...] = (
    Facts("facts_statements", "statements"),
    Facts("facts_sections", "sections"),
    Needles("niah_single_1", "noise"),
    Needles("niah_multikey_2", "needles"),
    Needles("niah_multikey_3", "needles", key="uuids", value="uuids"),
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
)
TASKS: tuple[str, ...] = (
    *(task.name for task in _OTHERS),
    *_ESSAY_TASKS,
    *(name + SYNTH for name in _ESSAY_TASKS),
)
GROUPS: dict[str, tuple[str, ...]] = {
    "facts": ("facts_statements", "facts_sections"),
    "ruler": tuple(task.name for task in _OTHERS if not isinstance(task, Facts)),
    "ruler-synth": tuple(name + SYNTH for name in _ESSAY_TASKS if name.startswith("niah")),
}
"""Names that stand for several tasks."""


def make_tasks(names: Sequence[str], essay: Essay | None = None) -> list[Task]:
    """The tasks of these names, groups spelled out, in order and each once.

    essay: for those that need a haystack. Raises `TaskError` for unknown names and for a missing essay.
    """
    known = {task.name: task for task in _OTHERS}
    tasks: dict[str, Task] = {}
    for name in (task for group in names for task in GROUPS.get(group, (group,))):
        if name in known:
            tasks[name] = known[name]
        elif name.endswith(SYNTH) and name[: -len(SYNTH)] in _ESSAY_TASKS:
            tasks[name] = _ESSAY_TASKS[name[: -len(SYNTH)]](name, Essay())
        elif name not in _ESSAY_TASKS:
            raise TaskError(f"unknown task {name!r}; known are {', '.join([*GROUPS, *TASKS])}")
        elif essay is None:
            raise TaskError(f"{name} needs a text: --haystack FILE, or take {name}{SYNTH}, whose text is generated")
        else:
            tasks[name] = _ESSAY_TASKS[name](name, essay)
    return list(tasks.values())


def needs_haystack(names: Sequence[str]) -> bool:
    """True if one of the names is a task that wants a text."""
    return any(name in _ESSAY_TASKS for name in names)
