"""The documentation against the repository: links lead somewhere, and named files, options and patches exist."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.program import run, succeeds

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HOMES = "swaa_local|tests|scripts|patches|docs|\\.ci|\\.github"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that a code host gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def examples(page: Path) -> Iterator[str]:
    """Command lines that call swaa-local in the page's examples, without the shell around them."""
    for _, block in FENCE.findall(page.read_text("utf-8")):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"\s{2,}# .*| # .*", "", line)
            if match := re.search(r"(?:^|[|;=$] *|uv run |\) )swaa-local (.*)", line.strip()):
                yield match[1].split(" | ")[0]


@functools.cache
def help_of(command: str) -> str:
    return succeeds(command, "--help", COLUMNS="200")


def commands() -> list[str]:
    listed = succeeds("--help").split("Commands:\n")[1]
    return re.findall(r"^  (\w+) ", listed, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(rf"`((?:{HOMES})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), path


def test_pages_that_sources_name_exist() -> None:
    sources = [*ROOT.glob("swaa_local/**/*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("tests/**/*.py")]
    page_name = re.compile(r"(?<![\w/])docs/[\w-]+\.md\b")
    named = {(page, file) for file in sources for page in page_name.findall(file.read_text("utf-8"))}
    assert named
    for page, file in named:
        assert (ROOT / page).is_file(), f"{name(file)} names {page}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_patches_that_are_named_are_in_the_series(page: Path) -> None:
    subjects = {file.read_text("utf-8", "replace").split("\n", 1)[0] for file in (ROOT / "patches").glob("*.patch")}
    assert subjects
    for subject in re.findall(r'"((?:build|ggml[\w-]*|llama|common|python|server) ?: [^"]+)"', prose(page)):
        assert " ".join(subject.split()) in subjects


def test_every_command_has_a_page_that_the_readme_links() -> None:
    linked = LINK.findall((ROOT / "README.md").read_text("utf-8"))
    for command in commands():
        page = ROOT / "docs" / f"{command}.md"
        assert page.read_text("utf-8").startswith(f"# swaa-local {command}\n")
        assert f"docs/{command}.md" in linked


def test_every_page_is_linked_by_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "README.md").read_text("utf-8"))}
    assert {name(page) for page in PAGES} - {"README.md"} <= linked


@pytest.mark.usefixtures("engine")
def test_what_the_readme_shows_is_what_one_sees(tmp_path: Path) -> None:
    """Its answers and numbers of tokens. The wrong answer may be another wrong one, and times differ."""
    section = (ROOT / "README.md").read_text("utf-8").split("## What it looks like\n")[1].split("\n## ")[0]
    [(_, block)] = FENCE.findall(section)
    made, *asked = block.split("$ swaa-local ")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    script = "\n".join(line.removeprefix("$ ") for line in made.splitlines())
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True)
    right = []
    for shown in asked:
        command, answer, figures = shown.splitlines()
        home = str(tmp_path / "home")
        done = run(*shlex.split(command), cwd=tmp_path, XDG_CACHE_HOME=home, XDG_STATE_HOME=home)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1].split(" · ")[0] == figures.split(" · ")[0]
        assert (done.stdout == "48213\n") == (answer == "48213")
        right.append(answer == "48213")
    assert right == [True, True, False]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_examples_exist(page: Path) -> None:
    known = commands()
    for example in examples(page):
        words = shlex.split(example)
        if words[0].startswith("-"):
            assert re.search(rf"{re.escape(words[0])}\b", succeeds("--help")), example
            continue
        assert words[0] in known, example
        if "..." in words:
            continue
        text = help_of(words[0])
        for word in words[1:]:
            if re.fullmatch(r"--?[a-z][\w-]*", word):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), f"{word} in: {example}"
