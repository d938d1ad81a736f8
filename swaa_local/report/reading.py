"""The progress of a prompt that is read: how much, since when, and how much longer, as truly as that is known.

The engine tells of whole parts, which may take ten seconds each; between them the bar moves by what is estimated, and
never past the part that runs. Knows rich; nothing of models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swaa_local.report.terminal import Console
from swaa_local.text.units import format_duration

Estimate = Callable[[int, int], float | None]
"""Seconds to read the tokens between two positions, None where nobody knows."""

_LEAST_TOKENS = 64  # fewer are read at once
_LINE_S = 10.0  # between lines where nothing can be drawn
_WIDE, _NARROW = 72, 44  # columns: with words and a bar, with a bar
_BAR_WIDTH = 30


class ReadingProgress:
    """Shows one prompt being read; it is gone when the prompt is. To be called as `Llama.on_prefill`.

    shows: False only measures. estimate: of this machine. took: called with (position, tokens, seconds) of each part.
    position: of the first token that is read. part: tokens of a part at most.
    """

    def __init__(
        self,
        console: Console,
        *,
        shows: bool = True,
        estimate: Estimate = lambda _start, _end: None,
        took: Callable[[int, int, float], None] = lambda _position, _tokens, _seconds: None,
        position: Callable[[], int] = lambda: 0,
        part: int = 512,
    ) -> None:
        self._shows = shows and console.is_terminal
        self._console, self._estimate, self._took, self._position, self._part = console, estimate, took, position, part
        self._live: Live | None = None
        self._first = self._done = self._total = 0
        self._started_s = self._part_s = self._line_s = 0.0

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done == 0:
            self.end()
            self._first, self._total = self._position(), total
            self._started_s = self._part_s = self._line_s = now_s
            self._done = 0
            if total >= _LEAST_TOKENS and self._shows:
                self._begin()
            return
        self._took(self._first + self._done, done - self._done, now_s - self._part_s)
        self._done, self._part_s = done, now_s
        if done >= total:
            self.end()
        elif self._live is not None:
            self._live.refresh()
        elif total >= _LEAST_TOKENS and self._shows and now_s - self._line_s >= _LINE_S:
            self._line_s = now_s
            self._print(
                f"{done:,} of {total:,} tokens read in {format_duration(self._elapsed_s)}{self._left_in_words()}"
            )

    def end(self) -> None:
        """Take it away, whatever was read."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _begin(self) -> None:
        about = self._estimate(self._first, self._first + self._total)
        if self._console.is_dumb_terminal or "NO_COLOR" in os.environ:
            words = f", about {format_duration(about)}" if about is not None else ""
            if about is None or about >= 1:
                self._print(f"reading {self._total:,} tokens{words}")
            return
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            transient=True,
            refresh_per_second=5,
            redirect_stdout=False,
        )
        self._live.start()

    def _print(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _done_by_now(self) -> float:
        """Tokens that are read, those of the part that runs by estimate."""
        n_part = min(self._part, self._total - self._done)
        part_s = self._seconds(self._done, self._done + n_part)
        if not part_s:
            return self._done
        return self._done + n_part * min(0.95, (time.monotonic() - self._part_s) / part_s)

    def _seconds(self, start: int, end: int) -> float | None:
        """Seconds for these tokens of the prompt: by what was known, at the pace of what was read."""
        known = self._estimate(self._first + start, self._first + end)
        spent_s = self._part_s - self._started_s
        if not self._done:
            return known
        before = self._estimate(self._first, self._first + self._done)
        if known is None or not before:
            return spent_s / self._done * (end - start)
        return known * spent_s / before

    def left_s(self) -> float | None:
        """Seconds until all is read; None where nobody knows yet."""
        left = self._seconds(self._done, self._total)
        return None if left is None else max(0.0, left - (time.monotonic() - self._part_s))

    def _left_in_words(self) -> str:
        left = self.left_s()
        return "" if left is None else f", about {format_duration(left)} left"

    def _draw(self) -> RenderableType:
        """What fits: the numbers first, then the bar, then the words."""
        done, width, left = self._done_by_now(), self._console.width, self.left_s()
        count, elapsed = f"{int(done):,}/{self._total:,}", format_duration(self._elapsed_s)
        if width < _NARROW:
            return Text(count if left is None else f"{count} {format_duration(left)} left", style="dim", no_wrap=True)
        words = [f"{count} tokens", elapsed if left is None else f"{elapsed}, about {format_duration(left)} left"]
        if width < _WIDE:
            words = [count, elapsed if left is None else f"{format_duration(left)} left"]
        room = width - sum(len(word) + 2 for word in words) - len("reading ")
        grid = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [Text(word, style="dim", no_wrap=True) for word in words]
        bar = ProgressBar(self._total, done, width=max(5, min(_BAR_WIDTH, room)))
        grid.add_row(*([Text("reading", style="dim")] if width >= _WIDE else []), bar, *cells)
        return grid
