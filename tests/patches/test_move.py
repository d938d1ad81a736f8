"""The series on another release of upstream: what `try` says of each patch; `move` and `export` bring it there.

Both releases are made up; the newest one is what a folder of source archives holds, which is all that pip knows here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.upstream import FILES, HEADER, ROOT, Project, make_project

GRAPH = FILES["src/graph.cpp"]
CONFLICTS = 3


def change(path: str, line: int, old: str, new: str, before: list[str], after: list[str]) -> str:
    """A diff of one line, with its number and what stands around it."""
    hunk = [f" {text}" for text in before] + [f"-{old}", f"+{new}"] + [f" {text}" for text in after]
    start, count = line - len(before), len(before) + len(after) + 1
    body = "\n".join([f"@@ -{start},{count} +{start},{count} @@", *hunk])
    return f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n{body}\n"


def in_graph(line: int, new: str) -> str:
    """A diff of one line of src/graph.cpp as the pinned release has it."""
    around = [f"line {i}" for i in range(1, 21)]
    return change("src/graph.cpp", line, f"line {line}", new, around[line - 4 : line - 1], around[line : line + 3])


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(tmp_path / "project")
    (project.root / "pyproject.toml").write_text('dependencies = [\n    "llama-cpp-python==0.3.36",\n]\n')
    return project


def index(project: Project) -> dict[str, str | None]:
    """What makes the project's source archives all that pip knows."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project.sdist.parent), "PIP_CONFIG_FILE": os.devnull}


def said(run: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """What `try` said of each patch: how it fits, its number, and where it conflicts."""
    lines = (line.split(maxsplit=2) for line in run.stdout.splitlines()[1:-1])
    return [[fit, name[:4], *where] for fit, name, *where in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_sentence(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert not run.stdout
    return run.stderr.strip().splitlines()[-1].removeprefix("error: ")


# try


def test_each_patch_is_told_how_it_fits(project: Project) -> None:
    project.add_patch(in_graph(4, "line four"))
    project.add_patch(in_graph(11, "line eleven"))
    project.add_patch(in_graph(16, "line sixteen"))
    project.add_patch("diff --git a/old.txt b/old.txt\n--- a/old.txt\n+++ b/old.txt\n@@ -1 +1 @@\n-to be deleted\n+x\n")
    project.add_patch(change("src/latin.txt", 2, "plain", "simple", [], []))
    graph = GRAPH.replace(b"line 7\n", b"line 7\nand a half\n").replace(b"line 18\n", b"line eighteen\n")
    files = {**FILES, "src/graph.cpp": graph, "src/latin.txt": FILES["src/latin.txt"].replace(b"plain", b"simple")}
    del files["old.txt"]
    sdist = project.release("0.3.37", files)
    before = contents(project.patches)
    run = project.script("try", "--sdist", str(sdist))
    assert run.returncode == CONFLICTS
    assert run.stdout.startswith("llama-cpp-python 0.3.37, and the series for 0.3.36\n")
    assert said(run) == [
        ["exact", "0001"],
        ["offset", "0002"],
        ["merge", "0003"],
        ["conflict", "0004", "old.txt (a file that one side lacks)"],
        ["made", "0005"],
    ]
    assert run.stdout.splitlines()[-1] == "1 exact, 1 offset, 1 merge, 1 made, 1 conflict"
    assert contents(project.patches) == before


def test_the_first_patch_that_conflicts_is_named(project: Project) -> None:
    project.add_patch(in_graph(5, "line five"))
    first = project.add_patch(in_graph(10, "line ten"))
    project.add_patch(in_graph(16, "line sixteen"))
    graph = GRAPH.replace(b"line 10\n", b"line 0xa\n").replace(b"line 16\n", b"line 0x10\n")
    run = project.script("try", "--sdist", str(project.release("0.3.37", {**FILES, "src/graph.cpp": graph})))
    assert run.returncode == CONFLICTS
    assert run.stderr == (
        f"error: 2 of 3 patches conflict with llama-cpp-python 0.3.37; the first is {first}: src/graph.cpp (1)\n"
    )


def test_what_comes_after_a_conflict_is_judged_by_itself(project: Project) -> None:
    project.add_patch(in_graph(10, "line ten"))
    project.add_patch(in_graph(10, "line ten").replace("line ten", "ten").replace("line 10", "line ten"))
    project.add_patch(in_graph(17, "line seventeen"))
    graph = GRAPH.replace(b"line 10\n", b"line 0xa\n")
    run = project.script("try", "--sdist", str(project.release("0.3.37", {**FILES, "src/graph.cpp": graph})))
    assert [fit for fit, *_ in said(run)] == ["conflict", "exact", "exact"]


def test_a_file_that_upstream_now_has_under_our_name_is_a_conflict(project: Project) -> None:
    name = "src/own.cpp"
    project.add_patch(in_graph(5, "line five"), f"{HEADER}Calls: src/{name}\n\n")
    (project.patches / "src/src").mkdir(parents=True)
    (project.patches / "src" / name).write_text("ours\n")
    run = project.script("try", "--sdist", str(project.release("0.3.37", {**FILES, name: b"upstream's\n"})))
    assert said(run) == [["conflict", "0001", f"{name} (1)"]]


def test_a_file_of_our_own_comes_along(project: Project) -> None:
    name = "src/own.cpp"
    project.add_patch(in_graph(5, "line five"), f"{HEADER}Calls: src/{name}\n\n")
    (project.patches / "src/src").mkdir(parents=True)
    (project.patches / "src" / name).write_text("ours\n")
    run = project.script("try", "--sdist", str(project.release("0.3.37")))
    assert run.returncode == 0, run.stderr
    assert said(run) == [["exact", "0001"]]


@pytest.mark.parametrize("releases", [[], ["0.3.9", "0.3.35"], ["0.4.0rc1"]], ids=["none", "older", "not yet released"])
def test_without_a_newer_release_nothing_is_said(project: Project, releases: list[str]) -> None:
    project.add_patch(in_graph(5, "line five"))
    for version in releases:
        project.release(version, {**FILES, "src/graph.cpp": b"all of it is new\n"})
    run = project.script("try", **index(project))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_newest_release_that_pip_knows_is_tried(project: Project) -> None:
    project.add_patch(in_graph(5, "line five"))
    project.release("0.3.37", {**FILES, "src/graph.cpp": b"all of it is new\n"})
    project.release("0.3.100")
    run = project.script("try", **index(project))
    assert run.returncode == 0, run.stderr
    assert "0.3.100" in run.stdout
    assert said(run) == [["exact", "0001"]]
    assert project.script("try", "0.3.37", **index(project)).returncode == CONFLICTS


def test_an_index_that_does_not_answer_is_a_sentence(project: Project, tmp_path: Path) -> None:
    nothing = {**index(project), "PIP_FIND_LINKS": str(tmp_path / "nothing")}
    sentence = one_sentence(project.script("try", **nothing))
    assert "pip cannot tell the newest version of llama-cpp-python" in sentence
    sentence = one_sentence(project.script("try", "0.3.99", **index(project)))
    assert "pip cannot download the sdist of llama-cpp-python 0.3.99" in sentence


@pytest.mark.parametrize(
    ("name", "why"),
    [("other-1.0.tar.gz", "is not called"), ("llama_cpp_python-0.3.99.tar.gz", "is no file")],
)
def test_an_archive_of_something_else_is_refused(project: Project, tmp_path: Path, name: str, why: str) -> None:
    if "other" in name:
        (tmp_path / name).touch()
    assert why in one_sentence(project.script("try", "--sdist", str(tmp_path / name)))


def test_a_broken_series_is_named_before_anything_is_tried(project: Project) -> None:
    name = project.add_patch(in_graph(5, "line five").replace("line 4", "line four"))
    assert f"patch {name} does not apply" in project.script("try", "--sdist", str(project.release("0.3.37"))).stderr


# move


def in_tree(project: Project, *arguments: str) -> None:
    git = ["git", "-c", "core.editor=true", "-C", str(project.root / "tree")]
    subprocess.run([*git, *arguments], check=True, capture_output=True)


def test_a_series_without_conflicts_is_moved_by_two_commands(project: Project) -> None:
    project.add_patch(in_graph(10, "line ten"))
    graph = GRAPH.replace(b"line 2\n", b"line 2\nand a half\n")
    sdist = project.release("0.3.37", {**FILES, "src/graph.cpp": graph})
    assert project.script("move", "tree", "--sdist", str(sdist)).returncode == 0
    run = project.script("export", "tree")
    assert run.returncode == 0, run.stderr
    assert "@@ -8,7 +8,7 @@" in (project.patches / "0001-engine-do-a-thing.patch").read_text()
    assert project.script("check", SWAA_UPSTREAM_SDIST=str(sdist)).returncode == 0


def test_a_conflict_is_resolved_as_in_any_rebase(project: Project) -> None:
    project.add_patch(in_graph(5, "line five"))
    project.add_patch(in_graph(10, "line ten"))
    project.add_patch(in_graph(16, "line sixteen"))
    sdist = project.release("0.3.37", {**FILES, "src/graph.cpp": GRAPH.replace(b"line 10\n", b"line 0xa\n")})
    run = project.script("move", "tree", "--sdist", str(sdist))
    assert run.returncode == CONFLICTS
    assert "'engine: do a thing' conflicts with llama-cpp-python 0.3.37 in src/graph.cpp (1)" in run.stderr
    graph = project.root / "tree/src/graph.cpp"
    assert b"||||||| " in graph.read_bytes()  # what the patch was made for is shown
    graph.write_bytes(GRAPH.replace(b"line 10\n", b"line ten, 0xa\n").replace(b"line 5\n", b"line five\n"))
    in_tree(project, "add", "src/graph.cpp")
    in_tree(project, "rebase", "--continue")
    assert len(project.script("export", "tree").stdout.split()) == 3
    assert project.script("check", SWAA_UPSTREAM_SDIST=str(sdist)).returncode == 0
    assert "-line 0xa\n+line ten, 0xa\n" in (project.patches / "0002-engine-do-a-thing.patch").read_text()


def test_a_patch_that_upstream_has_made_is_dropped(project: Project) -> None:
    project.add_patch(in_graph(5, "line five"), HEADER.replace("a thing", "the first"))
    project.add_patch(in_graph(10, "line ten"), HEADER.replace("a thing", "the second"))
    sdist = project.release("0.3.37", {**FILES, "src/graph.cpp": GRAPH.replace(b"line 5\n", b"line five\n")})
    assert project.script("move", "tree", "--sdist", str(sdist)).returncode == 0
    assert project.script("export", "tree").stdout.split() == ["0001-engine-do-the-second.patch"]


def test_export_pins_what_the_series_was_moved_to(project: Project) -> None:
    project.add_patch(in_graph(5, "line five"))
    (project.patches / "upstream.toml").write_text(f"# a comment\n{(project.patches / 'upstream.toml').read_text()}")
    sdist = project.release("0.3.37")
    assert project.script("move", "tree", "0.3.37", **index(project)).returncode == 0
    assert '"0.3.36"' in (project.patches / "upstream.toml").read_text()
    run = project.script("export", "tree")
    assert "pins llama-cpp-python 0.3.37 now" in run.stderr
    pin = (project.patches / "upstream.toml").read_text()
    assert pin.startswith('# a comment\nversion = "0.3.37"\nsha256 = "')
    assert '\nversion = "0.3.37+swaa.1"\n' in (project.patches / "pyproject.toml").read_text()
    assert '"llama-cpp-python==0.3.37",' in (project.root / "pyproject.toml").read_text()
    assert project.script("check", SWAA_UPSTREAM_SDIST=str(sdist)).returncode == 0


def test_export_of_the_pinned_release_leaves_the_pin_alone(project: Project) -> None:
    project.add_patch(in_graph(5, "line five"))
    pinned = [project.patches / "upstream.toml", project.patches / "pyproject.toml", project.root / "pyproject.toml"]
    before = [path.read_bytes() for path in pinned]
    assert project.script("checkout", "tree").returncode == 0
    assert project.script("export", "tree").stderr == ""
    assert [path.read_bytes() for path in pinned] == before


def test_move_wants_a_release_and_an_empty_folder(project: Project) -> None:
    assert "there is no newer release" in one_sentence(project.script("move", "tree", **index(project)))
    assert not (project.root / "tree").exists()
    (project.root / "tree").mkdir()
    (project.root / "tree/mine").touch()
    run = project.script("move", "tree", "--sdist", str(project.release("0.3.37")))
    assert "not an empty folder" in one_sentence(run)
    assert [path.name for path in (project.root / "tree").iterdir()] == ["mine"]


def test_git_works_in_the_folders_of_upstream_s_submodules(project: Project) -> None:
    stray = {**FILES, "src/.git": b"gitdir: ../.git/modules/src\n"}
    assert project.script("move", "tree", "--sdist", str(project.release("0.3.37", stray))).returncode == 0
    assert not (project.root / "tree/src/.git").exists()
    in_tree(project, "-C", "src", "status")


# the workflow that tells


@pytest.fixture
def weekly(project: Project, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], str]]:
    """Run what the workflow runs, in the project: how it ended, and the summary that it wrote."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    (project.root / ".ci").mkdir()
    (project.root / ".ci/upstream").write_bytes((ROOT / ".ci/upstream").read_bytes())
    summary = tmp_path / "summary.md"

    def run(**env: str | None) -> tuple[subprocess.CompletedProcess[str], str]:
        [command] = [step["run"] for step in workflow("upstream")["jobs"]["try"]["steps"] if "run" in step]
        env = {**index(project), "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_ACTIONS": "true", **env}
        env["PYTHON"] = sys.executable
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", f"bash {command}"],
            cwd=project.root,
            env=project.environment(**env),
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, summary.read_text() if summary.exists() else ""

    return run


def workflow(name: str) -> dict[Any, Any]:
    parsed = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text("utf-8"))
    assert isinstance(parsed, dict)
    return parsed


def test_the_weekly_run_is_silent_while_the_newest_release_is_pinned(project: Project, weekly) -> None:
    project.add_patch(in_graph(5, "line five"))
    run, summary = weekly()
    assert (run.returncode, run.stdout, run.stderr, summary) == (0, "", "", "")


def test_the_weekly_run_tells_the_first_patch_that_no_longer_applies(project: Project, weekly) -> None:
    project.add_patch(in_graph(5, "line five"))
    broken = project.add_patch(in_graph(10, "line ten"))
    project.release("0.3.37", {**FILES, "src/graph.cpp": GRAPH.replace(b"line 10\n", b"line 0xa\n")})
    run, summary = weekly()
    assert run.returncode == CONFLICTS
    sentence = f"1 of 2 patches conflict with llama-cpp-python 0.3.37; the first is {broken}: src/graph.cpp (1)"
    assert f"::error::{sentence}" in run.stdout.splitlines()
    assert summary.splitlines()[0] == sentence
    assert f"conflict  {broken}  src/graph.cpp (1)" in summary.splitlines()


def test_the_weekly_run_succeeds_where_the_series_applies(project: Project, weekly) -> None:
    name = project.add_patch(in_graph(5, "line five"))
    project.release("0.3.37")
    run, summary = weekly()
    assert run.returncode == 0
    assert f"exact     {name}" in summary.splitlines()
    assert "::error::" not in run.stdout


def test_the_weekly_run_fails_where_pip_finds_nothing(project: Project, weekly, tmp_path: Path) -> None:
    run, summary = weekly(PIP_FIND_LINKS=str(tmp_path / "nothing"))
    assert run.returncode == 1
    assert "pip cannot tell the newest version of llama-cpp-python" in summary


def test_the_workflow_runs_each_week_and_by_hand() -> None:
    events = workflow("upstream")[True]  # YAML 1.1 reads `on` as a truth value
    assert "workflow_dispatch" in events
    [schedule] = events["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / ".github/workflows").glob("*.yml")))
def test_a_workflow_is_one_that_github_runs(name: str) -> None:
    parsed = workflow(name)
    assert parsed["name"] == name
    assert parsed["permissions"] == {"contents": "read"}
    for job in parsed["jobs"].values():
        assert "runs-on" in job
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@v[\d.]+", step.get("uses", "a/b@v1"))
            script = step.get("run", "").split()[:1]
            for file in script:
                if file.startswith("."):
                    assert os.access(ROOT / file, os.X_OK), file
