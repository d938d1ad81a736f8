"""How a complete file gets its name, with hard links and without."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from swaa_local.files.output_file import (
    OutputError,
    OutputExists,
    check_output,
    place,
    publish,
    workplace,
    write_output,
)


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


@pytest.mark.parametrize("moment", ["link", "open", "replace"])
def test_a_rival_at_the_last_moment_wins_or_is_refused(tmp_path, monkeypatch, moment):
    """Between whatever is looked at and whatever is done, somebody else takes the name, unless it is taken already."""
    part, output = tmp_path / "part", tmp_path / "output"
    part.write_text("new")
    last, rival_won = getattr(os, moment), []

    def rival_first(*args, **kwargs):
        monkeypatch.setattr(os, moment, last)
        try:
            with open(output, "x") as file:
                file.write("rival")
            rival_won.append(True)
        except FileExistsError:
            pass
        return last(*args, **kwargs)

    monkeypatch.setattr(os, moment, rival_first)
    try:
        place(part, output, overwrite=False)
        assert (part.exists(), output.read_text(), rival_won) == (False, "new", [])
    except FileExistsError:
        assert (part.read_text(), output.read_text(), rival_won) == ("new", "rival", [True])


def test_of_two_at_work_on_one_output_one_is_refused(tmp_path):
    """Both found the name free when they began. The refused one's work is there until it leaves."""
    output, gate, outcomes = tmp_path / "output", threading.Barrier(2), {}

    def run(content: str) -> None:
        check_output(output, force=False)
        with workplace(output) as folder:
            result = folder / "result"
            result.write_text(content)
            gate.wait()
            try:
                publish(result, output, force=False)
                outcomes["won"] = content
            except OutputExists:
                outcomes["refused"] = result.read_text()

    threads = [threading.Thread(target=run, args=(content,)) for content in ("one" * 1000, "two" * 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes.values()) == ["one" * 1000, "two" * 1000]
    assert output.read_text() == outcomes["won"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    output = tmp_path / "output"
    mask = os.umask(0o027)
    try:
        write_output(output, b"old", force=False)
    finally:
        os.umask(mask)
    assert (output.read_bytes(), stat.S_IMODE(output.stat().st_mode)) == (b"old", 0o640)
    with pytest.raises(OutputExists):
        write_output(output, b"new", force=False)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OutputError, match=r"cannot write .*output: No space left on device"):
            write_output(output, b"new", force=True)
    assert output.read_bytes() == b"old"
    write_output(output, b"new", force=True)
    assert output.read_bytes() == b"new"
    with pytest.raises(OutputError, match=r"cannot write to .*nowhere: No such file or directory"):
        write_output(tmp_path / "nowhere" / "output", b"new", force=True)
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_that_came_into_being_meanwhile_stays(tmp_path):
    (tmp_path / "result").write_text("new")
    (tmp_path / "output").write_text("precious")
    with pytest.raises(OutputError, match="was created meanwhile; pass --force"):
        publish(tmp_path / "result", tmp_path / "output", force=False)
    assert (tmp_path / "output").read_text() == "precious"
