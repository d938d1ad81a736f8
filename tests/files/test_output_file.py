"""How a complete file gets its name, with hard links and without."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from swaa_local.files.output_file import OutputError, place, publish


@pytest.fixture(params=["links", "no links"], autouse=True)
def file_system(request, monkeypatch):
    """Where hard links are possible, and where they are not, as on FAT."""

    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def test_a_name_is_given_once(tmp_path):
    part, output = tmp_path / "part", tmp_path / "output"
    part.write_text("new")
    place(part, output, overwrite=False)
    assert (part.exists(), output.read_text()) == (False, "new")
    part.write_text("newer")
    with pytest.raises(FileExistsError):
        place(part, output, overwrite=False)
    assert (part.read_text(), output.read_text()) == ("newer", "new")
    place(part, output, overwrite=True)
    assert (part.exists(), output.read_text()) == (False, "newer")


def test_only_a_regular_file_is_replaced(tmp_path):
    (tmp_path / "part").write_text("new")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="it is not a regular file"):
            place(tmp_path / "part", tmp_path / name, overwrite=True)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_link_that_leads_nowhere_is_not_followed(tmp_path):
    (tmp_path / "part").write_text("new")
    (tmp_path / "output").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        place(tmp_path / "part", tmp_path / "output", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "part"]


def test_of_many_one_gets_the_name(tmp_path):
    gate, won = threading.Barrier(8), []

    def run(n: int) -> None:
        part = tmp_path / f"part-{n}"
        part.write_text(str(n) * 1000)
        gate.wait()
        try:
            place(part, tmp_path / "output", overwrite=False)
            won.append(n)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / "output").read_text()] == [str(n) * 1000 for n in won]


def test_a_file_that_came_into_being_meanwhile_stays(tmp_path):
    (tmp_path / "result").write_text("new")
    (tmp_path / "output").write_text("precious")
    with pytest.raises(OutputError, match="has come into being meanwhile; pass --force"):
        publish(tmp_path / "result", tmp_path / "output", force=False)
    assert (tmp_path / "output").read_text() == "precious"
