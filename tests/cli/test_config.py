"""Defaults from a file and from the environment, the alias `run`, completion, and `list`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.adapters import write_adapter
from tests.support.program import environment, fails, run, succeeds
from tests.support.scripted import thinker
from tests.support.tiny import PREFILL, ScheduleKeys, TinyShape, tiny_weights


@pytest.fixture
def model(tmp_path) -> Path:
    return thinker(tmp_path / "thinker.gguf")


def write(home: Path, text: str) -> dict[str, str]:
    (home / "swaa-local").mkdir(exist_ok=True)
    (home / "swaa-local" / "config.toml").write_text(text)
    return {"XDG_CONFIG_HOME": str(home)}


def test_the_command_line_wins_over_variables_and_these_over_the_file(model, tmp_path):
    """-n 6 cuts "Yes!" to "Ye", 7 to "Yes"."""
    env = write(tmp_path, f'threads = 1\nctx-size = 1024\n[chat]\nmax-tokens = 6\nmodel = "{model}"\n')
    for command in ("chat", "run"):
        assert succeeds(command, "-p", "Is it?", **env) == "Ye\n"
        assert succeeds(command, "-p", "Is it?", SWAA_LOCAL_CHAT_MAX_TOKENS="7", **env) == "Yes\n"
        assert succeeds(command, "-p", "Is it?", "-n", "8", SWAA_LOCAL_CHAT_MAX_TOKENS="7", **env) == "Yes!\n"


def test_switches_lists_and_the_negative_of_a_switch(model, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    env = write(tmp_path, f'[chat]\nno-think = true\nno-cache = true\nfile = ["{tmp_path / "a.txt"}"]\nthreads = 1\n')
    done = run("chat", model, "-c", "1024", "-p", "Is it?", **env)
    assert "generated 5 tokens" in done.stderr
    plain = run("chat", model, "-c", "1024", "-p", "Is it?", "-t", "1")
    assert "generated 9 tokens" in plain.stderr
    assert len(plain.stderr.split("prompt ")[1].split(" ")[0]) < len(done.stderr.split("prompt ")[1].split(" ")[0])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[chat]\ntemprature = 1", "chat has no option 'temprature'"),
        ("[chta]\ntemp = 1", "there is no command 'chta'; did you mean 'chat'?"),
        ("nonsense = 1", "no command has the option 'nonsense'"),
        ("[chat]\nno-cache = 1", "no-cache is true or false, not 1"),
        ("[chat]\ntemp = true", "temp takes a value, not true"),
        ("[chat]\ntemp = [1]", "temp takes one value, not a list"),
        ("[chat", "config.toml: "),
        ("[chat]\nfile = [['a']]", "file takes texts or numbers, not ['a']"),
        ("[convert]\noutput = [5]", "output takes one value, not a list"),
        ("[chat.system]\na = 1", "system takes texts or numbers, not {'a': 1}"),
    ],
)
def test_a_file_that_says_nonsense_is_one_line(tmp_path, text, error):
    assert error in fails("chat", "x.gguf", "-p", "x", **write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[chat]\nthreads = inf", "'inf' is not a number of threads"),
        ("[chat]\nctx-size = 4096.5", "'4096.5' is not a number of tokens"),
        ("[chat]\ncache-size = -5", "'-5' is not a size"),
    ],
)
def test_what_the_command_line_refuses_the_file_may_not_say_either(tmp_path, text, error):
    said = fails("chat", "x.gguf", "-p", "x", code=2, **write(tmp_path, text))
    assert error in said
    assert said.endswith(f"(it is in {tmp_path / 'swaa-local' / 'config.toml'})")


def test_a_variable_that_is_refused_is_named():
    said = fails("chat", "x.gguf", "-p", "x", code=2, SWAA_LOCAL_CHAT_CTX_SIZE="many")
    assert said.endswith("'many' is not a number of tokens (it is in the variable SWAA_LOCAL_CHAT_CTX_SIZE)")
    assert "it is in" not in fails("chat", "x.gguf", "-p", "x", "-c", "many", code=2)


def test_arguments_may_be_lists(model, tmp_path):
    (tmp_path / "other").mkdir()
    other = thinker(tmp_path / "other" / "thinker.gguf")
    env = write(tmp_path, f'[list]\nplaces = ["{model}", "{other.parent}"]\n')
    assert len(json.loads(succeeds("list", "--json", **env))) == 2
    env = write(tmp_path, f'[list]\nplaces = "{model}"\n')
    assert len(json.loads(succeeds("list", "--json", **env))) == 1


def test_a_value_that_no_option_takes_is_wrong_usage(tmp_path):
    assert "temp" in fails("chat", "x.gguf", "-p", "x", code=2, **write(tmp_path, '[chat]\ntemp = "hot"\n'))


def test_shells_complete_commands_and_options():
    program = Path(sys.executable).with_name("swaa-local")
    if not program.exists():
        pytest.skip("the program is not installed here")
    env = environment(_SWAA_LOCAL_COMPLETE="bash_complete", COMP_WORDS="swaa-local ch", COMP_CWORD="1")
    done = subprocess.run([program], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "plain,chat\n"


def test_the_models_of_a_directory_are_listed(tiny_model_factory, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    plain, windowed = tmp_path / "a.gguf", tmp_path / "deep" / "er" / "b.gguf"
    plain.write_bytes(tiny_model_factory().read_bytes())
    schedule = ScheduleKeys(24, 4, [PREFILL] * 4)
    windowed.write_bytes(tiny_model_factory(schedule=schedule).read_bytes())
    calibrated = tiny_model_factory(schedule=schedule, extra={"swaa.calibration": "{}"})
    (tmp_path / "c.gguf").write_bytes(calibrated.read_bytes())
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "mmproj-x.gguf").write_bytes(b"")
    lines = succeeds("list", tmp_path).splitlines()
    names = [str(plain), str(tmp_path / "broken.gguf"), str(tmp_path / "c.gguf"), str(windowed)]
    assert [line.split()[0] for line in lines] == ["model", *names]
    assert lines[1].endswith("  none")
    assert "cannot be read" in lines[2]
    assert lines[3].endswith("w24 k4 fadec (calibrated)")
    assert lines[4].endswith("w24 k4 fadec")
    found = {Path(row["path"]).name: row for row in json.loads(succeeds("list", tmp_path, "--json"))}
    assert found["b.gguf"]["schedule"]["window"] == 24
    assert (found["c.gguf"]["calibrated"], found["a.gguf"]["calibrated"]) == (True, False)
    assert found["broken.gguf"]["problem"]
    assert "no such directory" in fails("list", tmp_path / "nowhere")


def test_an_adapter_is_listed_as_one(tmp_path):
    schedule = ScheduleKeys(24, 4, [PREFILL] * 4)
    write_adapter(tmp_path / "other.gguf", tiny_weights(TinyShape()))
    texts = {"swaa_tune.base": "base"}
    write_adapter(tmp_path / "tuned.gguf", tiny_weights(TinyShape()), schedule=schedule, texts=texts)
    other, tuned = succeeds("list", tmp_path).splitlines()[1:]
    assert other.endswith("LoRA adapter  for --lora")
    assert tuned.endswith("LoRA adapter  for --lora, tuned for w24 k4 fadec")
    assert [row["adapter"] for row in json.loads(succeeds("list", tmp_path, "--json"))] == [True, True]


def test_the_hub_cache_is_listed_by_names_that_chat_takes(tiny_model, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--name-GGUF" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "name-Q4_K_M.gguf").write_bytes(tiny_model.read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (tmp_path / "empty").mkdir()
    out = succeeds("list", cwd=tmp_path / "empty", HF_HOME=str(tmp_path))
    assert "org/name-GGUF:name-Q4_K_M.gguf" in out
    name = "org/name-GGUF:Q4_K_M"
    options = ["-p", "x", "-n", "1", "-t", "1", "-c", "256"]
    assert run("chat", name, *options, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").returncode == 0


def test_a_variable_is_called_as_its_option_and_has_one_value_a_line(model, tmp_path):
    (tmp_path / "a text.txt").write_text("x" * 100)
    env = {"SWAA_LOCAL_CHAT_THREADS": "1", "SWAA_LOCAL_CHAT_CTX_SIZE": "1024"}
    env |= {"SWAA_LOCAL_CHAT_FILE": str(tmp_path / "a text.txt"), "SWAA_LOCAL_CHAT_PROMPT": "Is it?\nAnd is that?"}
    answers = [json.loads(line) for line in succeeds("chat", model, "--json", **env).splitlines() if line]
    assert [answer["question"] for answer in answers] == ["Is it?", "And is that?"]
    assert answers[0]["tokens"]["prompt"] > 100
    assert "'many' is not a number of threads" in fails("chat", model, code=2, SWAA_LOCAL_CHAT_THREADS="many")


def test_a_list_of_nothing_says_where_it_looked(tmp_path):
    done = run("list", tmp_path)
    assert done.returncode == 0
    assert f"no models in {tmp_path}" in done.stderr
