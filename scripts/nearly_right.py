"""Requests that are nearly right: one of llama-server's, with a value or two of a wrong kind, missing or new."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from server_faults import tool

_CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": "x",
            "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "user", "content": "b"},
    ],
    "tools": [
        tool(
            "f",
            {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "minimum": 1, "maximum": 3},
                    "b": {"type": "string", "pattern": "^a+$", "minLength": 1},
                    "c": {"type": "array", "items": {"enum": [1, "a"]}, "minItems": 1, "maxItems": 3},
                    "d": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/e"}]},
                },
                "$defs": {"e": {"const": 3}},
                "required": ["a"],
                "additionalProperties": False,
            },
        )
    ],
    "tool_choice": "auto",
    "max_tokens": 2,
    "temperature": 0.5,
    "stop": ["x"],
    "response_format": {"type": "text"},
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_format": "auto",
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "logit_bias": {"5": 1},
}
_COMPLETION = {
    "prompt": "abc",
    "n_predict": 2,
    "temperature": 0.5,
    "dynatemp_range": 0.1,
    "dynatemp_exponent": 1.0,
    "repeat_last_n": 4,
    "repeat_penalty": 1.1,
    "dry_multiplier": 0.5,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": 4,
    "dry_sequence_breakers": ["a"],
    "mirostat": 0,
    "adaptive_target": 0.5,
    "seed": 1,
    "n_probs": 2,
    "min_keep": 1,
    "n_keep": 0,
    "prompt_tail": 3,
    "n_indent": 0,
    "t_max_predict_ms": 1000,
    "response_fields": ["content"],
    "samplers": ["top_k", "temperature"],
    "logit_bias": [[5, 1.0]],
    "stop": ["q"],
    "id_slot": -1,
    "lora": [],
    "preserved_tokens": ["a"],
    "grammar_triggers": [],
    "json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "reasoning_budget_tokens": 3,
    "reasoning_budget_end_tags": ["b"],
}
_RESPONSES = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
        {"role": "user", "content": "b"},
    ],
    "instructions": "i",
    "max_output_tokens": 2,
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
}
_MESSAGES = {
    "system": [{"type": "text", "text": "s"}],
    "max_tokens": 2,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
    "stop_sequences": ["x"],
}
_RIGHT: tuple[tuple[str, Any], ...] = (
    ("/v1/chat/completions", _CHAT),
    ("/apply-template", _CHAT),
    ("/v1/chat/completions/input_tokens", _CHAT),
    ("/completion", _COMPLETION),
    ("/v1/completions", _COMPLETION),
    ("/v1/responses", _RESPONSES),
    ("/v1/messages", _MESSAGES),
    ("/v1/messages/count_tokens", _MESSAGES),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "float"}),
    ("/tokenize", {"content": ["abc", 5], "add_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/lora-adapters", [{"id": 0, "scale": 1.0}]),
    ("/slots/0?action=save", {"filename": "fault"}),
    ("/slots/0?action=restore", {"filename": "fault"}),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, 2**64, 1e308, -1e308, 0.5),
    *("", "a", "a" * 2000, "\0", "\U0001f600", "[", "{}", "^(a", "auto"),
    *([], {}, [[]], [None], [1], ["a"], [{}], {"a": 1}, {"type": "text"}, [[1, 2]], {"$ref": "#/x"}),
)


def nearly_right(rng: random.Random) -> tuple[str, bytes]:
    """Path and body of a request in which one value, or two, are of a wrong kind, are missing, or are new."""
    path, right = rng.choice(_RIGHT)
    body = copy.deepcopy(right)
    for _ in range(rng.choice((1, 1, 2))):
        holders = list(_holders(body))
        if not holders:
            break
        holder, key = rng.choice(holders)
        if rng.random() < 0.15:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    if isinstance(body, dict):
        body["stream"] = False
    data = json.dumps(body).encode()
    return path, data[: rng.randrange(len(data))] if rng.random() < 0.05 else data


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a JSON value, as a container and a key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _holders(value[key])
