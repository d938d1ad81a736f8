"""What is known of a loaded model and never changes: its sizes, its vocabulary, what it is.

Uses what `upstream.RELIED_ON` lists. For any thread, at any time.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as _c

from swaa_local.engine import model_meta, vocabulary
from swaa_local.engine.guard import Guard, GuardedTokenizer, reads
from swaa_local.engine.limits import check_number
from swaa_local.model_file.model_info import describe_model, file_type_name


class KnownLlama(llama_cpp.Llama):
    """What `upstream.LoadedLlama` tells of its model."""

    _guard: Guard

    n_embd = reads(llama_cpp.Llama.n_embd)
    n_vocab = reads(llama_cpp.Llama.n_vocab)
    token_bos = reads(llama_cpp.Llama.token_bos)
    token_eos = reads(llama_cpp.Llama.token_eos)
    token_nl = reads(llama_cpp.Llama.token_nl)

    def is_end(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        with self._guard.read():
            return bool(_c.llama_vocab_is_eog(self._model.vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether a token is a mark and no text."""
        with self._guard.read():
            return bool(_c.llama_vocab_is_control(self._model.vocab, token))

    def token_text(self, token: int) -> str:
        """A token as the vocabulary spells it, control tokens too."""
        with self._guard.read():
            return str(self._model.token_get_text(token))

    def token_bytes(self, token: int) -> bytes:
        """The text that a token stands for; empty for a control token. A character may take several tokens."""
        with self._guard.read():
            return vocabulary.token_bytes(self._model.vocab, token)

    def special_tokens(self) -> dict[str, int]:
        """The texts that the tokenizer may take for one special token, with that token's `LLAMA_TOKEN_ATTR_*`."""
        with self._guard.read():
            return vocabulary.special_tokens(self._model.vocab)

    def adds_bos(self) -> bool:
        """Whether a prompt of this model begins with its first token."""
        with self._guard.read():
            return bool(self._model.add_bos_token())

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers are recurrent: their state cannot be cut, nor take tokens back."""
        with self._guard.read():
            return model_meta.is_recurrent(self.model)

    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained on."""
        with self._guard.read():
            return int(self._model.n_ctx_train())

    def description(self) -> str:
        """Architecture, parameters and type of the weights, in one line."""
        with self._guard.read():
            return describe_model(
                self.metadata["general.architecture"],
                _c.llama_model_n_params(self.model),
                file_type_name(self.metadata.get("general.file_type")),
            )

    def n_ctx(self) -> int:
        """Tokens of the context, as llama.cpp rounded them."""
        self._guard.check_open()
        return self.__dict__.get("_n_ctx") or int(super().n_ctx())

    def tokenizer(self) -> GuardedTokenizer:
        """Upstream's tokenizer; it raises `ClosedError` once this is closed."""
        return GuardedTokenizer(self)

    def tokenize(self, *args: Any, **kwargs: Any) -> list[int]:
        """Upstream's `tokenize`, with which every completion begins."""
        self._guard.check_open()
        return super().tokenize(*args, **kwargs)

    def pooling_type(self) -> int:
        """Upstream's `pooling_type`."""
        with self._guard.look():
            return int(super().pooling_type())

    def set_seed(self, seed: int) -> None:
        """Upstream's `set_seed`. Raises `OutOfRange`."""
        super().set_seed(check_number("seed", seed))
