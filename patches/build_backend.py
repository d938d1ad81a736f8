"""PEP 517 backend: upstream's pinned sdist plus the series, built by scikit-build-core.

`build_wheel` makes a patched tree in a temporary folder (source_tree.py), lays this folder's pyproject.toml over it and
calls scikit-build-core there, so CMAKE_ARGS and config settings mean what they mean for llama-cpp-python. What cannot
work ends in one sentence on stderr: the patch, the pin or the tool that is at fault, or the compiler's first error.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from build_output import BuildError, tell, watched
from source_tree import HERE, SourceError, prepare

Settings = dict[str, list[str] | str] | None
Hook = TypeVar("Hook", bound=Callable[..., Any])

# Upstream's HF converter as it lies in the sdist -> llama_cpp/convert/ in the wheel. Its parts find each other there as
# they do in llama.cpp's own tree.
CONVERTER = (
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion",
    "gguf-py/gguf",
    "models/templates",
    "models/ggml-vocab-gpt-neox.gguf",
    "models/ggml-vocab-llama-spm.gguf",
)

_COMPILERS = {
    "C": ("CC", "CMAKE_C_COMPILER", ("cc", "gcc", "clang"), ".c", "int main(void) { return 0; }\n", ()),
    "C++17": (
        "CXX",
        "CMAKE_CXX_COMPILER",
        ("c++", "g++", "clang++"),
        ".cpp",
        "#include <optional>\n#include <vector>\nint main() { return std::optional<int>{}.has_value(); }\n",
        ("-std=c++17",),
    ),
}


def _one_sentence(hook: Hook) -> Hook:
    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except (SourceError, BuildError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    return wrapped  # type: ignore[return-value]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """CMake and ninja from the index where the machine lacks them."""
    from scikit_build_core import build

    return build.get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """The metadata is this folder's pyproject.toml; nothing is downloaded for it."""
    from scikit_build_core import build

    return build.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


@_one_sentence
def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Fetch, verify, unpack, patch, build."""
    from scikit_build_core import build

    check_compilers()
    wheels = os.path.abspath(wheel_directory)
    with _build_folder() as folder:
        tree = folder / "llama-cpp-python"
        tell(f"swaa-local compiles llama.cpp, once, on {_cores()} cores; pip -v and uv -v show how far it is")
        prepare(tree)
        lay_out(tree)
        handle, log = tempfile.mkstemp(prefix=f"{folder.name}-", suffix=".log", dir=folder.parent)
        os.close(handle)
        with _environment(tree), _chdir(tree), watched("llama.cpp", Path(log)):
            return build.build_wheel(wheels, config_settings)


@_one_sentence
def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Refused: the sources are this folder and upstream's own sdist."""
    raise SourceError("there is no sdist of the patched llama-cpp-python: build a wheel, its source is patches/ itself")


def lay_out(tree: Path) -> None:
    """What the wheel holds beside upstream's package: our metadata, llama.cpp's licence and the converter."""
    shutil.copyfile(HERE / "pyproject.toml", tree / "pyproject.toml")
    # scikit-build-core leaves out of the wheel what git would ignore
    (tree / ".gitignore").unlink(missing_ok=True)
    upstream = tree / "vendor" / "llama.cpp"
    shutil.copyfile(upstream / "LICENSE", tree / "LICENSE.llama.cpp")
    for part in CONVERTER:
        source, target = upstream / part, tree / "llama_cpp" / "convert" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copyfile(source, target)
        else:
            raise SourceError(f"upstream's sdist has no {part}, a part of its HF converter")


def check_compilers() -> None:
    """SourceError where no C or C++17 compiler is found or the one that CMake will take builds nothing."""
    arguments = os.environ.get("CMAKE_ARGS", "")
    if sys.platform == "win32" or "CMAKE_TOOLCHAIN_FILE" in arguments:
        return
    for language, (variable, option, names, suffix, program, flags) in _COMPILERS.items():
        chosen = re.search(rf"-D{option}(?::\w+)?=(\S+)", arguments)
        command = [chosen[1]] if chosen else shlex.split(os.environ.get(variable, ""))
        if not command:
            command = [name for name in names if shutil.which(name)][:1]
        if not command or not shutil.which(command[0]):
            what = f"{command[0]!r} is not a program" if command else f"none of {', '.join(names)} is on PATH"
            raise SourceError(
                f"a {language} compiler is missing ({what}): install one (Debian and Ubuntu: apt-get install g++; "
                f"Fedora: dnf install gcc-c++; macOS: xcode-select --install) or set {variable}"
            )
        with tempfile.TemporaryDirectory(prefix="swaa-compiler-") as tmp:
            source = Path(tmp, f"probe{suffix}")
            source.write_text(program)
            run = subprocess.run(
                [*command, *flags, str(source), "-o", str(Path(tmp, "probe"))], capture_output=True, text=True
            )
        if run.returncode:
            sys.stderr.write(run.stderr)
            raise SourceError(
                f"the {language} compiler {shlex.join(command)} cannot build a program; "
                f"install a complete one, or set {variable}"
            )


@contextlib.contextmanager
def _build_folder() -> Iterator[Path]:
    """A folder of the same name each time, or another one where a build is at work in it.

    Upstream's unity builds hold absolute paths, so ccache would miss them under a random name.
    """
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(os.path.realpath(tempfile.gettempdir()), f"swaa-build-{user}")
    with contextlib.ExitStack() as held:
        if not _claim(folder, held):
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path, held: contextlib.ExitStack) -> bool:
    """Make the folder, or empty what a killed build left in it; False where it is in use or somebody else's.

    The claim is a lock that dies with the process.
    """
    try:
        import fcntl
    except ImportError:
        return False
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        held.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, there = os.fstat(handle), folder.stat()
        if ours.st_uid != os.getuid() or (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
            return False
        for left in folder.iterdir():
            shutil.rmtree(left)
    except OSError:
        return False
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _environment(tree: Path) -> Iterator[None]:
    """ccache where present, told that the folder's name means nothing; all cores under make too."""
    extra = {"CMAKE_BUILD_PARALLEL_LEVEL": str(_cores())}
    if ccache := shutil.which("ccache"):
        extra |= {"CCACHE_BASEDIR": str(tree.parent), "CCACHE_NOHASHDIR": "1"}
        extra |= {f"CMAKE_{language}_COMPILER_LAUNCHER": ccache for language in ("C", "CXX", "CUDA", "HIP")}
    before = dict(os.environ)
    os.environ.update({**extra, **before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _chdir(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
