"""`Llama` after `close()`: what needs the engine says that it is closed, and the rest goes on working.

llama.cpp would read freed memory, which aborts the process or, worse, answers. So every public name of llama_cpp's
classes is tried, in a process of its own; a name that upstream adds fails here until it is sorted.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp.llama_tokenizer import LlamaTokenizer

from swaa_local import Llama
from swaa_local.errors import ClosedError, ModelLoadError
from tests.support.adapters import write_adapter
from tests.support.program import environment
from tests.support.tiny import TinyShape, random_tokens, tiny_weights

pytestmark = pytest.mark.usefixtures("engine")

TOKENS = random_tokens(40)

# Public names of llama_cpp.Llama and of ours: an expression that uses each, by what it does after close().
RAISES = {
    "__call__": "llm('hello')",
    "create_chat_completion": "llm.create_chat_completion([{'role': 'user', 'content': 'hello'}])",
    "create_chat_completion_openai_v1": "llm.create_chat_completion_openai_v1([{'role': 'user', 'content': 'hello'}])",
    "create_completion": "llm.create_completion(tokens)",  # begins like the last one
    "create_embedding": "llm.create_embedding('hello')",
    "ctx": "llm.ctx",
    "detokenize": "llm.detokenize(tokens)",
    "embed": "llm.embed('hello')",
    "eval": "llm.eval(tokens)",
    "generate": "next(llm.generate(tokens))",
    "kv_bytes": "llm.kv_bytes",
    "layers_in_words": "llm.layers_in_words",
    "load_state": "llm.load_state(state)",
    "model": "llm.model",
    "n_ctx": "llm.n_ctx()",
    "n_embd": "llm.n_embd()",
    "n_vocab": "llm.n_vocab()",
    "pooling_type": "llm.pooling_type()",
    "read": "llm.read(tokens)",
    "reset": "llm.reset()",
    "sample": "llm.sample()",
    "save_state": "llm.save_state()",
    "set_schedule": "llm.set_schedule(False)",
    "adds_bos": "llm.adds_bos()",
    "description": "llm.description()",
    "is_control": "llm.is_control(1)",
    "is_end": "llm.is_end(1)",
    "is_recurrent": "llm.is_recurrent",
    "n_ctx_train": "llm.n_ctx_train()",
    "special_tokens": "llm.special_tokens()",
    "token_bytes": "llm.token_bytes(1)",
    "restore_prefix": "llm.restore_prefix(tokens, None, 1)",
    "score": "llm.score(tokens, tokens)",
    "serves_whole": "llm.serves_whole",
    "synchronize": "llm.synchronize()",
    "token_text": "llm.token_text(1)",
    "token_bos": "llm.token_bos()",
    "token_eos": "llm.token_eos()",
    "token_nl": "llm.token_nl()",
    "tokenize": "llm.tokenize(b'hello')",
    "tokenizer": "llm.tokenizer()",
    # what was taken before
    "a stream": "next(stream)",
    "a generator": "next(generator)",
    "LlamaTokenizer.decode": "tokenizer.decode(tokens)",
    "LlamaTokenizer.detokenize": "tokenizer.detokenize(tokens)",
    "LlamaTokenizer.encode": "tokenizer.encode('hello')",
    "LlamaTokenizer.tokenize": "tokenizer.tokenize(b'hello')",
}
WORKS = {
    "__getstate__": "llm.__getstate__()",
    "close": "llm.close()",
    "eval_logits": "llm.eval_logits",
    "eval_tokens": "list(llm.eval_tokens) == list(tokens) or 1 / 0",
    "has_all_logits": "llm.has_all_logits is False or 1 / 0",
    "last_run": "llm.last_run.generated_tokens == 1 or 1 / 0",
    "logits_to_logprobs": "llm.logits_to_logprobs(llm.scores)",
    "longest_token_prefix": "llm.longest_token_prefix(tokens, tokens)",
    "model_params": "llm.model_params.n_gpu_layers",
    "prefixes": "llm.prefixes",
    "set_cache": "llm.set_cache(None)",
    "set_seed": "llm.set_seed(7)",
    "swaa": "llm.swaa",
    "__del__": "llm.__del__()",
    # attributes
    "metadata": "llm.metadata['general.architecture'] == 'qwen3' or 1 / 0",
    "scores": "llm.scores.sum()",
}
ELSEWHERE = {"from_pretrained", "LlamaTokenizer.from_ggml_file", "__init__", "__setstate__"}  # make another object

SCRIPT = """
import sys, traceback
from swaa_local import Llama
from swaa_local.errors import ClosedError
llm = Llama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
tokens = [int(token) for token in sys.argv[2].split(",")]
tokenizer = llm.tokenizer()
stream, generator = llm(tokens, max_tokens=9, stream=True), llm.generate(tokens)
next(stream)
llm.reset()
next(generator)
state = llm.save_state()
llm.close()
for expression in sys.argv[3:]:
    print("before", expression, flush=True)
    try:
        eval(expression)
    except ClosedError as error:
        print("closed", error, flush=True)
    except Exception:
        print("other", traceback.format_exc(), flush=True)
    else:
        print("worked", flush=True)
"""


def outcomes(model: Path, expressions: list[str]) -> dict[str, str]:
    """What each expression does in a closed model; the one that ended the process, if one did, is "before"."""
    command = [sys.executable, "-c", SCRIPT, str(model), ",".join(map(str, TOKENS)), *expressions]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    words = [line.split(" ")[0] for line in done.stdout.splitlines() if line.startswith(("closed", "other", "worked"))]
    said = dict(zip(expressions, [*words, "ended the process"], strict=False))
    assert done.returncode == 0, (done.returncode, said, done.stderr)
    assert "other" not in words, done.stdout
    return said


def test_every_public_name_is_sorted() -> None:
    special = {"__call__", "__getstate__", "__setstate__", "__del__", "__init__"}
    names = {name for name in dir(Llama) if not name.startswith("_")} | special
    names |= {f"LlamaTokenizer.{name}" for name in dir(LlamaTokenizer) if not name.startswith("_")}
    assert names - RAISES.keys() - WORKS.keys() - ELSEWHERE == set()


def test_what_needs_the_engine_says_that_it_is_closed(tiny_model: Path) -> None:
    said = outcomes(tiny_model, list(RAISES.values()))
    assert said == dict.fromkeys(RAISES.values(), "closed")


def test_the_rest_goes_on_working(tiny_model: Path) -> None:
    said = outcomes(tiny_model, list(WORKS.values()))
    assert said == dict.fromkeys(WORKS.values(), "worked")


def test_a_tokenizer_outlives_its_llama_without_reading_freed_memory(tiny_model: Path) -> None:
    llm = Llama(str(tiny_model), n_ctx=256)
    tokenizer = llm.tokenizer()
    del llm
    with pytest.raises(ClosedError):
        tokenizer.encode("hello")


def test_a_closed_model_can_be_pickled(tiny_model: Path) -> None:
    llm = Llama(str(tiny_model), n_ctx=512)
    llm.close()
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.n_ctx() == 512
    copy.close()


# Closing from inside


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[Llama]:
    llm = Llama(str(tiny_model), n_ctx=512, n_ubatch=32, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


def close(llm: Llama) -> Callable[..., Any]:
    """A callback of any kind that closes."""

    def callback(*args: Any) -> Any:
        llm.close()
        return args[-1] if len(args) == 2 else False

    return callback


def test_closing_while_a_prompt_is_read_ends_that(llm: Llama) -> None:
    llm.on_prefill = close(llm)
    with pytest.raises(ClosedError):
        llm.eval(random_tokens(200))
    assert llm.n_tokens == 0


@pytest.mark.parametrize("how", ["logits_processor", "stopping_criteria"])
def test_closing_while_a_token_is_chosen_ends_the_answer(llm: Llama, how: str) -> None:
    kinds = {"logits_processor": llama_cpp.LogitsProcessorList, "stopping_criteria": llama_cpp.StoppingCriteriaList}

    def callback(_ids: Any, scores: Any) -> Any:
        llm.close()
        return scores if how == "logits_processor" else False

    with pytest.raises(ClosedError):
        llm(TOKENS, max_tokens=5, **{how: kinds[how]([callback])})


def test_closing_between_two_tokens_ends_the_stream(llm: Llama) -> None:
    stream = llm(TOKENS, max_tokens=9, stream=True)
    next(stream)
    llm.close()
    with pytest.raises(ClosedError):
        next(stream)


def test_a_failed_construction_frees_the_model_at_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swaa_local.engine import upstream

    freed: list[object] = []
    free = upstream._c.llama_model_free

    def watched(model: object) -> None:
        freed.append(model)
        free(model)

    monkeypatch.setattr(upstream._c, "llama_model_free", watched)
    with pytest.raises(ModelLoadError) as caught:  # holds the traceback, and so the half-made object
        Llama(str(tiny_model), n_ctx=256, lora_path="missing.gguf")
    assert caught.traceback
    assert len(freed) == 1


# Adapters


def test_an_adapter_that_does_not_load_is_an_error_of_the_constructor(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"this is no adapter" * 100)
    deeper = write_adapter(tmp_path / "deeper.gguf", tiny_weights(TinyShape(n_layer=6)), layers=range(6))
    for path in (tmp_path / "missing.gguf", garbage, tmp_path, tiny_model, deeper):
        with pytest.raises(ModelLoadError, match=rf"^the LoRA adapter {path} does not load: \S"):
            Llama(str(tiny_model), n_ctx=256, lora_path=str(path))
    assert capfd.readouterr().err == ""


def test_an_adapter_works_under_every_schedule_and_until_the_end(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.gguf", tiny_weights(TinyShape()))

    def greedy(llm: Llama) -> str:
        llm.reset()
        return llm(TOKENS, max_tokens=12, temperature=0)["choices"][0]["text"]

    kwargs: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
    plain, adapted = Llama(str(tiny_model), **kwargs), Llama(str(tiny_model), lora_path=str(adapter), **kwargs)
    assert greedy(adapted) != greedy(plain)
    before = greedy(adapted)
    adapted.set_schedule(False)
    assert greedy(adapted) == before
    copy = pickle.loads(pickle.dumps(adapted))
    assert greedy(copy) == before
    for llm in (plain, adapted, copy):
        llm.close()
    with pytest.raises(ClosedError):
        adapted(TOKENS)
