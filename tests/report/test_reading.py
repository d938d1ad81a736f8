"""The progress of a prompt: what it says, on any terminal, with a clock of the test's own."""

from __future__ import annotations

import io
from typing import Any

import pytest

from swaa_local.report import reading
from swaa_local.report.reading import ReadingProgress
from swaa_local.report.terminal import Console


class Clock:
    """`time.monotonic`, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reading, "time", clock)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return clock


def console(width: int = 100, *, terminal: bool = True) -> Console:
    made = Console()
    made.file, made._force_terminal, made.width = io.StringIO(), terminal, width
    return made


def written(made: Console) -> str:
    return made.file.getvalue()  # type: ignore[attr-defined]


def drawn(progress: ReadingProgress, made: Console) -> str:
    """What the bar looks like now."""
    with made.capture() as capture:
        made.print(progress._draw())
    return " ".join(capture.get().split())


def steady(rate_s: float) -> Any:
    return lambda start, end: rate_s * (end - start)


def test_elapsed_and_left_are_told_apart_and_the_estimate_is_there_from_the_start(clock):
    made = console()
    progress = ReadingProgress(made, estimate=steady(0.01), part=512)
    progress(0, 4000)
    assert drawn(progress, made).endswith("0/4,000 tokens 0 s, about 40 s left")
    clock.now_s += 2.56
    assert drawn(progress, made).endswith("256/4,000 tokens 3 s, about 37 s left")  # within the first part
    clock.now_s += 100
    assert "486/4,000" in drawn(progress, made)  # a part that is not done is not said to be
    progress.end()


def test_what_is_left_follows_what_is_measured(clock):
    made = console()
    progress = ReadingProgress(made, estimate=steady(0.01), part=500)
    progress(0, 4000)
    clock.now_s += 10  # twice as slow as was thought
    progress(500, 4000)
    assert progress.left_s() == pytest.approx(70)
    clock.now_s += 3
    assert progress.left_s() == pytest.approx(67)
    progress.end()


def test_without_any_knowledge_nothing_is_left_until_the_first_part_is_read(clock):
    made = console()
    progress = ReadingProgress(made)
    progress(0, 4000)
    clock.now_s += 5
    assert drawn(progress, made).endswith("0/4,000 tokens 5 s")
    progress(512, 4000)
    assert progress.left_s() == pytest.approx(5 / 512 * 3488)
    progress.end()


@pytest.mark.parametrize(
    ("width", "text"),
    [(60, "1,024/4,000 30 s left"), (43, "1,024/4,000 30 s left"), (25, "1,024/4,000 30 s left")],
)
def test_a_narrow_terminal_keeps_the_numbers_on_one_line(clock, width, text):
    made = console(width)
    progress = ReadingProgress(made, estimate=lambda start, end: 30.0)
    progress(0, 4000)
    clock.now_s += 10
    progress._done, progress._part_s, progress._started_s = 1024, clock.now_s, clock.now_s - 30
    shown = drawn(progress, made)
    assert shown.endswith(text)
    assert "reading" not in shown
    with made.capture() as capture:
        made.print(progress._draw())
    assert [len(line) <= width for line in capture.get().rstrip("\n").split("\n")] == [True]
    progress.end()


@pytest.mark.parametrize("variable", [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_a_plain_terminal_gets_a_line_now_and_then(clock, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    made = console()
    progress = ReadingProgress(made, estimate=steady(0.01))
    progress(0, 4616)
    for done in range(512, 4616, 512):
        clock.now_s += 5.12
        progress(done, 4616)
    progress(4616, 4616)
    lines = written(made).splitlines()
    assert lines[0] == "reading 4,616 tokens, about 46 s"
    assert lines[1] == "1,024 of 4,616 tokens read in 10 s, about 36 s left"
    assert len(lines) == 5
    assert "\x1b" not in written(made)


def test_a_pipe_and_a_short_prompt_get_nothing(clock):
    made = console(terminal=False)
    progress = ReadingProgress(made)
    progress(0, 4000)
    progress(4000, 4000)
    assert written(made) == ""
    made = console()
    progress = ReadingProgress(made)
    progress(0, 20)
    progress(20, 20)
    assert written(made) == ""


def test_each_part_is_measured_at_its_place(clock):
    seen: list[tuple[int, int, float]] = []
    progress = ReadingProgress(console(), took=lambda *part: seen.append(part), position=lambda: 700)
    progress(0, 600)
    clock.now_s += 2
    progress(512, 600)
    clock.now_s += 1
    progress(600, 600)
    assert seen == [(700, 512, 2.0), (1212, 88, 1.0)]
