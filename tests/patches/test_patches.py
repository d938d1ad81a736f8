"""The patched build: the series applies strictly, round-trips, and a failure is one sentence that names the cause."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.upstream import FILES, HEADER, ROOT, Project, make_project, make_sdist

CHANGE = """\
diff --git a/src/graph.cpp b/src/graph.cpp
--- a/src/graph.cpp
+++ b/src/graph.cpp
@@ -4,7 +4,7 @@ line 3
 line 4
 line 5
 line 6
-line 7
+line seven
 line 8
 line 9
 line 10
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_sentence(run: subprocess.CompletedProcess[str]) -> str:
    """The failure's last line on stderr; asserts that it failed with a sentence and without a traceback."""
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


# the project's own series


def test_the_series_applies_and_round_trips() -> None:
    run = subprocess.run([sys.executable, "scripts/patches.py", "check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no fuzz, no offset" in run.stdout


def test_versions_agree() -> None:
    [pinned] = re.findall(r'^version = "(.+)"', (ROOT / "patches/upstream.toml").read_text(), re.MULTILINE)
    [built] = re.findall(r'^version = "(.+)"', (ROOT / "patches/pyproject.toml").read_text(), re.MULTILINE)
    [needed] = re.findall(r'"llama-cpp-python==(.+)"', (ROOT / "pyproject.toml").read_text())
    assert re.fullmatch(re.escape(pinned) + r"\+swaa\.\d+", built)
    assert needed == pinned


def test_the_wheel_holds_the_libraries_once_the_servers_and_the_converter() -> None:
    installed = importlib.metadata.distribution("llama-cpp-python")
    if installed.files is None:
        pytest.skip("llama-cpp-python is not installed from a wheel here")
    files = {str(file) for file in installed.files if "__pycache__" not in str(file)}
    assert {file.split("/")[0].split("-")[0] for file in files} == {"llama_cpp", "llama_cpp_python"}
    libraries = {Path(file).name.split(".", 1)[0] for file in files if file.startswith("llama_cpp/lib/")}
    assert {"libllama", "libggml", "libggml-base", "libllama-cpp-sentinel"} <= libraries
    assert {"llama-server", "ggml-rpc-server", "libggml-rpc"} <= libraries
    assert len(libraries) == sum(file.startswith("llama_cpp/lib/") for file in files)
    assert not [file for file in files if "mtmd." in file or "common." in file]
    assert {f"llama_cpp/convert/{part}" for part in ("convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py")} <= files
    assert "llama_cpp/convert/conversion/qwen.py" in files


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_has_one_ggml() -> None:
    program = "import llama_cpp, llama_cpp._ggml; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if re.search(r"libggml\.so[\d.]*$", line)}) == 1


def test_the_shipped_converter_runs() -> None:
    pytest.importorskip("torch")
    converter = importlib.metadata.distribution("llama-cpp-python").locate_file("llama_cpp/convert")
    if not Path(str(converter)).exists():
        pytest.skip("llama-cpp-python is not installed from a wheel here")
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        run = subprocess.run([sys.executable, f"{converter}/{name}", "--help"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "--outtype" in run.stdout


# patches that do not apply

CONTEXT = "src/graph.cpp:4: expected 'line four', found 'line 4'"
NOT_APPLYING = {
    # each would go through with patch(1), with fuzz or an offset
    "first context line differs": (CHANGE.replace(" line 4\n", " line four\n"), CONTEXT),
    "last context line differs": (CHANGE.replace(" line 10", " line ten"), "src/graph.cpp:10: expected 'line ten'"),
    "one line too low": (CHANGE.replace("@@ -4,7 +4,7 @@", "@@ -3,7 +3,7 @@"), "src/graph.cpp:3: expected 'line 4'"),
    "new lines elsewhere": (CHANGE.replace("+4,7", "+5,7"), "src/graph.cpp:4: the hunk says +5"),
    "removed line differs": (CHANGE.replace("-line 7", "-line 77"), "src/graph.cpp:7: expected 'line 77'"),
    "past the end": (CHANGE.replace("@@ -4,7 +4,7 @@", "@@ -40,7 +40,7 @@"), "the file has 20 lines"),
    "no such file": (CHANGE.replace("graph.cpp", "other.cpp"), "there is no file src/other.cpp"),
    "made already": (
        "diff --git a/old.txt b/old.txt\nnew file mode 100644\n--- /dev/null\n+++ b/old.txt\n@@ -0,0 +1 @@\n+x\n",
        "old.txt, which it creates, exists already",
    ),
    "deletes too little": (
        "diff --git a/src/latin.txt b/src/latin.txt\ndeleted file mode 100644\n--- a/src/latin.txt\n+++ /dev/null\n"
        "@@ -2 +1,0 @@\n-plain\n",
        "src/latin.txt, which it deletes, holds more lines",
    ),
    "line ending differs": (
        "diff --git a/src/windows.cpp b/src/windows.cpp\n--- a/src/windows.cpp\n+++ b/src/windows.cpp\n"
        "@@ -1 +1 @@\n-one\n+two\n",
        "src/windows.cpp:1: expected 'one'",
    ),
    "last newline differs": (
        "diff --git a/old.txt b/old.txt\n--- a/old.txt\n+++ b/old.txt\n"
        "@@ -1,2 +1,2 @@\n to be deleted\n-without a last newline\n+x\n",
        "old.txt:2: expected 'without a last newline'",
    ),
}
DAMAGED = {
    "cut": (CHANGE[: CHANGE.index(" line 9")], "ends in the middle"),
    "too many lines": (CHANGE + " line 11\n", "expected a hunk"),
    "count too small": (CHANGE.replace("-4,7 +4,7", "-4,6 +4,7"), "longer than it says"),
    "blank context": (CHANGE.replace(" line 8\n", "\n"), "shorter than it says"),
    "empty": ("", "changes no file"),
    "outside": (CHANGE.replace("src/graph.cpp", "../graph.cpp"), "../graph.cpp leaves the tree"),
    "absolute": (CHANGE.replace("/src/graph.cpp", "//etc/passwd"), "leaves the tree"),
    "into .git": (CHANGE.replace("src/graph.cpp", ".git/config"), "leaves the tree"),
    "rename": (
        "diff --git a/old.txt b/new.txt\nsimilarity index 100%\nrename from old.txt\nrename to new.txt\n",
        "expected 'diff --git a/PATH b/PATH'",
    ),
    "mode": ("diff --git a/run.sh b/run.sh\nold mode 100755\nnew mode 100644\n", "'old mode 100755' is not supported"),
    "binary": ("diff --git a/old.txt b/old.txt\nBinary files differ\n", "'Binary files differ' is not supported"),
    "same file twice": (CHANGE + CHANGE, "changes src/graph.cpp twice"),
}


@pytest.mark.parametrize(("diff", "said"), NOT_APPLYING.values(), ids=NOT_APPLYING)
def test_a_patch_that_does_not_fit_exactly_is_named(project: Project, diff: str, said: str) -> None:
    name = project.add_patch(diff)
    sentence = one_sentence(project.script("checkout", "tree"))
    assert f"patch {name} does not apply" in sentence
    assert said in sentence
    assert one_sentence(project.hook("build_wheel")) == sentence


@pytest.mark.parametrize(("diff", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_patch_is_named(project: Project, diff: str, said: str) -> None:
    name = project.add_patch(diff)
    sentence = one_sentence(project.script("checkout", "tree"))
    assert f"patch {name} is damaged" in sentence
    assert said in sentence
    assert not (project.root / "tree").exists()


def test_the_second_patch_is_named_when_the_first_has_taken_its_lines(project: Project) -> None:
    project.add_patch(CHANGE)
    second = project.add_patch(CHANGE)
    assert f"patch {second} does not apply at src/graph.cpp:7" in one_sentence(project.script("check"))


def test_a_patch_applies_whole_or_not_at_all(project: Project) -> None:
    project.add_patch(CHANGE + CHANGE.replace("graph.cpp", "latin.txt"))
    one_sentence(project.script("checkout", "tree"))
    assert (project.root / "tree/src/graph.cpp").read_bytes() == FILES["src/graph.cpp"]


@pytest.mark.parametrize("section", ["What:", "Why:", "Tested by:", "Can go when:"])
def test_check_wants_the_whole_header(project: Project, section: str) -> None:
    name = project.add_patch(CHANGE, HEADER.replace(section, "Note:"))
    assert f"the header of {name} lacks {section}" in one_sentence(project.script("check"))


def test_check_wants_what_export_writes(project: Project) -> None:
    index_line = "index 1111111..2222222 100644\n"
    name = project.add_patch(CHANGE.replace("--- a/", index_line + "--- a/"))
    assert "not supported" in one_sentence(project.script("check"))
    (project.patches / name).write_bytes(HEADER.encode() + b"---\n" + CHANGE.replace(" line 3\n", "\n").encode())
    assert f"{name} does not survive" in one_sentence(project.script("check"))


def test_series_and_patches_must_agree(project: Project) -> None:
    name = project.add_patch(CHANGE)
    (project.patches / "series").write_text(f"{name}\n{name}\n")
    assert f"lists {name} twice" in one_sentence(project.script("check"))
    (project.patches / "series").write_text("")
    assert f"does not list {name}" in one_sentence(project.script("check"))
    (project.patches / "series").write_text("0002-absent.patch\n")
    assert "lists 0002-absent.patch but there is no such patch" in one_sentence(project.hook("build_wheel"))


# checkout and export


def commit(tree: Path, message: str) -> None:
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@localhost", "-C", str(tree)]
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", message], check=True)


def make_commits(tree: Path) -> None:
    """Every kind of change that a patch may hold."""
    graph = tree / "src/graph.cpp"
    graph.write_bytes(graph.read_bytes().replace(b"line 7\n", b"line seven\n").replace(b"line 19\n", b""))
    (tree / "src/swaa.cpp").write_bytes(b"new\nfile without a last newline")
    (tree / "old.txt").unlink()
    commit(tree, HEADER.strip())
    (tree / "tool.sh").write_bytes(b"#!/bin/sh\n")
    (tree / "tool.sh").chmod(0o755)
    (tree / "empty").touch()
    (tree / "src/windows.cpp").write_bytes(b"one\r\n2\r\nthree\r\n")
    (tree / "src/latin.txt").write_bytes(b"caf\xe9 au lait\nplain\n")
    (tree / "src/swaa.cpp").write_bytes(b"new\nfile with a last newline\n")
    commit(tree, HEADER.replace("do a thing", "Do (another) thing: über").strip())


def contents(tree: Path) -> dict[str, tuple[bytes, bool]]:
    return {
        str(path.relative_to(tree)): (path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR))
        for path in tree.rglob("*")
        if path.is_file() and path.relative_to(tree).parts[0] != ".git"
    }


def test_checkout_is_upstream_without_its_stray_git_folder(project: Project) -> None:
    assert project.script("checkout", "tree").returncode == 0
    found = {name: content for name, (content, _) in contents(project.root / "tree").items()}
    assert found == {name: content for name, content in FILES.items() if not name.startswith(".git/")}
    assert os.access(project.root / "tree/run.sh", os.X_OK)


def test_commits_become_patches_and_come_back(project: Project) -> None:
    tree, again = project.root / "tree", project.root / "again"
    assert project.script("checkout", "tree").returncode == 0
    make_commits(tree)
    run = project.script("export", "tree")
    assert run.stdout.split() == ["0001-engine-do-a-thing.patch", "0002-engine-do-another-thing-ber.patch"]
    assert (project.patches / "series").read_text() == run.stdout
    run = project.script("check")
    assert run.returncode == 0, run.stderr
    assert project.script("checkout", "again").returncode == 0
    assert contents(again) == contents(tree)


def test_git_applies_our_patches_to_the_same_tree(project: Project) -> None:
    tree, by_git = project.root / "tree", project.root / "by-git"
    assert project.script("checkout", "tree").returncode == 0
    assert project.script("checkout", "by-git").returncode == 0
    make_commits(tree)
    for name in project.script("export", "tree").stdout.split():
        apply = ["git", "apply", "--whitespace=nowarn", str(project.patches / name)]
        subprocess.run(apply, cwd=by_git, check=True)
    shutil.copytree(project.patches / "src", by_git, dirs_exist_ok=True)
    assert contents(by_git) == contents(tree)


def test_export_does_not_depend_on_gits_configuration(project: Project, tmp_path: Path) -> None:
    assert project.script("checkout", "tree").returncode == 0
    make_commits(project.root / "tree")
    names = project.script("export", "tree").stdout.split()
    before = [(project.patches / name).read_bytes() for name in names]
    (tmp_path / ".gitconfig").write_text(
        "[diff]\n noprefix = true\n algorithm = patience\n context = 9\n renames = copies\n external = false\n"
        "[core]\n autocrlf = true\n abbrev = 40\n[color]\n ui = always\n[commit]\n gpgSign = true\n"
    )
    hostile = {"HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": str(tmp_path / ".gitconfig"), "GIT_DIFF_OPTS": "-u0"}
    assert project.script("export", "tree", **hostile).stdout.split() == names
    assert [(project.patches / name).read_bytes() for name in names] == before
    assert project.script("check", **hostile).returncode == 0


def test_export_drops_the_patch_whose_commit_is_gone(project: Project) -> None:
    tree = project.root / "tree"
    assert project.script("checkout", "tree").returncode == 0
    make_commits(tree)
    assert project.script("export", "tree").returncode == 0
    subprocess.run(["git", "-C", str(tree), "reset", "--quiet", "--hard", "HEAD~1"], check=True)
    assert project.script("export", "tree").returncode == 0
    assert [path.name for path in project.patches.glob("*.patch")] == ["0001-engine-do-a-thing.patch"]


def test_export_refuses_what_would_be_lost(project: Project) -> None:
    tree = project.root / "tree"
    assert project.script("checkout", "tree").returncode == 0
    (tree / "src/graph.cpp").write_text("changed\n")
    assert "not committed" in one_sentence(project.script("export", "tree"))
    commit(tree, "fixup! engine: do a thing")
    assert "waits to be squashed" in one_sentence(project.script("export", "tree"))
    assert not list(project.patches.glob("*.patch"))


def test_export_refuses_a_change_of_mode(project: Project) -> None:
    assert project.script("checkout", "tree").returncode == 0
    (project.root / "tree/run.sh").chmod(0o644)
    commit(project.root / "tree", HEADER.strip())
    assert "cannot be a patch" in one_sentence(project.script("export", "tree"))


def test_checkout_overwrites_nothing(project: Project) -> None:
    (project.root / "tree").mkdir()
    (project.root / "tree/mine").touch()
    assert "not an empty folder" in one_sentence(project.script("checkout", "tree"))


# files of our own

OWN = "src/own/swaa.cpp"


@pytest.fixture
def with_own_file(project: Project) -> Project:
    """One patch, and the file that it calls."""
    project.add_patch(CHANGE, f"{HEADER}Calls: src/{OWN}\n\n")
    source = project.patches / "src" / OWN
    source.parent.mkdir(parents=True)
    source.write_bytes(b"// caf\xe9\r\nno last newline")
    source.chmod(0o755)
    return project


def prepared(project: Project) -> dict[str, tuple[bytes, bool]]:
    """What the build backend would compile."""
    target = project.root / "prepared"
    program = f"import pathlib, source_tree; source_tree.prepare(pathlib.Path({str(target)!r}))"
    run = subprocess.run([sys.executable, "-c", program], cwd=project.patches, env=project.environment(), text=True)
    assert run.returncode == 0
    return contents(target)


def test_what_a_patch_calls_is_built_checked_out_and_exported(with_own_file: Project) -> None:
    project = with_own_file
    before = contents(project.patches)
    assert project.script("check").returncode == 0
    assert project.script("checkout", "tree").returncode == 0
    tree = contents(project.root / "tree")
    assert tree[OWN] == (b"// caf\xe9\r\nno last newline", True)
    assert prepared(project) == tree
    assert project.script("export", "tree").returncode == 0
    assert contents(project.patches) == before


def test_a_file_of_our_own_comes_with_the_first_patch_that_calls_it(with_own_file: Project) -> None:
    project = with_own_file
    project.add_patch(
        CHANGE.replace("line 7", "line seven").replace("+line seven", "+line 7"), f"{HEADER}Calls: src/{OWN}\n\n"
    )
    project.script("checkout", "tree")
    git = [
        "git",
        "-C",
        str(project.root / "tree"),
        "log",
        "--format=",
        "--name-only",
        "--diff-filter=A",
        "HEAD~1",
        "-1",
    ]
    assert subprocess.run(git, capture_output=True, text=True, check=True).stdout.split() == [OWN]
    assert project.script("check").returncode == 0


def test_a_series_that_calls_nothing_builds_upstream_alone(with_own_file: Project) -> None:
    for patch in with_own_file.patches.glob("*.patch"):
        patch.unlink()
    (with_own_file.patches / "series").write_text("")
    assert set(prepared(with_own_file)) == {name for name in FILES if not name.startswith(".git/")}


def test_check_names_the_file_that_no_patch_calls(with_own_file: Project) -> None:
    (with_own_file.patches / "src/src/own/forgotten.h").touch()
    sentence = one_sentence(with_own_file.script("check"))
    assert "no patch says 'Calls: src/src/own/forgotten.h' in its header" in sentence


def test_what_is_called_must_be_there(with_own_file: Project) -> None:
    (with_own_file.patches / "src" / OWN).unlink()
    sentence = f"calls src/{OWN}, but there is no such file"
    for run in (with_own_file.script("check"), with_own_file.hook("build_wheel")):
        assert sentence in one_sentence(run)


def test_a_file_of_our_own_hides_none_of_upstreams(project: Project) -> None:
    project.add_patch(CHANGE, f"{HEADER}Calls: src/old.txt\n\n")
    (project.patches / "src").mkdir()
    (project.patches / "src/old.txt").write_text("ours\n")
    assert "src/old.txt has the name of a file of upstream's" in one_sentence(project.script("checkout", "tree"))


def test_a_file_of_our_own_is_edited_as_a_file(with_own_file: Project) -> None:
    with_own_file.add_patch(
        f"diff --git a/{OWN} b/{OWN}\n--- a/{OWN}\n+++ b/{OWN}\n@@ -1 +1 @@\n-one\n+two\n",
    )
    assert f"edit src/{OWN} instead" in one_sentence(with_own_file.script("check"))


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_link_among_our_files_is_refused(with_own_file: Project) -> None:
    (with_own_file.patches / "src/link").symlink_to("/etc/passwd")
    assert "is not a plain file" in one_sentence(with_own_file.script("check"))


def test_a_commit_of_our_files_alone_is_absorbed(with_own_file: Project) -> None:
    project, tree = with_own_file, with_own_file.root / "tree"
    names = sorted(path.name for path in project.patches.glob("*.patch"))
    project.script("checkout", "tree")
    (tree / OWN).write_text("better\n")
    commit(tree, "mend our file")
    run = project.script("export", "tree")
    assert run.stdout.split() == names
    assert "'mend our file' changes files of our own alone" in run.stderr
    assert (project.patches / "src" / OWN).read_text() == "better\n"
    assert project.script("check").returncode == 0


def test_export_wants_a_call_for_a_new_file(with_own_file: Project) -> None:
    project, tree = with_own_file, with_own_file.root / "tree"
    before = contents(project.patches)
    project.script("checkout", "tree")
    (tree / "src/own/more.cpp").write_text("more\n")
    commit(tree, HEADER.strip())
    sentence = one_sentence(project.script("export", "tree"))
    assert "adds src/own/more.cpp and changes no file of upstream's" in sentence
    assert contents(project.patches) == before


def test_export_drops_the_file_that_is_gone(with_own_file: Project) -> None:
    project, tree = with_own_file, with_own_file.root / "tree"
    project.script("checkout", "tree")
    (tree / OWN).unlink()
    commit(tree, "drop it")
    assert f"calls src/{OWN}, but the tree ends without that file" in one_sentence(project.script("export", "tree"))
    subprocess.run(["git", "-C", str(tree), "reset", "--quiet", "--hard", "HEAD~2"], check=True)
    assert project.script("export", "tree").returncode == 0
    assert not (project.patches / "src" / OWN).exists()


# the pin


@pytest.mark.parametrize("run", [lambda p: p.script("check"), lambda p: p.hook("build_wheel")], ids=["check", "build"])
def test_a_wrong_checksum_names_the_pin(project: Project, run) -> None:
    project.pin("0" * 64)
    sentence = one_sentence(run(project))
    assert "pin of llama-cpp-python 0.3.36 in upstream.toml" in sentence
    assert f"expected sha256 {'0' * 64}, got {sha256(project.sdist)}" in sentence


def test_pip_downloads_the_pinned_sdist_from_the_users_index(project: Project) -> None:
    local = {"SWAA_UPSTREAM_SDIST": None, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project.sdist.parent)}
    run = project.script("checkout", "tree", **local)
    assert run.returncode == 0, run.stderr
    assert (project.root / "tree/src/graph.cpp").read_bytes() == FILES["src/graph.cpp"]
    project.pin("0" * 64)
    assert "pin of llama-cpp-python 0.3.36" in one_sentence(project.script("checkout", "other", **local))


def test_an_index_without_upstream_is_a_sentence(project: Project, tmp_path: Path) -> None:
    local = {"SWAA_UPSTREAM_SDIST": None, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "nothing")}
    sentence = one_sentence(project.script("check", **local))
    assert "pip cannot download the sdist of llama-cpp-python 0.3.36" in sentence
    assert "SWAA_UPSTREAM_SDIST" in sentence


def test_a_local_sdist_must_exist(project: Project) -> None:
    sentence = one_sentence(project.script("check", SWAA_UPSTREAM_SDIST="/nowhere/x.tar.gz"))
    assert "SWAA_UPSTREAM_SDIST names /nowhere/x.tar.gz, which is no file" in sentence


@pytest.mark.parametrize("pin", ["", 'version = "1"\n', 'version = "1"\nsha256 = "12"\n', "not toml"])
def test_a_bad_pin_file_is_named(project: Project, pin: str) -> None:
    (project.patches / "upstream.toml").write_text(pin)
    assert "upstream.toml" in one_sentence(project.script("check"))


def evil(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (evil("llama_cpp_python-0.3.36/../../evil"), "a path outside its folder"),
        (evil("/evil"), "a path outside its folder"),
        (evil("llama_cpp_python-0.3.36/link", tarfile.SYMTYPE), "not a plain file"),
        (evil("llama_cpp_python-0.3.36/device", tarfile.CHRTYPE), "not a plain file"),
    ],
)
def test_an_sdist_writes_only_into_its_folder(project: Project, member: tarfile.TarInfo, said: str) -> None:
    project.pin(make_sdist(project.sdist, extra=member))
    assert said in one_sentence(project.script("checkout", "tree"))
    assert not (project.root / "evil").exists()


def test_a_broken_archive_is_named(project: Project) -> None:
    project.sdist.write_bytes(project.sdist.read_bytes()[:300])
    project.pin(sha256(project.sdist))
    assert "cannot unpack" in one_sentence(project.script("checkout", "tree"))


# the tools


def test_a_missing_compiler_is_named(project: Project, tmp_path: Path) -> None:
    sentence = one_sentence(project.hook("build_wheel", PATH=str(tmp_path), CC=None, CXX=None, CMAKE_ARGS=None))
    assert "a C compiler is missing (none of cc, gcc, clang is on PATH)" in sentence
    assert "apt-get install g++" in sentence


@pytest.mark.parametrize(
    "env", [{"CXX": "/nowhere/g++"}, {"CMAKE_ARGS": "-DGGML_CUDA=off -DCMAKE_CXX_COMPILER:PATH=/nowhere/g++"}]
)
def test_a_chosen_compiler_that_is_missing_is_named(project: Project, env: dict[str, str]) -> None:
    assert "'/nowhere/g++' is not a program" in one_sentence(project.hook("build_wheel", **env))


def test_a_compiler_that_cannot_build_is_named(project: Project, tmp_path: Path) -> None:
    compiler = tmp_path / "old-g++"
    compiler.write_text("#!/bin/sh\necho 'unknown option -std=c++17' >&2\nexit 1\n")
    compiler.chmod(0o755)
    run = project.hook("build_wheel", CXX=str(compiler))
    assert f"the C++17 compiler {compiler} cannot build a program" in one_sentence(run)
    assert "unknown option -std=c++17" in run.stderr


def test_pip_shows_the_sentence(project: Project, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    run = subprocess.run(
        [*command, str(project.patches)],
        env=project.environment(CXX="/nowhere/g++"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "error: a C++17 compiler is missing ('/nowhere/g++' is not a program)" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_no_sdist_is_made(project: Project) -> None:
    assert "build a wheel" in one_sentence(project.hook("build_sdist"))


@pytest.mark.skipif(sys.platform == "win32", reason="the lock is POSIX")
def test_builds_share_a_folder_in_turn_and_never_at_once(project: Project, tmp_path: Path) -> None:
    program = """
import os, sys, build_backend
with build_backend._build_folder() as one:
    (one / "tree").mkdir()
    with build_backend._build_folder() as other:
        print(one.name, other.name, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
"""

    def build(end: str) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-c", program, end],
            env=project.environment(TMPDIR=str(tmp_path), PYTHONPATH=str(project.patches)),
            capture_output=True,
            text=True,
        )
        return run.stdout.split() or run.stderr.split()

    first = [build("done")[0], build("killed")[0], build("done")[0]]
    assert first == [f"swaa-build-{os.getuid()}"] * 3
    assert build("done")[1] != first[0]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(first[0])]
