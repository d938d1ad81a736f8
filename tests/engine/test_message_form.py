"""What a model reads of a chat, in whatever form its template takes contents and tools: its context is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from swaa_local import Llama, SWAAError
from swaa_local.engine.message_form import Form, FormedFormatter
from swaa_local.errors import TemplateError
from tests.support.program import succeeds
from tests.support.scripted import scripted_model

BEGIN, END, ANSWER = "<|im_start|>", "<|im_end|>\n", "<|im_start|>assistant\n"
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
TEXTS = HEAD + "{{ m.content }}" + TAIL
PARTS = HEAD + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}\n{% endif %}{% endfor %}" + TAIL
EITHER = (
    HEAD + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %}" + TAIL
)
PARTS_OF_THE_USER = HEAD + "{{ m.content[0].text if m.role == 'user' else m.content | upper }}" + TAIL


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def read_by_model(path: Path, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """What is in the model's context after a completion: the prompt, as the template made it."""
    llm = Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, **kwargs)
    try:
        llm.create_chat_completion(messages, max_tokens=1)
        return llm.detokenize(llm.input_ids[: llm.n_tokens].tolist(), special=True).decode()
    finally:
        llm.close()


def prompt(*said: tuple[str, str]) -> str:
    return "".join(f"{BEGIN}{role}\n{content}{END}" for role, content in said) + ANSWER


@pytest.mark.parametrize(
    ("template", "content", "read"),
    [
        (TEXTS, "Is it?", "Is it?"),
        (TEXTS, [text("Is it?")], "Is it?"),
        (TEXTS, [text("Is it?"), text("Or not?")], "Is it?\nOr not?"),
        (PARTS, "Is it?", "Is it?\n"),
        (PARTS, [text("Is it?"), text("Or not?")], "Is it?\nOr not?\n"),
        (EITHER, "Is it?", "Is it?"),
        (EITHER, [text("Is it?"), IMAGE], "Is it?<image>"),
        (PARTS_OF_THE_USER, "Is it?", "Is it?"),
    ],
)
def test_the_model_reads_what_is_said_whatever_form_the_template_takes(tmp_path, template, content, read):
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=template)
    assert read_by_model(path, [{"role": "user", "content": content}]) == prompt(("user", read))


def test_each_role_has_its_own_form(tmp_path):
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=PARTS_OF_THE_USER)
    said = [("system", "BE BRIEF."), ("user", "Is it?"), ("assistant", "YES!"), ("user", "And that?")]
    assert read_by_model(path, [{"role": role, "content": content} for role, content in said]) == prompt(*said)


def test_an_answer_that_only_calls_a_tool_has_no_content(tmp_path):
    template = TEXTS.replace("m.content", "m.content or '-'")
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=template)
    said = [{"role": "user", "content": "1"}, {"role": "assistant", "content": None}, {"role": "user", "content": "2"}]
    assert read_by_model(path, said) == prompt(("user", "1"), ("assistant", "-"), ("user", "2"))


@pytest.mark.parametrize("template", [TEXTS, None])
def test_what_a_template_of_texts_cannot_show_is_an_error(tmp_path, template):
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=template)
    with pytest.raises(TemplateError, match=r"the user message has a part of type 'image_url'.*text alone"):
        read_by_model(path, [{"role": "user", "content": [text("What is this?"), IMAGE]}])


@pytest.mark.parametrize("error", [SWAAError, ValueError])
def test_a_question_that_the_template_leaves_out_is_an_error(tmp_path, error):
    path = scripted_model(tmp_path / "m.gguf", [], chat_template="{% for m in messages %}hi{% endfor %}")
    with pytest.raises(error, match="leaves out what the user says"):
        read_by_model(path, [{"role": "user", "content": "Is it?"}])


@pytest.mark.parametrize("blank", [None, " \n"])
@pytest.mark.parametrize("content", ["Is it?", [text("Is it?")]])
def test_without_a_template_or_with_a_blank_one_upstreams_format_has_the_content(tmp_path, blank, content):
    extra = {} if blank is None else {"tokenizer.chat_template": GGUFValue(blank, GGUFValueType.STRING)}
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=None, extra=extra)
    assert "[INST]Is it?" in read_by_model(path, [{"role": "user", "content": content}]).replace("[INST] ", "[INST]")


def test_a_template_of_another_name_is_formed_too(tmp_path):
    extra = {"tokenizer.chat_template.vision": GGUFValue(PARTS, GGUFValueType.STRING)}
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=TEXTS, extra=extra)
    read = read_by_model(path, [{"role": "user", "content": "Is it?"}], chat_format="chat_template.vision")
    assert read == prompt(("user", "Is it?\n"))


NO_TOOLS = {
    "goes through them": ("{% for t in tools %}{{ t }}{% endfor %}", ""),
    "counts them": ("{{ tools | length }}", "0"),
    "adds the functions' JSON": ("{{ 'Functions: ' + functions }}", "Functions: []"),
    "asks for None": ("{% if tools is not none %}{{ tools[0].name }}{% endif %}", ""),
    "asks whether there are any": ("{% if tools %}{{ tools[0].name }}{% endif %}", ""),
}


@pytest.mark.parametrize(("head", "written"), NO_TOOLS.values(), ids=NO_TOOLS)
def test_a_template_with_tools_takes_a_chat_without_any(tmp_path, head, written):
    path = scripted_model(tmp_path / "m.gguf", [], chat_template=head + TEXTS)
    said = prompt(("user", "Is it?"))
    assert read_by_model(path, [{"role": "user", "content": "Is it?"}]) == written + said
    succeeds("chat", path, "-t", "1", "-c", "256", "-p", "Is it?")


def test_tools_that_are_given_are_passed_on_as_they_are():
    template = FormedFormatter("{% for t in tools %}{{ t.name }} {% endfor %}{{ messages[0].content }}", "", "")
    said = [{"role": "user", "content": "Is it?"}]
    assert template(messages=said).prompt == "Is it?"
    assert template(messages=said, tools=[{"name": "look"}]).prompt == "look Is it?"


def test_what_cannot_be_found_out_is_left_to_the_template():
    refuses = "{% if messages[0].role == 'system' %}{{ no() }}{% endif %}{{ messages[-1].content }}"
    template = FormedFormatter(refuses, "", "")
    assert template.forms == {"user": Form.TEXT, "system": Form.UNKNOWN, "assistant": Form.NEITHER}
