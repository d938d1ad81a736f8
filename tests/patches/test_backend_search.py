"""Where ggml looks for backends: beside its library and beside the executable, and nowhere else.

ggml's own code is compiled here as a library, with the installed engine's libggml-base, and given backends of our own:
they leave a file with their name when they are opened, and have the score that they are built with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds libraries as on Linux")

BACKEND = """\
#include "ggml-backend-impl.h"
#include <stdio.h>
#include <stdlib.h>
static const char * get_name(ggml_backend_reg_t reg) { (void) reg; return "CPU"; }
static size_t get_device_count(ggml_backend_reg_t reg) { (void) reg; return 0; }
static struct ggml_backend_reg backend = { GGML_BACKEND_API_VERSION, { get_name, get_device_count, NULL, NULL }, NULL };
int ggml_backend_score(void) { return SCORE; }
ggml_backend_reg_t ggml_backend_init(void) { return &backend; }
__attribute__((constructor)) static void opened(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/" NAME, getenv("OPENED"));
    fclose(fopen(path, "w"));
}
"""
PROGRAM = "#include <ggml-backend.h>\nint main(void) { ggml_backend_load_all(); return 0; }\n"
LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).ggml_backend_load_all()"


class Workshop:
    """Compiles against a patched tree."""

    def __init__(self, tree: Path, folder: Path) -> None:
        import llama_cpp.llama_cpp as engine

        self._ggml = tree / "vendor/llama.cpp/ggml"
        self._folder = folder
        base = Path(engine._lib._name).parent
        self.base = [f"-L{base}", "-lggml-base", f"-Wl,-rpath,{base}"]
        self.library = folder / "libggml.so"
        sources = [self._ggml / "src" / name for name in ("ggml-backend-reg.cpp", "ggml-backend-dl.cpp")]
        self._compile("c++", "-std=c++17", "-DNDEBUG", "-shared", *sources, "-o", self.library, *self.base)

    def backend(self, folder: Path, name: str, score: int) -> None:
        folder.mkdir(exist_ok=True)
        source = self._folder / "backend.c"
        source.write_text(BACKEND)
        defines = f'-DNAME="{name}"', f"-DSCORE={score}"
        self._compile("cc", "-shared", *defines, source, "-o", folder / f"libggml-cpu-{name}.so", *self.base)

    def program(self, path: Path) -> None:
        source = self._folder / "program.c"
        source.write_text(PROGRAM)
        library = self.library.parent
        self._compile("cc", source, "-o", path, f"-L{library}", "-lggml", f"-Wl,-rpath,{library}", *self.base)

    def _compile(self, compiler: str, *arguments: Path | str) -> None:
        flags = ["-fPIC", "-DGGML_BACKEND_DL", f"-I{self._ggml / 'include'}", f"-I{self._ggml / 'src'}"]
        subprocess.run([compiler, *flags, *map(str, arguments)], check=True)


@pytest.fixture(scope="session")
def workshop(patched_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(patched_tree, tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def package(workshop: Workshop, tmp_path: Path) -> Path:
    """A folder with libggml and backends, of which `best` is the best that is supported."""
    folder = tmp_path / "package"
    folder.mkdir()
    shutil.copy(workshop.library, folder)
    for name, score in (("plain", 1), ("best", 5), ("fair", 3), ("unsupported", 0)):
        workshop.backend(folder, name, score)
    return folder


def run(*command: Path | str, cwd: Path) -> tuple[str, set[str]]:
    """What it logged, and the backends that were opened."""
    opened = cwd / "opened"
    opened.mkdir()
    env = os.environ | {"OPENED": str(opened)}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return done.stderr, {file.name for file in opened.iterdir()}


@pytest.mark.parametrize("way", ["absolute", "relative", "through a link"])
def test_the_best_backend_beside_the_library_is_loaded(package: Path, tmp_path: Path, way: str) -> None:
    cwd = tmp_path / "documents"
    cwd.mkdir()
    (tmp_path / "link").symlink_to(package)
    library = {
        "absolute": package / "libggml.so",
        "relative": Path("../package/libggml.so"),
        "through a link": tmp_path / "link" / "libggml.so",
    }[way]
    log, opened = run(sys.executable, "-c", LOAD, library, cwd=cwd)
    assert log.strip().endswith("/libggml-cpu-best.so")
    assert "loaded CPU backend" in log
    assert opened == {"plain", "best", "fair", "unsupported"}


def test_a_backend_in_the_current_directory_is_not_even_opened(
    workshop: Workshop, package: Path, tmp_path: Path
) -> None:
    documents = tmp_path / "documents"
    workshop.backend(documents, "planted", 99)
    log, opened = run(sys.executable, "-c", LOAD, package / "libggml.so", cwd=documents)
    assert "libggml-cpu-best.so" in log
    assert "planted" not in opened


def test_a_backend_beside_the_executable_is_found(workshop: Workshop, tmp_path: Path) -> None:
    programs, documents = tmp_path / "programs", tmp_path / "documents"
    documents.mkdir()
    workshop.backend(programs, "beside", 1)
    workshop.program(programs / "program")
    log, opened = run(programs / "program", cwd=documents)
    assert "libggml-cpu-beside.so" in log
    assert opened == {"beside"}


def test_where_none_loads_the_log_says_why(workshop: Workshop, tmp_path: Path) -> None:
    package, documents = tmp_path / "package", tmp_path / "documents"
    package.mkdir()
    documents.mkdir()
    shutil.copy(workshop.library, package)
    (package / "libggml-cpu-damaged.so").write_bytes(bytes(4096))
    log, _ = run(sys.executable, "-c", LOAD, package / "libggml.so", cwd=documents)
    assert "libggml-cpu-damaged.so: invalid ELF header" in log
