"""How the demo looks: a live table on a terminal, lines and a plain table elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from swaa_local.demo.run import OF_FILE, THINKING, WITHOUT_TAIL, Asked, Outcome, Row, View
from swaa_local.needle import documents as facts
from swaa_local.report.intervals import wilson
from swaa_local.report.tables import markdown_table
from swaa_local.report.terminal import Console
from swaa_local.text.printable import printable
from swaa_local.text.units import format_bytes

_ANSWER_WIDTH = 18


class TerminalView(View):
    """Draws on stderr while it runs. Use as a context manager."""

    def __init__(self) -> None:
        self.console = Console()
        self._live: Live | None = None
        self._rows: Sequence[Row] = ()
        self._n_questions = 0
        self._asked: Asked | None = None
        self._doing = Text()
        self._progress: dict[str, float] = {}

    def __enter__(self) -> TerminalView:
        return self

    def __exit__(self, *args: object) -> None:
        self._stop()

    def begin(self, model: str, rows: Sequence[Row], n_questions: int) -> None:
        self._rows, self._n_questions = rows, n_questions
        if self.console.is_terminal:
            self._live = Live(console=self.console, transient=True, refresh_per_second=8)
            self._live.start()

    def note(self, text: str) -> None:
        self._say(text)

    def document(self, document: facts.Document, n_tokens: int, window: int) -> None:
        words, n_facts = len(document.text.split()), len(document.facts)
        self._say(
            f"a document of {words} words, {n_tokens} tokens, with {n_facts} facts in it; the window is {window} "
            f"tokens, so it is {n_tokens / window:.0f} windows long"
        )
        start = document.text[: document.text.index(" ", 300)] if len(document.text) > 320 else document.text
        self._say(f"it begins: {start} ...")
        self._progress = {}

    def reading(self, row: Row, done: int, total: int) -> None:
        self._progress[row.title] = done / total
        self._doing = Text(f"reading the document: {row.title}", style="dim")
        if self._live is None and done == total and row.prefill_s:
            self._say(f"{row.title}: read at {row.prefill_tokens / row.prefill_s:.0f} tokens/s")
        self._refresh()

    def asking(self, asked: Asked) -> None:
        self._asked = asked
        fact = asked.placed.fact
        self._doing = Text.assemble(
            (f"question {asked.number} of {self._n_questions}: ", "dim"),
            (fact.question, "bold"),
            (f"  at {100 * asked.depth:.0f} % of the document; expected: {fact.value}", "dim"),
        )
        if self._live is None:
            self._say(f"question {asked.number} of {self._n_questions}: {fact.question} (expected: {fact.value})")
        self._refresh()

    def answered(self, row: Row) -> None:
        self._refresh()

    def end(self) -> None:
        self._stop()

    def _say(self, text: str) -> None:
        self.console.print(printable(text), style="dim", markup=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(Group(self._table(), self._doing))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, justify in (("", "left"), ("reads", "right"), ("KV cache", "right"), ("answer", "left")):
            table.add_column(name, justify=justify, min_width=_ANSWER_WIDTH if name == "answer" else None)  # type: ignore[arg-type]
        table.add_column("right", justify="right")
        number = self._asked.number if self._asked else 0
        for row in self._rows:
            done = len(row.verdicts) == number and number > 0
            table.add_row(
                row.title, self._speed(row), format_bytes(row.kv_bytes), _answer_text(row) if done else "", _tally(row)
            )
        return table

    def _speed(self, row: Row) -> str:
        share = self._progress.get(row.title, 0.0)
        if 0 < share < 1:
            return f"{100 * share:.0f} %"
        return f"{row.prefill_tokens / row.prefill_s:,.0f} tok/s" if row.prefill_s else ""

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _answer_text(row: Row) -> Text:
    verdict = row.verdicts[-1]
    shown = printable(" ".join(verdict.answer.split()))
    shown = shown if len(shown) < _ANSWER_WIDTH else f"{shown[: _ANSWER_WIDTH - 4]}..."
    return Text(f"{'✓' if verdict.correct else '✗'} {shown}", style="green" if verdict.correct else "red")


def _tally(row: Row) -> str:
    return f"{row.right}/{len(row.verdicts)}" if row.verdicts else ""


def result(outcome: Outcome) -> RenderableType | str:
    """The final table: drawn for a terminal, Markdown elsewhere."""
    head = ["", "reads", "speed-up", "KV cache", "right", "95 %", "last answer"]
    full = outcome.rows[0]
    lines = []
    for row in outcome.rows:
        n = len(row.verdicts)
        low, high = wilson(row.right, n)
        lines.append(
            [
                row.title,
                f"{row.prefill_tokens / row.prefill_s:,.0f} tok/s",
                f"{full.prefill_s / row.prefill_s:.1f}",
                format_bytes(row.kv_bytes),
                f"{row.right}/{n} = {100 * row.right / n:.0f} %",
                f"{100 * low:.0f}-{100 * high:.0f}",
                _plain(row),
            ]
        )
    if not sys.stdout.isatty():
        return markdown_table(head, lines)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i in (0, 6) else "right")
    for row, line in zip(outcome.rows, lines, strict=True):
        share = row.right / len(row.verdicts)
        style = "green" if share >= 0.9 else "red" if share <= 0.2 else ""
        table.add_row(*line[:4], Text(line[4], style=style), line[5], _answer_text(row))
    return table


def _plain(row: Row) -> str:
    verdict = row.verdicts[-1]
    shown = printable(" ".join(verdict.answer.split()))
    return f"{shown[:_ANSWER_WIDTH]} {'(right)' if verdict.correct else '(wrong)'}"


def conclusion(outcome: Outcome) -> str:
    """What the table shows, in words made of its figures."""
    rows = {row.title: row for row in outcome.rows}
    full, naive = outcome.rows[0], outcome.rows[1]
    direct, thinking, no_tail = rows[OF_FILE], rows[THINKING], rows.get(WITHOUT_TAIL)
    tail = direct.variant.schedule.active_tail
    of_tail = (
        f" It owes that to its tail: the last {tail} tokens of the prompt, and so the question, read the whole text; "
        f"without it {no_tail.right} {'is' if no_tail.right == 1 else 'are'} right."
        if no_tail is not None and no_tail.right < direct.right
        else ""
    )
    return (
        f"Full attention answers {full.right} of {len(full.verdicts)}. A window of {outcome.window} tokens alone reads "
        f"{full.prefill_s / naive.prefill_s:.1f} times as fast and answers {naive.right}. The file's schedule reads "
        f"{full.prefill_s / direct.prefill_s:.1f} times as fast and answers {direct.right} at once, "
        f"{thinking.right} after thinking.{of_tail} The document has {outcome.prompt_tokens:,} tokens; the gain grows "
        "with the length."
    )
