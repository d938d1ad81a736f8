"""The errors that users catch. Those of running a model are also the built-in error that `llama_cpp.Llama` raises in
their place. Imports nothing but the words for sizes; errors of one command live with it.
"""

from __future__ import annotations

from swaa_local.text.units import format_bytes

_ROOM_TO_ANSWER = 512  # tokens
_CONTEXT_STEP = 256  # tokens; llama.cpp pads contexts to it


class SWAAError(Exception):
    """Base of the library's errors; the message is one sentence for the user. exit_code: of a command that it ends."""

    exit_code = 1


class ScheduleError(SWAAError, ValueError):
    """A schedule that makes no sense, or not for this model."""


class GGUFError(SWAAError):
    """The file cannot be read as GGUF, or not as the model it should be; the message names the file."""


class ModelLoadError(SWAAError, ValueError):
    """llama.cpp refused the model or the context; the message is its own reason."""


class ContextTooLarge(ModelLoadError):
    """A context that was asked for needs more memory than this machine can give. Nothing was allocated for it.

    needed_bytes: of the host, for the KV cache and recurrent states alone. free_bytes: what can be had. n_ctx_fits:
    tokens that would fit.
    """

    def __init__(self, n_ctx: int, needed_bytes: int, free_bytes: int, n_ctx_fits: int) -> None:
        self.n_ctx, self.needed_bytes, self.free_bytes, self.n_ctx_fits = n_ctx, needed_bytes, free_bytes, n_ctx_fits
        super().__init__(n_ctx, needed_bytes, free_bytes, n_ctx_fits)

    def __str__(self) -> str:
        less = f"ask for at most {self.n_ctx_fits} tokens" if self.n_ctx_fits else "free some memory"
        return (
            f"a context of {self.n_ctx} tokens needs a KV cache of {format_bytes(self.needed_bytes)}, and at most "
            f"{format_bytes(self.free_bytes)} of memory can be had; {less}, or take a smaller cache type, such as q8_0"
        )


class PromptTooLong(SWAAError, ValueError):
    """A prompt that does not fit the context. Nothing of it was evaluated."""

    def __init__(self, n_prompt: int, n_ctx: int) -> None:
        self.n_prompt, self.n_ctx = n_prompt, n_ctx
        super().__init__(n_prompt, n_ctx)

    @property
    def n_ctx_needed(self) -> int:
        """Tokens of context that would hold the prompt and an answer."""
        return -(-(self.n_prompt + _ROOM_TO_ANSWER) // _CONTEXT_STEP) * _CONTEXT_STEP

    def advice(self, option: str, what: str = "it") -> str:
        """The message, with the option that raises the context as the caller spells it: `-c {}`, `n_ctx={}`."""
        return (
            f"prompt is {self.n_prompt} tokens but the context is {self.n_ctx}; "
            f"pass {option.format(self.n_ctx_needed)} or shorten {what}"
        )

    def __str__(self) -> str:
        return self.advice("n_ctx={}")


class ContextFull(SWAAError, RuntimeError):
    """The context has no room for another generated token."""

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        super().__init__(f"the context of {n_ctx} tokens is full; pass a larger n_ctx or start over")


class DecodeError(SWAAError, RuntimeError):
    """`llama_decode` failed; the message is its own reason."""


class StateError(SWAAError, RuntimeError):
    """A saved state that does not fit this model, schedule or context. The context is empty afterwards."""


class TextTooLong(SWAAError, ValueError):
    """A text to embed does not fit a batch."""

    def __init__(self, n_tokens: int, n_batch: int) -> None:
        self.n_tokens = n_tokens
        self.n_batch = n_batch
        super().__init__(
            f"text is {n_tokens} tokens but a batch is {n_batch}; pass n_batch={n_tokens} and n_ubatch={n_tokens}, or "
            "truncate=True to embed its beginning"
        )


class ClosedError(SWAAError, RuntimeError):
    """The engine is needed, and `close()` has freed it."""

    def __init__(self) -> None:
        super().__init__("this Llama is closed")


class BusyError(SWAAError, RuntimeError):
    """Another thread's call runs, or a callback inside a call would change what the call works on."""


class ContextChanged(SWAAError, RuntimeError):
    """A generator cannot go on: since its last token, another call has changed what the context holds."""

    def __init__(self) -> None:
        super().__init__(
            "since this generator's last token, another call has changed what the context holds; "
            "finish or close a generator before you use its Llama otherwise"
        )


class OutOfRange(SWAAError, ValueError):
    """A number that the engine does not take."""


class GrammarError(SWAAError, ValueError):
    """A grammar that llama.cpp cannot read."""


class TemplateError(SWAAError, ValueError):
    """The model's chat template refuses the conversation; the message is the template's own."""
