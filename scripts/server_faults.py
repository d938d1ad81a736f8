"""What breaks servers: requests and connections, each with what a sound server answers.

Knows HTTP, sockets and the endpoints of llama-server; nothing of models, and not how a server is started.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 60.0
CUT_OFF, NO_ANSWER = 0, -1
"""Stand for a status where the server closed the connection without one, and where it said nothing for a minute."""

REFUSED = frozenset({400, 401, 403, 404, 413, 501})
"""What a client's fault is answered with; 501: this server cannot do such things at all."""


@dataclass(frozen=True)
class Target:
    """A server on this machine that listens on a TCP port."""

    host: str
    port: int

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        """A connection; `receive_bytes`: with a receive buffer of about so many, which a long answer soon fills."""
        connection = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        connection.settimeout(TIMEOUT_S)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((self.host, self.port))
        return connection

    def head(self, method: str, path: str, n_bytes: int = 0, **headers: str) -> bytes:
        """Request line and headers, as a program that is no browser sends them."""
        lines = {
            "Host": f"{self.host}:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(n_bytes),
            "Connection": "close",
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode()

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and what follows the headers, read to the end; `CUT_OFF` or `NO_ANSWER` if there is no status."""
        with self.connect() as connection:
            try:
                return _ask(connection, self.head(method, path, len(body), **headers) + body)
            except TimeoutError:
                return NO_ANSWER, b""


def _ask(connection: socket.socket, request: bytes) -> tuple[int, bytes]:
    with contextlib.suppress(ConnectionError):  # refused before it was sent: the answer is there
        connection.sendall(request)
    answer = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(1 << 16):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else CUT_OFF), body


@dataclass(frozen=True)
class Fault:
    """A request that no client should send, and the statuses that it may get."""

    path: str
    body: Callable[[], bytes]
    statuses: frozenset[int] = frozenset({400})
    headers: Mapping[str, str] = field(default_factory=dict)

    def send(self, target: Target) -> int:
        return target.ask("POST", self.path, self.body(), **self.headers)[0]


ENDPOINTS = (
    *("/completion", "/completions", "/v1/completions", "/infill"),
    *("/chat/completions", "/v1/chat/completions", "/v1/chat/completions/control", "/apply-template"),
    *("/responses", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions"),
    *("/v1/chat/completions/input_tokens", "/v1/responses/input_tokens", "/v1/messages/count_tokens"),
    *("/embedding", "/embeddings", "/v1/embeddings", "/rerank", "/v1/rerank"),
    *("/tokenize", "/detokenize", "/lora-adapters", "/props", "/tools", "/v1/streams/lookup"),
    *("/slots/0?action=save", "/slots/0?action=restore", "/slots/0?action=erase"),
)
"""All that take JSON."""


def _json(**body: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(body).encode()


def _chat(**body: Any) -> Callable[[], bytes]:
    return _json(**{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | body)


def _completion(**body: Any) -> Callable[[], bytes]:
    return _json(**{"prompt": "a", "n_predict": 2} | body)


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _nested(n: int, opening: str = "[", closing: str = "]", inner: str = "") -> str:
    return opening * n + inner + closing * n


def _nested_in_all_fields(n: int) -> bytes:
    names = ("prompt", "messages", "input", "content", "tokens", "tools", "documents", "filename", "id", "a")
    return ("{" + ",".join(f'"{name}":{_nested(n)}' for name in names) + "}").encode()


def _chain(n: int) -> dict[str, Any]:
    """A schema whose references lead to one another, n deep."""
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{n}": {"type": "string"}}}


def _doubling(n: int) -> dict[str, Any]:
    """A schema of 2^n ways, if every one is gone."""
    links: dict[str, Any] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": links | {f"d{n}": {"type": "null"}}}


_LOOP = {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}
_SERVED = frozenset({200, 400})

FAULTS: dict[str, Fault] = {
    # nested without end
    **{
        f"JSON nested 100,000 deep to {path}": Fault(path, lambda: _nested_in_all_fields(100_000), REFUSED | {200})
        for path in ENDPOINTS
    },
    "template arguments nested 100,000 deep": Fault(
        "/v1/chat/completions",
        lambda: b'{"messages":[],"chat_template_kwargs":{"a":' + _nested(100_000).encode() + b"}}",
    ),
    "a tool call whose arguments are nested 100,000 deep": Fault(
        "/v1/chat/completions",
        _chat(
            messages=[
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "id": "1", "function": {"name": "f", "arguments": _nested(100_000)}}
                    ],
                },
                {"role": "user", "content": "a"},
            ]
        ),
        _SERVED,
    ),
    "tools nested 10,000 deep": Fault(
        "/v1/chat/completions", lambda: b'{"messages":[],"tools":' + _nested(10_000).encode() + b"}"
    ),
    "a grammar of 50,000 parentheses": Fault(
        "/completion", _completion(grammar="root ::= " + _nested(50_000, "(", ")", '"a"'))
    ),
    "a pattern of 50,000 parentheses": Fault(
        "/completion",
        _completion(json_schema={"type": "string", "pattern": f"^{_nested(50_000, '(', ')', 'a')}$"}),
        _SERVED,
    ),
    "a response format with a pattern of 50,000 parentheses": Fault(
        "/v1/chat/completions",
        _chat(
            response_format={
                "type": "json_schema",
                "json_schema": {"schema": {"type": "string", "pattern": f"^{_nested(50_000, '(', ')', 'a')}$"}},
            }
        ),
        _SERVED,
    ),
    "a tool with a pattern of 50,000 parentheses": Fault(
        "/v1/chat/completions",
        _chat(
            tools=[
                tool(
                    "f",
                    {
                        "type": "object",
                        "properties": {"x": {"type": "string", "pattern": f"^{_nested(50_000, '(', ')', 'a')}$"}},
                    },
                )
            ]
        ),
        _SERVED,
    ),
    "a schema that refers to itself": Fault("/completion", _completion(json_schema=_LOOP)),
    "a tool whose schema refers to itself": Fault(
        "/v1/chat/completions", _chat(tools=[tool("f", {"type": "object", "properties": {"x": _LOOP}})]), _SERVED
    ),
    "references 4,000 deep": Fault("/completion", _completion(json_schema=_chain(4_000))),
    "references that double 60 times": Fault("/completion", _completion(json_schema=_doubling(60)), _SERVED),
    "a tool with references that double 60 times": Fault(
        "/v1/chat/completions", _chat(tools=[tool("f", _doubling(60))]), _SERVED
    ),
    # that grow
    "a grammar that grows without a character": Fault(
        "/completion", _completion(grammar='root ::= e\ne ::= f e "z" | "x"\nf ::= g\ng ::= "y" |')
    ),
    "a grammar of 2^40 ways": Fault(
        "/completion",
        _completion(
            grammar="\n".join([f'a{i} ::= a{i + 1} "x" | a{i + 1} "y"' for i in range(40)] + ['a40 ::= "z"'])
            + "\nroot ::= a0"
        ),
    ),
    "a grammar of 2^40 paths": Fault(
        "/completion",
        _completion(
            grammar="\n".join([f"a{i} ::= a{i + 1} | a{i + 1}" for i in range(40)] + ['a40 ::= "z"']) + "\nroot ::= a0"
        ),
        frozenset({200}),
    ),
    "a chain of 60,000 rules": Fault(
        "/completion",
        _completion(grammar="\n".join(f"a{i} ::= a{i + 1}" for i in range(60_000)) + '\na60000 ::= "x"\nroot ::= a0'),
        _SERVED,
    ),
    "a repetition of 400 million characters": Fault(
        "/completion", _completion(grammar='root ::= "' + "a" * 200_000 + '"{2000}')
    ),
    "a schema of 3,000 optional properties": Fault(
        "/completion",
        _completion(json_schema={"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(3000)}}),
        _SERVED,
    ),
    "a property with a name of 100,000 characters": Fault(
        "/completion", _completion(json_schema={"type": "object", "properties": {"_" * 100_000: {"type": "null"}}})
    ),
    "a tool with a name of 100,000 characters": Fault(
        "/v1/chat/completions", _chat(tools=[tool("_" * 100_000, {"type": "object"})])
    ),
    # too many, too large
    "an object of 200,000 members": Fault(
        "/completion", lambda: b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}"
    ),
    "5,000,000 values": Fault("/completion", lambda: b'{"prompt":[' + b"1," * 5_000_000 + b"1]}"),
    "250,000 messages": Fault(
        "/v1/chat/completions",
        lambda: b'{"messages":[' + b",".join([b'{"role":"user","content":"a"}'] * 250_000) + b"]}",
    ),
    "10,001 messages": Fault("/v1/chat/completions", _chat(messages=[{"role": "user", "content": "a"}] * 10_001)),
    "2,000 tools": Fault("/v1/chat/completions", _chat(tools=[tool(f"f{i}", {}) for i in range(2000)])),
    "20,000 prompts": Fault("/completion", _completion(prompt=["a"] * 20_000)),
    "20,000 inputs": Fault("/v1/embeddings", _json(input=["a"] * 20_000), frozenset({400, 501})),
    "2,000 prompts with a grammar of 1 MB": Fault(
        "/completion", _completion(prompt=["a"] * 2000, grammar='root ::= "' + "a" * 1_000_000 + '"')
    ),
    "300,000 stop strings": Fault("/completion", _completion(stop=[f"z{i}" for i in range(300_000)])),
    "1,000,000 biases": Fault("/completion", _completion(logit_bias=[[5, 1.0]] * 1_000_000)),
    "200,000 samplers": Fault("/completion", _completion(samplers=["top_k"] * 200_000)),
    "200,000 sequence breakers": Fault(
        "/completion", _completion(dry_multiplier=1, dry_sequence_breakers=[f"a{i}" for i in range(200_000)])
    ),
    "a penalty for the last 2^31 tokens": Fault("/completion", _completion(repeat_last_n=2**31 - 1)),
    "DRY for the last 2^31 tokens": Fault("/completion", _completion(dry_multiplier=1, dry_penalty_last_n=2**31 - 1)),
    "2^31 probabilities": Fault("/completion", _completion(n_probs=2**31 - 1)),
    "a word of 100,000 letters": Fault(
        "/tokenize", lambda: json.dumps({"content": "a" * 100_000 + "!" * 100_000 + "1" * 100_000}).encode(), _SERVED
    ),
    "a body of 17 MiB": Fault("/completion", lambda: b'{"prompt":"' + b"a" * (17 << 20) + b'"}', frozenset({413})),
    # that only the server itself may set, or that nobody can
    "a parser": Fault("/completion", _completion(chat_parser='{"parsers":[],"rules":{}}')),
    "a chat format": Fault("/v1/chat/completions", _chat(chat_format=9999)),
    "a trigger of an unknown type": Fault("/completion", _completion(grammar_triggers=[{"type": 99, "value": "a"}])),
    "a trigger that is a regular expression": Fault(
        "/completion",
        _completion(grammar='root ::= "a"', grammar_lazy=True, grammar_triggers=[{"type": 2, "value": "(a*)*b"}]),
    ),
    "an unknown reasoning format": Fault("/v1/chat/completions", _chat(reasoning_format="zzz")),
    "an image": Fault(
        "/v1/chat/completions",
        _chat(
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}]}
            ]
        ),
    ),
    "a sound": Fault(
        "/v1/chat/completions",
        _chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "aaaa"}}]}]),
    ),
    "no messages for Anthropic's API": Fault("/v1/messages", _json(max_tokens=1)),
    "no messages to count": Fault("/v1/messages/count_tokens", _json()),
    "tokens that there are not": Fault("/detokenize", _json(tokens=[2**31 - 1, -5])),
    "pieces of tokens that there are not": Fault("/tokenize", _json(content=[2**31 - 1], with_pieces=True)),
    "a slot that there is not": Fault("/completion", _completion(id_slot=99)),
    "slot 99": Fault("/slots/99?action=erase", _json(), frozenset({404})),
    "slot -1": Fault("/slots/-1?action=erase", _json(), frozenset({404})),
    "slot 0a": Fault("/slots/0a?action=erase", _json(), frozenset({400})),
    # browsers
    "a page of another origin": Fault(
        "/completion", _completion(), frozenset({403}), {"Origin": "https://example.org", "Content-Type": "text/plain"}
    ),
    "a page that has no origin": Fault("/completion", _completion(), frozenset({403}), {"Origin": "null"}),
    "a name that was given our address": Fault("/completion", _completion(), frozenset({403}), {"Host": "example.org"}),
}


def half_head(target: Target) -> socket.socket:
    return _begun(target, target.head("POST", "/completion", 100)[:-40])


def half_body(target: Target) -> socket.socket:
    return _begun(target, target.head("POST", "/completion", 100) + b'{"prompt"')


def silence(target: Target) -> socket.socket:
    return _begun(target, b"")


def chunk_without_end(target: Target) -> socket.socket:
    head = target.head("POST", "/completion", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
    return _begun(target, head + b"ffff\r\n{")


def tls_greeting(target: Target) -> socket.socket:
    return _begun(target, bytes.fromhex("16030100050100000100"))


def stalled_reader(target: Target) -> socket.socket:
    """Asks for more than it reads: the server waits to write."""
    body = json.dumps({"prompt": "a", "n_predict": 500, "ignore_eos": True, "stream": True, "n_probs": 128}).encode()
    connection = target.connect(receive_bytes=4096)
    connection.sendall(target.head("POST", "/completion", len(body)) + body)
    return connection


def _begun(target: Target, data: bytes) -> socket.socket:
    connection = target.connect()
    connection.sendall(data)
    return connection


OPEN: dict[str, Callable[[Target], socket.socket]] = {
    "half a head": half_head,
    "half a body": half_body,
    "a connection without a word": silence,
    "a chunk without an end": chunk_without_end,
    "a TLS greeting": tls_greeting,
    "a reader that stalls": stalled_reader,
}
"""Connections that stay open, and for which nobody else should have to wait."""
