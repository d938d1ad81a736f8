"""What llama-server keeps on disk of prompts that were read: where, how much, and for which of its states.

The server finds and writes the files itself (server-disk-cache.cpp in the engine's sources). Knows names of its
options.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from swaa_local.errors import SWAAError
from swaa_local.prefix_cache.identity import model_identity
from swaa_local.prefix_cache.store import PrefixCache
from swaa_local.schedule.config import Schedule

# Options and variables that change no state; any other belongs to the key, known or not.
_WITHOUT_EFFECT = frozenset(
    {
        *("-t", "--threads", "-tb", "--threads-batch", "-np", "--parallel", "-a", "--alias", "-c", "--ctx-size"),
        *("-cram", "--cache-ram", "--slot-save-path", "-to", "--timeout", "--log-file", "-lv", "--verbosity"),
        *("--spec-window-size", "--spec-window-n-max", "LLAMA_ARG_SPEC_WINDOW_SIZE", "LLAMA_ARG_SPEC_WINDOW_N_MAX"),
        *("LLAMA_ARG_THREADS", "LLAMA_ARG_N_PARALLEL", "LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_CACHE_RAM"),
    }
)
_FLAGS_WITHOUT_EFFECT = frozenset({"--metrics", "--no-ui", "--no-webui", "--slots", "--no-slots", "--props"})


def disk_cache_environment(
    path: Path,
    schedule: Schedule | None,
    extra: Sequence[str],
    env: Mapping[str, str],
    *,
    max_bytes: int | None,
    note: Callable[[str], None],
) -> dict[str, str]:
    """The variables that tell llama-server of its cache; none without one. What cannot be had is noted."""
    if max_bytes is None:
        return {}
    try:
        cache = PrefixCache(max_bytes=max_bytes, note=note)
        key = _key(path, schedule, extra, env)
    except (SWAAError, OSError) as error:
        note(f"what is read is not kept: {error}")
        return {}
    if not cache.prepare():
        return {}
    return {
        "LLAMA_DISK_CACHE_DIR": str(cache.directory),
        "LLAMA_DISK_CACHE_KEY": key,
        "LLAMA_DISK_CACHE_BYTES": str(max_bytes),
    }


def _key(path: Path, schedule: Schedule | None, extra: Sequence[str], env: Mapping[str, str]) -> str:
    """A digest of all that shapes states but the tokens; the schedule's tail does not."""
    said, words = [], list(extra)
    while words:
        word = words.pop(0)
        if word in _WITHOUT_EFFECT:
            del words[:1]
        elif word not in _FLAGS_WITHOUT_EFFECT:
            said.append(_with_content(word))
    variables = sorted(
        (name, value)
        for name, value in env.items()
        if name.startswith(("LLAMA_ARG_", "GGML_")) and name not in _WITHOUT_EFFECT
    )
    parts = {
        "engine": importlib.metadata.version("llama-cpp-python"),
        "server": "serve",  # chat's states are of other parts of a prompt
        "model": model_identity(path),
        "schedule": schedule.as_dict() | {"tail": 0} if schedule else None,
        "options": said,
        "variables": variables,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _with_content(word: str) -> str:
    """An option's value; of a file, such as an adapter, with its size and time of change."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(word)
        return f"{word} {status.st_size} {status.st_mtime_ns}"
    return word
