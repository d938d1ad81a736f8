"""The terminal side of a chat: the answer on stdout, everything else on stderr.

Knows streams and rich; nothing of models. Progress and thoughts are for people: where stderr is no terminal, only notes
and errors are written.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.text import Text

from swaa_local.chat.keyboard import QuietKeyboard
from swaa_local.generation.thinking import Piece
from swaa_local.report.reading import ReadingProgress
from swaa_local.report.terminal import Console
from swaa_local.text.printable import printable
from swaa_local.text.units import format_bytes

if TYPE_CHECKING:
    from swaa_local.engine.run_stats import RunStats
    from swaa_local.llama import Llama
    from swaa_local.prefix_cache.rates import ReadingRates

# What a text must not do to a terminal: everything below a space but tab and newline, DEL, and C1.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """Writes for one chat. show_thinking may change between replies, and silent: whether they are not printed at all.

    quiet: errors are written, and nothing else beside the answers.
    """

    def __init__(self, *, show_thinking: bool = True, quiet: bool = False) -> None:
        self.console = Console(soft_wrap=True)
        self._quiet, self.silent = quiet, False
        self.show_thinking = show_thinking
        self._progress: ReadingProgress | None = None
        self._keyboard: QuietKeyboard | None = None
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(
                errors="replace"
            )  # an answer in a terminal without Unicode loses letters, not itself
        self._to_terminal = sys.stdout.isatty()

    def note(self, text: str) -> None:
        """A line beside the conversation."""
        if self._quiet:
            return
        self.console.print(Text(printable(text), style="dim"))

    @property
    def shows(self) -> bool:
        """Whether there is somebody who sees progress and thoughts."""
        return self.console.is_terminal and not self._quiet

    def result(self, line: str) -> None:
        """A line for the program that reads the answers."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def between_answers(self) -> None:
        """A line that tells two answers apart."""
        if not self.silent:
            sys.stdout.write("\n")

    def error(self, text: str) -> None:
        self.console.print(Text(printable(" ".join(text.split())), style="red"))

    def loading(self, name: str) -> AbstractContextManager[object]:
        """A spinner while a model loads."""
        if not self.shows:
            return nullcontext()
        return self.console.status(Text(printable(f"loading {name}"), style="dim"), spinner_style="dim")

    # Progress of a prefill, as `Llama.on_prefill` takes it.

    def reads(self, llm: Llama, rates: ReadingRates) -> Callable[[int, int], None]:
        """Shows what this model reads from now on, and learns how long it takes."""
        self.end_progress()
        progress = self._progress = ReadingProgress(
            self.console,
            shows=self.shows,
            estimate=rates.estimate,
            took=rates.took,
            position=lambda: llm.n_tokens,
            part=llm.context_params.n_ubatch,
        )

        def read(done: int, total: int) -> None:
            self._keep_quiet()
            progress(done, total)

        return read

    def _keep_quiet(self) -> None:
        if self._keyboard is not None:
            self._keyboard.keep_quiet()

    def end_progress(self) -> None:
        if self._progress is not None:
            self._progress.end()

    # A reply.

    def reply(self, pieces: Iterable[Piece]) -> None:
        """Print a reply as it comes; the line is ended whatever happens."""
        if self.silent:
            for _ in pieces:
                self.end_progress()
            return
        visible = self.show_thinking and self.shows
        last = Piece("\n")
        spinner = self.console.status(Text("thinking", style="dim"), spinner_style="dim")
        try:
            for piece in pieces:
                self.end_progress()
                self._keep_quiet()
                before, last = last, piece
                if not piece.thinking:
                    spinner.stop()
                    if before.thinking and visible:
                        self.console.print("\n")
                    sys.stdout.write(self._clean(piece.text))
                    sys.stdout.flush()
                elif visible:
                    self.console.print(Text(self._clean(piece.text), style="dim italic"), end="")
                elif self.shows:
                    spinner.start()
        finally:
            self.end_progress()
            spinner.stop()
            if last.thinking and visible:
                self.console.print()
            elif not last.thinking and not last.text.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()

    @contextmanager
    def quiet_keyboard(self) -> Iterator[None]:
        """What is typed meanwhile is kept for the next line, and not shown in the middle of an answer."""
        try:
            with QuietKeyboard() as self._keyboard:
                yield
        finally:
            self._keyboard = None

    def figures(self, stats: RunStats, kv_bytes: int) -> None:
        self.note(describe(stats, kv_bytes))

    def _clean(self, text: str) -> str:
        return _CONTROLS.sub("", text) if self._to_terminal else text


def describe(stats: RunStats, kv_bytes: int) -> str:
    """One line: prompt and cached tokens, prefill and generation speed, what drafts brought, size of the KV cache."""

    def rate(value: float) -> str:
        return "" if math.isnan(value) else f", {value:,.1f} tok/s"

    drafts = []
    if stats.drafted_tokens:
        share = f"{stats.acceptance:.0%} of {stats.drafted_tokens:,} drafted tokens accepted"
        drafts = [f"{stats.tokens_per_pass:.1f} tokens a pass, {share}"]
    cached = f" ({stats.cached_tokens:,} cached)" if stats.cached_tokens else ""
    return " · ".join(
        [
            f"prompt {stats.prompt_tokens:,} tokens{cached}",
            f"prefill {stats.prefill_s:.2f} s{rate(stats.prefill_tokens_per_s)}",
            f"generated {stats.generated_tokens:,} tokens{rate(stats.decode_tokens_per_s)}",
            *drafts,
            f"KV {format_bytes(kv_bytes)}",
        ]
    )
