"""Have pip download one file from whatever index the user has, or tell its newest. Knows nothing of what is in it.

Shared by the build backend and scripts that fetch something.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class DownloadError(Exception):
    """A sentence that says what pip said last. log: all that it said."""

    def __init__(self, sentence: str, log: str) -> None:
        super().__init__(sentence)
        self.log = log


def pip_download(what: str, options: Sequence[str], directory: Path) -> Path:
    """The one file that `pip download` brings with these options and without dependencies, in a folder of `directory`.

    what: its name in the `DownloadError` that says that there is none.
    """
    target = directory / "downloaded"
    arguments = ("download", "--no-deps", "--progress-bar", "off", "--dest", str(target), *options)
    said = _pip(f"pip cannot download {what}", *arguments)
    found = list(target.iterdir()) if target.is_dir() else []
    if len(found) != 1:
        raise DownloadError(f"pip downloaded {len(found)} files for {what}, and one was expected", said)
    return found[0]


def pip_newest(distribution: str) -> str:
    """The newest version of which the user's index has a source distribution, as pip counts: no pre-release."""
    what = f"pip cannot tell the newest version of {distribution}"
    said = _pip(what, "index", "versions", distribution, "--no-binary", ":all:")
    if not (versions := re.search(r"^Available versions: ([^\s,]+)", said, re.MULTILINE)):
        raise DownloadError(f"{what}: its answer names none", said)
    return versions[1]


def _pip(what: str, *arguments: str) -> str:
    """Run pip; what it said, or a DownloadError that begins with `what`."""
    run = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if run.returncode == 0:
        return run.stdout
    if "No module named pip" in run.stdout:
        raise DownloadError(f"{what}: {sys.executable} has no pip; install pip", run.stdout)
    errors = re.findall(r"^ERROR: (.+)$", run.stdout, re.MULTILINE)
    why = errors[-1].rstrip(".") if errors else f"exit code {run.returncode}"
    raise DownloadError(f"{what} ({why}); check the network and the index", run.stdout)


def _environment() -> dict[str, str]:
    """The user's environment, in which pip takes uv's index where only uv has been told one."""
    # What an outer pip tells a build backend's process would make the inner pip look for that backend's package.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("_PYPROJECT_HOOKS_", "PEP517_"))}
    env = {**own, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_NO_INPUT": "1"}
    for ours, theirs in (
        ("PIP_INDEX_URL", ("UV_DEFAULT_INDEX", "UV_INDEX_URL")),
        ("PIP_EXTRA_INDEX_URL", ("UV_INDEX", "UV_EXTRA_INDEX_URL")),
        ("PIP_FIND_LINKS", ("UV_FIND_LINKS",)),
    ):
        for name in theirs:
            if ours not in env and env.get(name):
                # uv allows NAME=URL
                env[ours] = " ".join(re.sub(r"^[\w-]+=(?=\w+:)", "", url) for url in env[name].split())
    return env
