"""An answer as plain data, for scripts."""

from __future__ import annotations

import math
from typing import Any

from swaa_local.chat.session import Session
from swaa_local.engine.run_stats import RunStats


def reply_as_dict(session: Session, question: str) -> dict[str, Any]:
    """The last reply of a session, or that there is none: `finish` says how it ended. Seconds and tokens as named."""
    reply = session.turns[-1] if session.replied else None
    schedule = session.llm.schedule
    return {
        "model": str(session.llm.model_path),
        "schedule": schedule.as_dict() if schedule else None,
        "question": question,
        "answer": reply.text if reply else "",
        "thinking": reply.thinking if reply else "",
        "finish": session.finish,
        **_figures(session.stats),
    }


def _figures(stats: RunStats | None) -> dict[str, Any]:
    if stats is None:
        return {"tokens": None, "timings": None}
    return {
        "tokens": {"prompt": stats.prompt_tokens, "cached": stats.cached_tokens, "generated": stats.generated_tokens},
        "timings": {
            "prefill_s": round(stats.prefill_s, 4),
            "decode_s": round(stats.decode_s, 4),
            "prefill_tokens_per_s": _number(stats.prefill_tokens_per_s),
            "decode_tokens_per_s": _number(stats.decode_tokens_per_s),
        },
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)
