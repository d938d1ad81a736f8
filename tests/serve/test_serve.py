"""`swaa-local serve` from outside: the command, its signals and errors, and the API through the `openai` package."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest

from swaa_local.engine import native
from swaa_local.needle.documents import PROMPT, make_document
from swaa_local.schedule.config import LayerMode, Schedule
from swaa_local.serve.run import default_arguments
from tests.support import tiny
from tests.support.fake_hub import FakeHub
from tests.support.libraries import linked
from tests.support.program import environment, fails, run
from tests.support.serving import Running, descendants, is_running, serving, together, wait_until

pytestmark = pytest.mark.usefixtures("engine")

linux = pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux only")

KEY = "sk-of-the-tests"
N_CTX = 32768
N_CLIENTS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The bundled model, for 16 clients at once, behind a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# of the tests\n{KEY}\n")
    with serving(None, "-np", N_CLIENTS, "-kvu", "-c", N_CTX, "--api-key-file", keys, "--slots") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=120)


class Question:
    """A question about a text, and its only right answer."""

    def __init__(self, seed: int, n_chars: int) -> None:
        document = make_document(random.Random(seed), "statements", n_chars, len, n_facts=4)
        placed = document.nearest(0.2)
        self.answer = placed.fact.value
        self.text, self.question = document.text, placed.fact.question
        self.prompt = PROMPT.format(text=self.text, question=self.question)
        self.another = next(other.fact for other in document.facts if other is not placed)

    @property
    def messages(self) -> Any:
        return [{"role": "user", "content": self.prompt}]


LONG = Question(1, 10_000)


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="needle", messages=messages, temperature=0, **options)


# the API


def test_a_thinking_model_answers_about_a_long_text(client: openai.OpenAI) -> None:
    """Eight windows long: without phases and schedule at work the answer would be a guess."""
    response = ask(client, LONG.messages)
    assert response.usage.prompt_tokens > 8 * 256
    message = response.choices[0].message
    assert message.content == LONG.answer
    assert LONG.answer in message.reasoning_content
    assert response.choices[0].finish_reason == "stop"


def test_the_answer_streams(client: openai.OpenAI) -> None:
    chunks = list(ask(client, LONG.messages, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert len(deltas) > 20
    assert LONG.answer in thoughts
    assert "".join(delta.content or "" for delta in deltas) == LONG.answer
    assert chunks[-1].usage.completion_tokens > 20


def test_thinking_can_be_left_out(client: openai.OpenAI) -> None:
    response = ask(client, LONG.messages, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert getattr(response.choices[0].message, "reasoning_content", None) is None
    assert response.usage.completion_tokens < 10


def test_completions(client: openai.OpenAI) -> None:
    prompt = "<|im_start|>user\n" + LONG.prompt + "<|im_end|>\n<|im_start|>assistant\n"
    options: dict[str, Any] = {"model": "needle", "prompt": prompt, "temperature": 0, "max_tokens": 80}
    whole = client.completions.create(**options).choices[0].text
    assert whole.startswith("<think>")
    assert whole.endswith(LONG.answer)
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == whole


def test_a_follow_up_question_prefills_the_new_tokens_only(client: openai.OpenAI) -> None:
    first = ask(client, LONG.messages)
    messages = [*LONG.messages, {"role": "assistant", "content": first.choices[0].message.content}]
    second = ask(client, [*messages, {"role": "user", "content": LONG.another.question}])
    assert second.choices[0].message.content == LONG.another.value
    assert second.timings["prompt_n"] < 60
    assert second.timings["cache_n"] > 8 * 256


TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\nFunctions:' }}"
    "{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    """{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}"""
    "{{- (call.function.arguments | tojson) + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture
def model_that_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A tiny model whose template has tool calls and which ends one that it began, and the token that begins one."""
    names = {"<think>": "<tool_call>", "</think>": "</tool_call>"}
    monkeypatch.setattr(tiny, "VOCAB", [names.get(token, token) for token in tiny.VOCAB])
    monkeypatch.setattr(tiny, "_USER_DEFINED", list(names.values()))
    start, end, last, newline = map(tiny.VOCAB.index, ("<tool_call>", "</tool_call>", ">", "<0x0A>"))
    weights = tiny.tiny_weights(tiny.TinyShape())
    embedding, output = weights["token_embd.weight"], weights["output.weight"]
    output[newline] = embedding[start]
    output[tiny.EOT_ID] = embedding[end] + embedding[last]
    path = tiny.write_tiny_gguf(
        tmp_path / "tools.gguf",
        weights=weights,
        chat_template=TOOLS,
        schedule=tiny.ScheduleKeys(64, 4, (tiny.PREFILL, tiny.FULL, tiny.PREFILL, tiny.PREFILL)),
    )
    return path, start


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call(model_that_calls: tuple[Path, int], stream: bool) -> None:
    """The server's grammar makes a call of what a random model says, whatever it says."""
    path, start = model_that_calls
    unit = {"type": "string", "enum": ["celsius", "kelvin"]}
    parameters = {"type": "object", "properties": {"unit": unit}, "required": ["unit"]}
    function = {"name": "get_temperature", "description": "Tell the temperature.", "parameters": parameters}
    with serving(path, "-c", "4096", "-np", "1") as running:
        answer = ask(
            openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0),
            [{"role": "user", "content": "How warm is it?"}],
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
            max_tokens=300,
            logit_bias={str(start): 30},
            stream=stream,
        )
        if stream:
            choices = [choice for chunk in answer for choice in chunk.choices]
            calls = [call.function for choice in choices for call in choice.delta.tool_calls or []]
            name, arguments = calls[0].name, "".join(call.arguments or "" for call in calls)
            reason = choices[-1].finish_reason
        else:
            [call] = answer.choices[0].message.tool_calls
            name, arguments = call.function.name, call.function.arguments
            reason = answer.choices[0].finish_reason
    assert reason == "tool_calls"
    assert name == "get_temperature"
    assert json.loads(arguments)["unit"] in unit["enum"]


def test_sixteen_clients_at_once(client: openai.OpenAI) -> None:
    """One of them sends a long document. Each gets what it gets alone, which is right."""
    questions = [*(Question(seed, 1_500) for seed in range(2, N_CLIENTS + 1)), Question(99, 20_000)]
    answers = together([partial(ask, client, question.messages) for question in questions])
    for question, answer in zip(questions, [answer.choices[0].message for answer in answers], strict=True):
        alone = ask(client, question.messages).choices[0].message
        assert answer.content == question.answer
        assert (answer.reasoning_content, answer.content) == (alone.reasoning_content, alone.content)


def test_a_client_that_leaves_frees_its_slot(server: Running, client: openai.OpenAI) -> None:
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    options: Any = {"logit_bias": {"2": -100, "3": -100}, "ignore_eos": True}
    stream = client.completions.create(
        model="needle", prompt=prompt, max_tokens=20_000, stream=True, temperature=0, extra_body=options
    )
    next(iter(stream))
    assert any(slot["is_processing"] for slot in server.get("/slots", key=KEY)[1])
    stream.close()
    wait_until(lambda: not any(slot["is_processing"] for slot in server.get("/slots", key=KEY)[1]), "its slot is free")
    assert ask(client, LONG.messages).choices[0].message.content == LONG.answer


def test_a_prompt_beyond_the_context_is_told_both_counts(server: Running, client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, [{"role": "user", "content": "1 " * (N_CTX + 100)}], stream=stream)
        body: Any = error.value.body
        assert body["n_ctx"] <= N_CTX < body["n_prompt_tokens"]
        assert str(body["n_ctx"]) in body["message"]
        assert str(body["n_prompt_tokens"]) in body["message"]


def test_malformed_requests_are_the_client_s_fault(server: Running) -> None:
    bad: list[Any] = [b'{"messages": [', b"[]", b"", {"messages": "hello"}, {"messages": [{"content": "no role"}]}]
    for body in bad:
        status, answer = server.post("/v1/chat/completions", body, key=KEY)
        assert 400 <= status < 500, (body, status, answer)
        assert answer["error"]["message"]


@linux
def test_a_wrong_key_is_refused_and_none_is_shown(server: Running) -> None:
    for wrong in ("sk-wrong", KEY[:-1], ""):
        stranger = openai.OpenAI(base_url=server.url + "/v1", api_key=wrong or "none", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            ask(stranger, LONG.messages)
    assert server.get("/health") == (200, {"status": "ok"})
    assert KEY not in server.log
    for pid in [server.process.pid, *descendants(server.process.pid)]:
        assert not any(KEY in argument for argument in psutil.Process(pid).cmdline())


def test_clients_see_a_name_and_no_path(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["needle"]
    assert ask(client, LONG.messages, max_tokens=1).model == "needle"


# the command


def test_it_says_what_it_serves(server: Running) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert "this is the bundled model" in server.log
    assert "layer 3 full, others window 256" in server.log
    assert f"{server.url}/v1" in server.log
    assert "needs an API key" in server.log
    assert f"{N_CLIENTS} requests at once of up to 8,192 tokens" in server.log


KEEPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_nobody_can_act_on_is_left_out_and_warnings_are_not(tmp_path: Path) -> None:
    """A token that looks like one of control and has another type, and a template that takes thoughts of earlier
    answers: both are as they should be. A context beyond the training is something to know of."""
    tokens = ["<|eot_id|>" if token == "~" else token for token in tiny.VOCAB]
    extra = {"tokenizer.ggml.tokens": tokens}
    model = tiny.write_tiny_gguf(tmp_path / "m.gguf", n_ctx_train=512, chat_template=KEEPS_THOUGHTS, extra=extra)
    arguments = ["-c", "1024", "-np", "1"]
    notices = ("was not control-type", "supports preserving reasoning")
    with serving(model, *arguments, "-v") as running:
        wait_until(lambda: all(notice in running.log for notice in notices), "llama-server's own notices")
    for env in ({}, {"LLAMA_LOG_COLORS": "on"}):
        with serving(model, *arguments, **env) as running:
            assert running.get("/health")[0] == 200
            said = running.log
        assert not any(notice in said for notice in notices), said
        assert "possible training context overflow" in said


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_what_showed_that_it_loads_is_gone_once_it_has(tiny_model: Path) -> None:
    """What a terminal shows in the end: the lines that it says, and no count of steps whose number nobody knows."""
    import pexpect

    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "swaa_local", "serve", str(tiny_model), "--port", "0", "-c", "512", "-np", "1", "-t", "1"],
        env=environment(TERM="xterm"),
        dimensions=(50, 200),
        encoding="utf-8",
        timeout=120,
    )
    written = io.StringIO()
    terminal.logfile_read = written
    terminal.expect("\r\nhttp://127.0.0.1:\\d+\r\n")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert "0/?" not in written.getvalue()
    # a line that is drawn again is erased before, and this one is not drawn again
    assert "loading" in written.getvalue()
    assert "loading" not in written.getvalue().rsplit("\x1b[2K", 1)[1]


def test_it_listens_on_a_unix_socket(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, "-c", "512", "-np", "1", "--host", tmp_path / "s.sock") as running:
        assert running.url == f"unix:{tmp_path / 's.sock'}"
        assert "no API key" not in running.log


def test_who_listens_to_everybody_is_told(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512", "-np", "1", "--host", "0.0.0.0") as running:
        assert running.url.startswith("http://127.0.0.1:")
        assert "no API key is set, so whoever reaches 0.0.0.0:" in running.log


def test_a_model_from_the_hub_has_its_id_for_a_name(tiny_model: Path, tmp_path: Path) -> None:
    with FakeHub({"org/tiny": {"tiny-F32.gguf": tiny_model.read_bytes()}}).serve() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        with serving("org/tiny", "-c", "512", "-np", "1", **env) as running:
            assert running.get("/v1/models")[1]["data"][0]["id"] == "org/tiny"


def test_options_override_the_schedule(tiny_model: Path) -> None:
    for options, said in (
        (
            ["--window", "64", "--sinks", "4", "--full-layers", "0", "--fa-decode"],
            "layer 0 full, others window 64 while reading, 4 sinks",
        ),
        (["--window", "64", "--fa-decode", "--tail", "9"], "all layers window 64 while reading, tail 9"),
        (["--no-swaa"], "none: full attention"),
    ):
        with serving(tiny_model, *options, "-c", "512", "-np", "1", "--alias", "mine") as running:
            assert said in running.log
            assert "1 request at once of up to 512 tokens" in running.log
            assert running.get("/v1/models")[1]["data"][0]["id"] == "mine"
            props = running.get("/props")[1]
            assert props["default_generation_settings"]["n_ctx"] == 512
            tail = int(options[-1]) if "--tail" in options else 0
            assert (props["swaa"] or {"tail": 0})["tail"] == tail


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stream", [False, True])
def test_a_signal_ends_it_in_the_middle_of_a_request(tiny_model: Path, number: int, stream: bool) -> None:
    with serving(tiny_model, "-c", "32768", "-np", "1") as running:
        children = descendants(running.process.pid)
        assert children
        outcome: list[Any] = []
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60)

        def request() -> None:
            try:
                got = client.completions.create(model="tiny", prompt="a", max_tokens=30_000, stream=stream)
                outcome.append([*got] if stream else got)
            except Exception as error:  # a stream that breaks is the HTTP client's own error
                outcome.append(error)

        thread = threading.Thread(target=request)
        thread.start()
        wait_until(lambda: running.get("/slots")[1][0]["is_processing"], "it generates")
        assert running.stop(number) == 0
        thread.join(timeout=30)
        [error] = outcome
        assert isinstance(error, Exception), error
        if not stream:
            assert "the server is shutting down" in str(error)
        assert not any(is_running(pid) for pid in children)


@linux
def test_it_ends_as_its_server_ends(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512") as running:
        [server] = descendants(running.process.pid)
        os.kill(server, signal.SIGKILL)
        assert running.process.wait(timeout=30) == 128 + signal.SIGKILL


@linux
def test_a_second_signal_kills_a_server_that_does_not_end(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512") as running:
        [server] = descendants(running.process.pid)
        os.kill(server, signal.SIGSTOP)
        running.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(timeout=0.5)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(timeout=30) == 128 + signal.SIGKILL


@linux
def test_signals_that_come_together_are_one(tiny_model: Path) -> None:
    """As from `timeout`, which signals the process and its group."""
    with serving(tiny_model, "-c", "512") as running:
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            running.process.send_signal(number)
        assert running.process.wait(timeout=30) == 0


@linux
def test_a_signal_to_all_its_processes_is_one(tiny_model: Path) -> None:
    """As from a service manager: the server gets its own and the one that the command passes on."""
    with serving(tiny_model, "-c", "32768", "-np", "1") as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60)
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=30_000, stream=True)
        next(iter(stream))
        [server] = descendants(running.process.pid)
        os.kill(server, signal.SIGTERM)
        assert running.stop(signal.SIGTERM) == 0


@linux
def test_no_server_is_left_behind(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "512") as running:
        [server] = descendants(running.process.pid)
        running.process.kill()
        wait_until(lambda: not is_running(server), "the server ends with the command")


def test_a_port_in_use_is_told(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = fails("serve", tiny_model, "--port", port)
        assert f"127.0.0.1:{port} is taken by another program" in error
        assert "--port" in error


def test_an_address_of_another_machine_is_told(tiny_model: Path) -> None:
    assert "cannot listen on 192.0.2.1:0" in fails("serve", tiny_model, "--host", "192.0.2.1", "--port", "0")


def test_keys_come_from_a_file_or_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    error = fails("serve", tiny_model, "--api-key", "sk-secret")
    assert "--api-key-file" in error
    assert "sk-secret" not in error
    error = fails("serve", tiny_model, "--api_key=sk-secret")
    assert "--api-key-file" in error
    assert "sk-secret" not in error
    (tmp_path / "keys").write_text("# nothing\n\n")
    assert "holds no API key" in fails("serve", tiny_model, "--api-key-file", tmp_path / "keys")
    assert "cannot be read" in fails("serve", tiny_model, "--api-key-file", tmp_path / "none")
    assert "LLAMA_API_KEY is set and empty" in fails("serve", tiny_model, LLAMA_API_KEY="")
    with serving(tiny_model, "-c", "512", "-v", "-lv", "4", LLAMA_API_KEY="sk-secret") as running:
        assert running.post("/tokenize", {"content": "a"})[0] == 401
        assert running.post("/tokenize", {"content": "a"}, key="sk-secret")[0] == 200
        assert "cret" not in running.log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bogus"], "invalid argument: --bogus"),
        (["-c", "many"], 'error while handling argument "-c"'),
        (["-c", "512", "other.gguf"], "invalid argument: other.gguf"),
        (["--window", "8", "--full-layers", "9"], "goes past the model's 4 layers"),
    ],
)
def test_wrong_options_are_told(tiny_model: Path, options: list[str], said: str) -> None:
    assert said in fails("serve", tiny_model, "--port", "0", *options)


def test_the_environment_may_name_the_model(tmp_path: Path) -> None:
    assert "none.gguf: no such file" in fails("serve", "--port", "0", LLAMA_ARG_MODEL=str(tmp_path / "none.gguf"))


def test_options_that_name_another_model_are_refused(tiny_model: Path) -> None:
    assert "-hf names another model" in fails("serve", "-hf", "org/name", "--port", "0")
    error = fails("serve", tiny_model, "--port", "0", LLAMA_ARG_MODEL_URL="http://127.0.0.1:9/m.gguf")
    assert "LLAMA_ARG_MODEL_URL names another model" in error


def test_a_file_that_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "m.gguf" in fails("serve", tmp_path / "m.gguf", "--port", "0")
    assert "no such file" in fails("serve", tmp_path / "none.gguf")


def test_an_engine_without_a_server_is_told(tiny_model: Path, tmp_path: Path) -> None:
    import llama_cpp.llama_cpp as engine

    libraries = linked(Path(engine._lib._name).parent, tmp_path, lambda name: name != "llama-server")
    error = fails("serve", tiny_model, LLAMA_CPP_LIB_PATH=str(libraries))
    assert "has no llama-server" in error
    assert "pip install ./patches" in error


def test_on_windows_the_server_has_a_windows_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native._c, "_lib", SimpleNamespace(_name=str(tmp_path / "llama.dll")))
    (tmp_path / "llama-server.exe").touch()
    with monkeypatch.context() as on_windows:
        on_windows.setattr(native, "os", SimpleNamespace(name="nt"))
        found = native.engine_program("llama-server", "LLAMA_BUILD_SERVER")
    assert found == tmp_path / "llama-server.exe"


def test_help_tells_both_programs_options() -> None:
    ours, theirs = run("serve", "--help"), run("serve", "--server-help")
    assert ours.returncode == theirs.returncode == 0
    assert "--api-key-file" in ours.stdout
    assert "--window" in ours.stdout
    assert "--slot-save-path" in theirs.stdout


WINDOWED = Schedule(64, 4, (LayerMode.PREFILL,) * 2)
RINGS = Schedule(64, 4, (LayerMode.ALWAYS,) * 2)


@pytest.mark.parametrize(
    ("schedule", "extra", "env", "gpu", "chosen"),
    [
        (WINDOWED, [], {}, False, ["--ubatch-size", "512"]),
        (None, [], {}, False, ["--ubatch-size", "512"]),
        (WINDOWED, [], {}, True, ["--ubatch-size", "1024"]),
        (None, [], {}, True, ["--ubatch-size", "512"]),
        (RINGS, ["-ngl", "0"], {}, True, ["--ubatch-size", "512"]),
        (WINDOWED, ["--ubatch_size", "64"], {}, False, []),
        (WINDOWED, [], {"LLAMA_ARG_UBATCH": "64"}, False, []),
    ],
)
def test_it_chooses_as_chat_does(
    schedule: Schedule | None, extra: list[str], env: dict[str, str], gpu: bool, chosen: list[str]
) -> None:
    assert default_arguments(schedule, extra, env, gpu=gpu) == chosen
