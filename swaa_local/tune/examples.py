"""From conversations to tokens, through the model's own template, and from examples to rows of tokens.

Knows transformers' tokenizers by what they do; nothing of models, masks or PyTorch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from swaa_local.text.printable import printable
from swaa_local.tune.data import Conversation
from swaa_local.tune.request import TuneError


@dataclass(frozen=True)
class Example:
    """Tokens of a prompt and, from `n_prompt` on, of its answer with the token that ends it."""

    tokens: tuple[int, ...]
    n_prompt: int
    where: str
    teacher: bool = False
    """Whether full attention's own distribution is the target, and not the token alone."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_answer(self) -> int:
        return len(self.tokens) - self.n_prompt


class Renderer:
    """Conversations as a model's tokenizer and template give them. think: for the template; None: its default."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], *, think: bool | None = None) -> None:
        """ends: tokens that end an answer; the first one is written where the template has none."""
        self._tokenizer = tokenizer
        self._ends = list(ends)
        self._switches = {} if think is None else {"enable_thinking": think, "thinking": think}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)

        # As the engine's programs do it: a model that wants its first token gets it, whatever the template writes.
        bos = tokenizer.bos_token_id
        self._bos = (bos,) if bos is not None and tokenizer("a").input_ids[:1] == [bos] else ()

    def special_token_in(self, text: str) -> str | None:
        """A special token that a text spells out, which the tokenizer would take for it."""
        return next((token for token in self._special if token in text), None)

    def prompt(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Tokens up to where the answer begins."""
        return self._with_bos(self._tokens(self._render(messages, add_generation_prompt=True)))

    def count(self, text: str) -> int:
        return len(self._tokens(text))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode(self, text: str) -> tuple[int, ...]:
        return self._tokens(text)

    def example(self, conversation: Conversation) -> Example:
        """Raises `TuneError` for a text that spells a special token, and for a template that refuses it."""
        for _, text in conversation.messages:
            if token := self.special_token_in(text):
                raise TuneError(
                    f"{conversation.where}: the text holds {printable(token)}, which the tokenizer takes for a mark of "
                    "its own; take it out"
                )
        where = conversation.where
        before = self._render(conversation.prompt, add_generation_prompt=True, where=where)
        spoken = [*conversation.prompt, {"role": "assistant", "content": conversation.answer}]
        whole = self._render(spoken, add_generation_prompt=False, where=where)
        # A template may change what it shows of earlier turns once there is another one.
        answer = whole[len(before) :] if whole.startswith(before) else conversation.answer
        return self.joined(self._with_bos(self._tokens(before)), self._tokens(answer), where)

    def joined(self, prompt: Sequence[int], answer: Sequence[int], where: str, *, teacher: bool = False) -> Example:
        """An example of tokens; what a template writes behind the end of an answer is left out."""
        last = next((i for i, token in reversed(list(enumerate(answer))) if token in self._ends), None)
        ended = tuple(answer[: last + 1]) if last is not None else (*answer, self._ends[0])
        return Example((*prompt, *ended), len(prompt), where, teacher)

    def _render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool, where: str = "") -> str:
        import jinja2

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **self._switches
                )
            )
        except jinja2.TemplateError as error:
            raise TuneError(f"{where}: the model's chat template refuses it: {error}") from None

    def _with_bos(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tokens if tokens[:1] == self._bos else self._bos + tokens

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else ()


def within(examples: Sequence[Example], length: int, *, skip_long: bool) -> tuple[list[Example], int]:
    """Those of at most `length` tokens, and how many are left out.

    Raises `TuneError` for a longer one unless `skip_long`, and where none is left.
    """
    long = [example for example in examples if len(example) > length]
    if long and not skip_long:
        longest = max(len(example) for example in long)
        raise TuneError(
            f"{long[0].where} is {len(long[0])} tokens with its answer but a row is {length}"
            + (f", and {len(long) - 1} more are longer" if len(long) > 1 else "")
            + f"; pass --length {-(-longest // 128) * 128}, or --skip-long to leave such examples out"
        )
    kept = [example for example in examples if len(example) <= length]
    if not kept:
        raise TuneError(
            f"no example fits a row of {length} tokens, the shortest has {min(map(len, examples))}; pass a larger "
            "--length"
        )
    return kept, len(long)


def split_off(examples: Sequence[Example], n: int | None, seed: int) -> tuple[list[Example], list[Example]]:
    """(to train on, held out). n: how many are held out; None: a tenth of them, 2 to 16. Raises `TuneError`."""
    chosen = min(16, max(2, len(examples) // 10)) if n is None else n
    if len(examples) <= chosen:
        raise TuneError(
            f"{len(examples)} examples are too few, for {chosen} are held out to measure on; give more, or a smaller "
            "--held-out"
        )
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    held = set(order[:chosen])
    return [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in sorted(held)]


def pack(examples: Sequence[Example], length: int, seed: int) -> list[list[Example]]:
    """Examples in rows of at most `length` tokens, each in one: the longest first, each where it fits best. Those for a
    teacher and others do not share a row. The rows are in a random order."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        fits: Callable[[int], bool] = lambda i: room[i] >= len(example) and rows[i][0].teacher == example.teacher  # noqa: E731, B023
        best = min((i for i in range(len(rows)) if fits(i)), key=room.__getitem__, default=None)
        if best is None:
            rows.append([example])
            room.append(length - len(example))
        else:
            rows[best].append(example)
            room[best] -= len(example)
    random.Random(seed).shuffle(rows)
    return rows
