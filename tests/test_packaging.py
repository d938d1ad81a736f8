"""What a fresh clone gives: an instant command, lazy imports, and files that speak of the project alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.upstream import ROOT

HEAVY = {"gguf", "huggingface_hub", "llama_cpp", "numpy", "prompt_toolkit", "torch", "transformers"}


def imported(*arguments: str) -> set[str]:
    """The top-level modules that `python *arguments` imports."""
    run = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines() if "import time:" in line}


def commands() -> list[str]:
    run = subprocess.run([sys.executable, "-m", "swaa_local", "--help"], capture_output=True, text=True, cwd=ROOT)
    return re.findall(r"^  ([a-z]+)  ", run.stdout.split("Commands:")[1], re.MULTILINE)


def test_help_needs_no_engine() -> None:
    assert not imported("-m", "swaa_local", "--help") & HEAVY


def test_help_of_every_command_needs_no_engine() -> None:
    names = commands()
    assert {"chat", "convert", "inspect"} <= set(names)
    for name in names:
        assert not imported("-m", "swaa_local", name, "--help") & HEAVY, name


def test_importing_the_package_needs_no_engine() -> None:
    assert not imported("-c", "import swaa_local; swaa_local.__version__") & HEAVY
    assert not imported("-c", "from swaa_local import SWAAConfig") & HEAVY


def test_every_public_name_is_there() -> None:
    import swaa_local

    for name in swaa_local.__all__:
        assert getattr(swaa_local, name) is not None
    assert set(swaa_local.__all__) <= set(dir(swaa_local))
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        swaa_local.Lama  # noqa: B018


def test_the_installed_command_is_the_module() -> None:
    script = shutil.which("swaa-local", path=sysconfig.get_path("scripts"))
    if not script:
        pytest.skip("swaa-local is not installed in this environment")
    for arguments in (["--help"], ["--version"]):
        ours = subprocess.run(
            [sys.executable, "-m", "swaa_local", *arguments], capture_output=True, text=True, cwd=ROOT
        )
        theirs = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert ours.returncode == theirs.returncode == 0
        assert ours.stdout == theirs.stdout


def tracked() -> list[Path]:
    git = shutil.which("git")
    if not git or not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    names = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_the_lock_stays_out_of_the_repository() -> None:
    assert ROOT / "uv.lock" not in tracked()
    ignored = subprocess.run(["git", "check-ignore", "-q", "uv.lock"], cwd=ROOT)
    assert ignored.returncode == 0


def test_files_name_no_registry_and_no_machine() -> None:
    # a patch's context lines are upstream's; the words are put together here so that this file passes
    words = [b"pypi" + b".org", b"pythonhosted" + b".org", b"/" + b"work/", b"/" + b"root/", b"/" + b"home/"]
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}"
        for path in tracked()
        if path.suffix != ".patch"
        for word in words
        if word in path.read_bytes()
    ]
    assert not found


def test_ci_runs_the_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Tests\n.*?^```\w*\n(.+?)^```", readme, re.MULTILINE | re.DOTALL)
    assert section
    assert section[1].strip() == "uv run pytest -n auto --dist loadfile"
    assert section[1].strip() in (ROOT / ".ci/run").read_text().splitlines()
