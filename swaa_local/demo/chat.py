"""After the demo: the document goes to the chat, if there is somebody at a terminal who wants it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swaa_local.chat.request import ChatOptions
from swaa_local.chat.run import chat
from swaa_local.chat.settings import Settings
from swaa_local.demo.run import Asked
from swaa_local.engine.options import EngineOptions
from swaa_local.needle.model import CHAT_SETTINGS
from swaa_local.schedule.choice import ScheduleOptions

_N_EXAMPLES = 3


def offer_chat(model: Path, questions: Sequence[Asked], engine: EngineOptions) -> int:
    """Ask on a terminal, and run the chat; the exit code is the chat's, or 0 without one."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return 0
    document = questions[-1].document
    print("\nTalk to the model about the document? It knows nothing else. You could ask:", file=sys.stderr)
    for placed in document.facts[:: max(1, len(document.facts) // _N_EXAMPLES)][:_N_EXAMPLES]:
        print(f"  {placed.fact.question}  (it says {placed.fact.value})", file=sys.stderr)
    try:
        print("[y/N] ", end="", file=sys.stderr, flush=True)
        wanted = sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return 0
    if not wanted:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.txt"
        path.write_text(document.text, encoding="utf-8")
        return chat(
            ChatOptions(
                model=str(model),
                schedule=ScheduleOptions(),
                settings=Settings(**CHAT_SETTINGS),
                given=tuple(CHAT_SETTINGS),
                files=(str(path),),
                engine=engine,
            )
        )
