"""One question to a loaded model, greedily, and what came of it.

Knows models and templates; nothing of tasks or scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from swaa_local.engine.run_stats import RunStats
from swaa_local.generation.stream import Stream
from swaa_local.generation.template import ChatTemplate, Prompt
from swaa_local.llama import Llama

Finish = Literal["stop", "length", "thinking"]
"""The model ended its answer; it was cut at the limit; it was cut while it still thought."""


@dataclass(frozen=True)
class Answer:
    """text: behind the thought, and without the prefix that it was given. thinking: the thought."""

    text: str
    thinking: str
    finish: Finish
    stats: RunStats


class Answerer:
    """Asks a model. `llm.set_schedule` may be called between questions.

    think: None leaves it to the model's template. think_tokens: at most that many of a thought.
    """

    def __init__(self, llm: Llama, *, think: bool | None = None, think_tokens: int = 2048) -> None:
        self.llm = llm
        self.template = ChatTemplate(llm)
        self.think = think
        self.think_tokens = think_tokens

    @property
    def may_think(self) -> bool:
        """True if answers may begin with a thought; then they are not begun for the model."""
        if self.think is not None and self.template.has_thinking_switch:
            return self.think
        return self.template.has_thinking_switch or self._render("").closing is not None

    def prompt(self, message: str, answer_prefix: str = "") -> Prompt:
        """The tokens of a user's message, and behind them the beginning of the answer where there is no thought."""
        prompt = self._render(message)
        if not answer_prefix or self.may_think:
            return prompt
        begun = self.llm.tokenize(answer_prefix.encode(), add_bos=False, special=False)
        return Prompt(prompt.tokens + begun, prompt.closing)

    def count(self, message: str, answer_prefix: str = "") -> int:
        """Tokens of that prompt."""
        return len(self.prompt(message, answer_prefix).tokens)

    def ask(
        self, prompt: Prompt, max_tokens: int, *, reuse: bool = False, on_token: Callable[[], None] | None = None
    ) -> Answer:
        """Evaluate the prompt and generate at most `max_tokens` behind the thought.

        reuse: keep what the cache already holds of this prompt; otherwise it is read from its first token, as the times
        of an evaluation must be. on_token: called with each generated token. Raises `PromptTooLong`.
        """
        llm = self.llm
        if not reuse:
            llm.reset()
        stream = Stream(
            llm,
            prompt,
            max_answer_tokens=max_tokens,
            max_thinking_tokens=self.think_tokens,
            on_token=on_token,
            temp=0.0,
            speculate=False,  # by the clock, a close choice could fall otherwise the next time
        )
        for _ in stream:
            pass
        assert llm.last_run is not None
        return Answer(
            text=stream.text.strip(),
            thinking=stream.thinking.strip(),
            finish="thinking" if stream.thought_unfinished else "stop" if stream.finish == "stop" else "length",
            stats=llm.last_run,
        )

    def _render(self, message: str) -> Prompt:
        return self.template.prompt(self.llm, [{"role": "user", "content": message}], think=self.think)
