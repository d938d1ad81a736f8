"""The beginning of a prompt from a `PrefixCache`, and into it: what of a loaded model's cells may be used again.

Only cells that were read as a prompt are kept for others: not those of a tail or of generated tokens, which see more.
A prompt is taken up where its parts would have begun without the cache (`n_ubatch` tokens from the beginning or from
the end of a document), so that an answer does not depend on the cache, not even by rounding. Where layers have rings,
or windows of the model's own, or are recurrent, a state serves at its very end only. Knows the engine's states of a
sequence; nothing of files.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as _c

from swaa_local.engine.context_length import gpu_layers
from swaa_local.engine.drafts import DraftingLlama
from swaa_local.errors import StateError
from swaa_local.prefix_cache.identity import file_identity, model_identity
from swaa_local.prefix_cache.state_file import Cells, Tokens
from swaa_local.prefix_cache.store import LEAST_TOKENS, PrefixCache, common_prefix
from swaa_local.schedule.config import Schedule
from swaa_local.schedule.text import in_words

_SHAPING = (
    *("n_ubatch", "type_k", "type_v", "flash_attn_type", "offload_kqv", "rope_scaling_type", "rope_freq_base"),
    *("rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)
"""Of `llama_context_params`: what changes cells, or how they are rounded."""


@dataclass(frozen=True)
class Identity:
    """What engine and which weights make the cells: fingerprints. adapter: "" without one."""

    engine: str
    model: str
    adapter: str
    adapter_scale: float


def identity_of(llm: DraftingLlama) -> Identity:
    """Of the files as they are now. Raises `SWAAError` and OSError if they are gone."""
    library = Path(_c._lib._name).stat()
    return Identity(
        engine=f"{importlib.metadata.version('llama-cpp-python')} {library.st_size} {library.st_mtime_ns}",
        model=model_identity(llm.model_path),
        adapter=file_identity(llm.lora_path) if llm.lora_path else "",
        adapter_scale=llm.lora_scale,
    )


def cells_key(llm: DraftingLlama, identity: Identity) -> str:
    """A digest of everything but tokens that shapes what a context holds; the tail of the schedule does not."""
    params, schedule = llm.context_params, llm.schedule
    trained = int(llm.metadata.get(f"{llm.metadata.get('general.architecture')}.context_length", 0))
    parts = {
        "identity": asdict(identity),
        "schedule": schedule.as_dict() | {"tail": 0} if schedule else None,
        "overrides": repr(llm.kv_overrides),
        "gpu": gpu_layers(llm.model_params.n_gpu_layers) > 0,
        "workers": list(llm.rpc_servers),
        # which cells of its own windows a model keeps
        "swa_full": bool(params.swa_full) if llm.model_layers.own_window else None,
        # some models have other RoPE factors for contexts that are longer than these
        "long": llm.n_ctx() > (trained or llm.n_ctx_train()),
        # parts begin anew with each batch
        "batch": llm.n_batch if llm.n_batch % params.n_ubatch else 0,
        **{name: getattr(params, name) for name in _SHAPING},
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def copy_cells(llm: DraftingLlama) -> Cells:
    """The cells of all tokens that the context holds. Raises `StateError`."""
    size = _c.llama_state_seq_get_size(llm.ctx, 0)
    cells = np.empty(size, np.uint8)
    if _c.llama_state_seq_get_data(llm.ctx, cells.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), size, 0) != size:
        raise StateError("the engine does not give its state")
    return cells


def set_cells(llm: DraftingLlama, cells: Cells) -> bool:
    """Replace what the context holds; False if the engine refuses."""
    data = cells.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    return bool(_c.llama_state_seq_set_data(llm.ctx, data, cells.nbytes, 0) == cells.nbytes)


class HeldCells:
    """What a context holds, to be given to another context of the same model and schedule."""

    def __init__(self, llm: DraftingLlama) -> None:
        llm._drop_ahead()
        self._tokens = np.asarray(llm.input_ids[: llm.n_tokens], np.int32)
        self._cells = copy_cells(llm) if len(self._tokens) else None

    def give_to(self, restore: Callable[[Tokens, Cells, int], None], n_ctx: int) -> None:
        """restore: as of `CachedPrefixes`. What does not fit is left out, and read again."""
        if self._cells is not None and len(self._tokens) <= n_ctx:
            with contextlib.suppress(StateError):
                restore(self._tokens, self._cells, len(self._tokens))


class CachedPrefixes:
    """One `Llama` and one cache. restore: makes the context hold the first of these tokens, or raises `StateError`.

    To be made when the model was just loaded: its file may be another one later. Raises as `identity_of`.
    """

    def __init__(self, llm: DraftingLlama, cache: PrefixCache, restore: Callable[[Tokens, Cells, int], None]) -> None:
        self._llm, self.cache, self._restore = llm, cache, restore
        self.identity = identity_of(llm)
        self._key: tuple[Schedule | None, str] | None = None
        self._n_pure = 0  # first tokens of the context that were all read as a prompt
        self._n_kept = 0  # first tokens of the context that were offered to the cache, or came from it
        self._n_on_disk = 0  # first tokens of the context that the cache has
        self._ends: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        schedule = self._llm.schedule
        if self._key is None or self._key[0] != schedule:
            self._key = schedule, cells_key(self._llm, self.identity)
        return self._key[1]

    # A generation: `begin`, then for each evaluation `begin_read`, after each of its parts `count_read` and `has_read`.

    def worth_keeping_from(self, n_held: int, n_prompt: int) -> int:
        """Of the first tokens that the context holds of a prompt: those to go on from, so that it can be kept.

        Behind a system message that a short prompt read as its tail, nothing could be: a long text reads it again.
        """
        is_cheap = n_held - self._n_pure < LEAST_TOKENS <= n_prompt - n_held
        return min(n_held, self._n_pure) if is_cheap else n_held

    def begin(self, tokens: Sequence[int], ends: Sequence[int], *, tail: int = 0) -> None:
        """Take the beginning of a prompt from the cache, if that has more of it than the context, which holds nothing
        else any more.

        ends: positions where documents end, in order. tail: tokens of this prompt that see all of it, and so must not
        come from another prompt, of which they were no tail.
        """
        llm, prompt = self._llm, np.asarray(tokens, np.int32)
        self._n_on_disk = min(self._n_on_disk, llm.n_tokens)
        self._ends = tuple(ends)
        held = common_prefix(llm.input_ids[: llm.n_tokens], prompt)
        whole = llm.serves_whole
        for match in self.cache.find(self.key, prompt):
            usable = self._usable(match.n_common, match.n_tokens, len(prompt) - max(1, tail), whole=whole)
            if match.n_tokens > llm.n_ctx() or usable < held + LEAST_TOKENS:
                continue
            state = self.cache.load(match.path)
            if state is None:
                continue
            try:
                self._restore(state[1], state[2], usable)
            except StateError as error:
                self.cache.drop(match.path, str(error))
                held = 0
                continue
            self._n_pure = self._n_kept = self._n_on_disk = usable
            return

    def _usable(self, n_common: int, n_state: int, most: int, *, whole: bool) -> int:
        """Tokens of a state that a prompt can begin with. most: one less than the prompt has, which needs logits."""
        n_common = min(n_common, most)
        if whole:
            return n_state if n_state <= n_common else 0
        base = max((end for end in self._ends if end <= n_common), default=0)
        n_batch, n_ubatch = self._llm.n_batch, self._llm.context_params.n_ubatch
        batches, rest = divmod(n_common - base, n_batch)
        return base + batches * n_batch + rest // n_ubatch * n_ubatch

    def begin_read(self, start: int) -> None:
        """The context is cut to `start` tokens, and others are about to be evaluated."""
        self._n_pure, self._n_kept = min(self._n_pure, start), min(self._n_kept, start)
        self._n_on_disk = min(self._n_on_disk, start)

    def count_read(self, start: int, prompt_end: int) -> None:
        """A part was evaluated from `start` on. Ctrl-C must not come between."""
        if self._n_pure == start and self._llm.n_tokens <= prompt_end:
            self._n_pure = self._llm.n_tokens

    def has_read(self, prompt_end: int) -> float:
        """A part was counted. Keeps what was read if it ends here; the seconds that took."""
        n_tokens = self._llm.n_tokens
        if not self.keeps_more:
            return 0.0
        # Without documents, and behind the last of them, all that was read as a prompt is one.
        if n_tokens not in self._ends and n_tokens != prompt_end:
            return 0.0
        return self._keep()

    # A prompt that was given up: whole parts of it, behind which the same prompt goes on.

    @property
    def keeps_more(self) -> bool:
        """Whether there is something to write."""
        n_tokens = self._llm.n_tokens
        return n_tokens <= self._n_pure and n_tokens - self._n_kept >= LEAST_TOKENS

    def keep_read(self) -> int:
        """Keep what was read; the first tokens of the prompt that the cache has then."""
        if self.keeps_more:
            self._keep()
        return min(self._n_on_disk, self._llm.n_tokens)

    def _keep(self) -> float:
        started_s = time.perf_counter()
        llm = self._llm
        tokens = np.asarray(llm.input_ids[: llm.n_tokens], np.int32)
        if self.save(tokens, replaces_shorter=not llm.serves_whole):
            self._n_on_disk = len(tokens)
        self._n_kept = len(tokens)  # also where it could not be: once is enough
        return time.perf_counter() - started_s

    def save(self, tokens: Tokens, **options: Any) -> bool:
        """Keep the context, which holds these tokens; keywords are those of `PrefixCache.save`."""
        llm = self._llm
        return self.cache.save(
            self.key,
            tokens,
            copy_cells(llm),
            model=Path(llm.model_path).name,
            schedule=in_words(llm.schedule) if llm.schedule else in_words(Schedule.full(1)),
            **options,
        )

    # A conversation, whose cells are all its own: answers were generated.

    def save_conversation(self, name: str) -> bool:
        """Keep all that the context holds under a name; False if that is little, or cannot be done."""
        llm = self._llm
        llm._drop_ahead()
        tokens = np.asarray(llm.input_ids[: llm.n_tokens], np.int32)
        return len(tokens) >= LEAST_TOKENS and self.save(tokens, conversation=name)

    def load_conversation(self, name: str) -> int:
        """Make the context hold what was saved; its tokens, 0 if there is nothing that fits."""
        state = self.cache.load_conversation(self.key, name)
        if state is None or len(state[1]) > self._llm.n_ctx():
            return 0
        try:
            self._restore(state[1], state[2], len(state[1]))
        except StateError as error:
            self.cache.note(f"the saved conversation is read again: {error}")
            return 0
        self._n_pure = self._n_kept = self._n_on_disk = 0
        return len(state[1])
