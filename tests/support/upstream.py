"""A made-up upstream for tests of the series: a tiny sdist, a project with scripts/ and patches/ that pins it.

The real upstream takes seconds to unpack; the code under test is the same.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKEND_FILES = (
    "build_backend.py",
    "build_output.py",
    "pip_download.py",
    "source_tree.py",
    "strict_diff.py",
    "pyproject.toml",
)
VERSION = "0.3.36"
SDIST_NAME = f"llama_cpp_python-{VERSION}.tar.gz"

# pip asks a downloaded sdist for its metadata, through the backend that its pyproject.toml names
FILES: dict[str, bytes] = {
    "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "meta"\nbackend-path = ["."]\n',
    "meta.py": b"""
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory, "llama_cpp_python-0.3.36.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 0.3.36\\n")
    return info.name
""",
    "PKG-INFO": b"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n",
    "src/graph.cpp": b"".join(b"line %d\n" % i for i in range(1, 21)),
    "src/windows.cpp": b"one\r\ntwo\r\nthree\r\n",
    "src/latin.txt": b"caf\xe9\nplain\n",
    "old.txt": b"to be deleted\nwithout a last newline",
    "run.sh": b"#!/bin/sh\n",
    ".gitignore": b"lib/\n",
    "lib/ignored.txt": b"git would ignore this\n",
    ".git/config": b"stray\n",
}

# What makes it build: one library, and the parts of the converter that the wheel carries.
BUILDABLE: dict[str, bytes] = {
    "CMakeLists.txt": b"""
cmake_minimum_required(VERSION 3.21)
project(llama_cpp C CXX)
add_library(llama SHARED src/good.cpp src/other.cpp)
install(TARGETS llama LIBRARY DESTINATION ${SKBUILD_PLATLIB_DIR}/llama_cpp/lib COMPONENT python)
""",
    "src/good.cpp": b"int good() { return 0; }\n",
    "src/other.cpp": b"int other() { return 0; }\n",
    "llama_cpp/__init__.py": b"",
    **{
        f"vendor/llama.cpp/{name}": b"x\n"
        for name in (
            "LICENSE",
            "convert_hf_to_gguf.py",
            "convert_lora_to_gguf.py",
            "conversion/base.py",
            "gguf-py/gguf/__init__.py",
            "models/templates/one.jinja",
            "models/ggml-vocab-gpt-neox.gguf",
            "models/ggml-vocab-llama-spm.gguf",
        )
    },
}

HEADER = "engine: do a thing\n\nWhat: x\n\nWhy: y\n\nTested by: z\n\nCan go when: never\n\n"


def make_sdist(
    path: Path, files: dict[str, bytes] = FILES, extra: tarfile.TarInfo | None = None, version: str = VERSION
) -> str:
    """Write the sdist and return its sha256. Where the files say VERSION, it says `version`."""
    with tarfile.open(path, "w:gz") as archive:
        for name, said in files.items():
            content = said.replace(VERSION.encode(), version.encode())
            member = tarfile.TarInfo(f"llama_cpp_python-{version}/{name}")
            member.size = len(content)
            member.mode = 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(member, io.BytesIO(content))
        if extra:
            archive.addfile(extra)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Project:
    """A copy of the project's scripts/ and patches/ whose upstream is the made-up one and whose series is empty."""

    root: Path
    sdist: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    def environment(self, **changes: str | None) -> dict[str, str]:
        env = {**os.environ, "SWAA_UPSTREAM_SDIST": str(self.sdist), "PYTHONDONTWRITEBYTECODE": "1"}
        for name, value in changes.items():
            env.pop(name, None)
            if value is not None:
                env[name] = value
        return env

    def pin(self, sha256: str) -> None:
        (self.patches / "upstream.toml").write_text(f'version = "0.3.36"\nsha256 = "{sha256}"\n')

    def release(self, version: str, files: dict[str, bytes] = FILES) -> Path:
        """The sdist of another release, in the folder of the pinned one's."""
        path = self.sdist.parent / f"llama_cpp_python-{version}.tar.gz"
        make_sdist(path, files, version=version)
        return path

    def add_patch(self, diff: str | bytes, header: str = HEADER) -> str:
        """Add a patch of this diff at the end of the series."""
        series = self.patches / "series"
        name = f"{len(series.read_text().splitlines()) + 1:04d}-engine-do-a-thing.patch"
        body = diff if isinstance(diff, bytes) else diff.encode()
        (self.patches / name).write_bytes(header.encode() + b"---\n" + body)
        series.write_text(f"{series.read_text()}{name}\n")
        return name

    def script(self, *arguments: str, **env: str | None) -> subprocess.CompletedProcess[str]:
        """Run scripts/patches.py."""
        return self._run([sys.executable, "scripts/patches.py", *arguments], self.root, env)

    def hook(self, name: str, **env: str | None) -> subprocess.CompletedProcess[str]:
        """Call a hook of the build backend in a process of its own, as a PEP 517 frontend does."""
        program = f"import sys; sys.path.insert(0, '.'); import build_backend; build_backend.{name}({str(self.root)!r})"
        return self._run([sys.executable, "-c", program], self.patches, env)

    def _run(self, command: list[str], cwd: Path, env: dict[str, str | None]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment(**env), capture_output=True, text=True, errors="replace", timeout=120
        )


def make_project(root: Path, files: dict[str, bytes] = FILES) -> Project:
    """Lay out the project below `root`, with an upstream of these files."""
    (root / "scripts").mkdir(parents=True)
    (root / "patches").mkdir()
    for script in ("patches.py", "patch_move.py", "patch_tree.py"):
        shutil.copy(ROOT / "scripts" / script, root / "scripts")
    for name in BACKEND_FILES:
        shutil.copy(ROOT / "patches" / name, root / "patches")
    (root / "patches" / "series").touch()
    (root / "dist").mkdir()
    project = Project(root, root / "dist" / SDIST_NAME)
    project.pin(make_sdist(project.sdist, files))
    return project
