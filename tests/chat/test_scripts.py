"""`chat` in scripts: JSON, several questions, quiet, directories, patterns and PDFs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swaa_local.files import document_files
from swaa_local.files.document import DocumentError
from swaa_local.files.document_files import read_documents
from tests.support.program import environment, fails
from tests.support.scripted import thinker
from tests.support.tiny import PREFILL, ScheduleKeys


@pytest.fixture
def model(tmp_path) -> Path:
    """Thinks "hm", answers "Yes!"."""
    return thinker(tmp_path / "thinker.gguf", schedule=ScheduleKeys(24, 4, [PREFILL]))


def chat(*args: object, home: Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "swaa_local", "chat", *map(str, args), "-t", "1", "-c", "2048"]
    streams: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    env = environment(XDG_CACHE_HOME=str(home / "cache"), XDG_STATE_HOME=str(home / "state"))
    return subprocess.run(command, env=env, capture_output=True, check=False, timeout=120, **streams)


def test_an_answer_as_json(model, tmp_path):
    done = chat(model, "-p", "Is it?", "--json", home=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    said = json.loads(done.stdout)
    assert (said["question"], said["answer"], said["thinking"], said["finish"]) == ("Is it?", "Yes!", "hm", "stop")
    assert said["tokens"]["generated"] == 9
    assert said["tokens"]["cached"] == 0
    assert set(said["timings"]) == {"prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert said["schedule"] == {"window": 24, "sinks": 4, "tail": 0, "layer_modes": [1]}
    assert said["model"] == str(model)
    assert json.loads(chat(model, "-p", "Is it?", "--json", "-n", "6", home=tmp_path).stdout)["finish"] == "length"
    assert json.loads(chat(model, "--json", home=tmp_path, stdin=b"Is it?").stdout)["answer"] == "Yes!"


def test_several_questions_share_the_text_and_nothing_else(model, tmp_path):
    (tmp_path / "book.txt").write_text("A book. " * 60)
    ask = [model, "-f", tmp_path / "book.txt", "-p", "Is it?", "-p", "Is it so, or not?"]
    done = chat(*ask, "--json", home=tmp_path)
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["answer"], second["answer"]) == ("Yes!", "Yes!")
    # The second has the text and no earlier answer: it is longer by its own words alone.
    assert second["tokens"]["prompt"] - first["tokens"]["prompt"] == len("Is it so, or not?") - len("Is it?")
    assert second["tokens"]["cached"] >= 480
    assert chat(*ask, home=tmp_path).stdout == b"Yes!\n\nYes!\n"


def test_several_questions_in_a_session_are_a_conversation(model, tmp_path):
    done = chat(model, "--session", "s", "-p", "Is it?", "-p", "Sure?", "--json", home=tmp_path)
    first, second = map(json.loads, done.stdout.splitlines())
    assert second["tokens"]["prompt"] > first["tokens"]["prompt"] + len("Yes!")


def test_quiet_writes_nothing_but_answers_and_errors(model, tmp_path):
    done = chat(model, "-p", "Is it?", "-q", "-n", "6", home=tmp_path)
    assert (done.stdout, done.stderr) == (b"Ye\n", b"")
    done = chat(model, "-p", "x" * 3000, "-q", home=tmp_path)
    assert done.returncode == 1
    assert b"but the context is 2048" in done.stderr


def test_a_directory_is_all_its_texts(model, tmp_path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in ("b.py", "a.py", "deep/c.py", ".hidden", "binary.bin"):
        (tmp_path / "src" / name).write_bytes(b"\0\1" if name == "binary.bin" else f"# {name}".encode())
    notes: list[str] = []
    found = read_documents(str(tmp_path / "src"), notes.append)
    assert [document.name for document in found] == ["src/a.py", "src/b.py", "src/deep/c.py"]
    assert notes == [f"1 files of {tmp_path / 'src'} are no texts and were left out: binary.bin"]
    matched = read_documents(str(tmp_path / "src" / "**" / "*.py"))
    assert [document.text for document in matched] == ["# a.py", "# b.py", "# deep/c.py"]
    (tmp_path / "a[1].txt").write_text("a name, not a pattern")
    assert [document.name for document in read_documents(str(tmp_path / "a[1].txt"))] == ["a[1].txt"]
    done = chat(model, "-p", "Is it?", "-f", tmp_path / "src", home=tmp_path)
    assert done.stdout == b"Yes!\n"
    assert b"were left out: binary.bin" in done.stderr


def test_what_stands_for_no_text_is_one_line(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    ask = ["chat", model, "-t", "1", "-c", "1024", "-p", "x", "-f"]
    assert "no file matches" in fails(*ask, tmp_path / "*.nope")
    assert "is a directory without a text in it" in fails(*ask, tmp_path / "empty")
    monkeypatch.setattr(document_files, "_MOST_FILES", 2)
    for name in "abc":
        (tmp_path / "empty" / name).write_text(name)
    with pytest.raises(DocumentError, match="stands for 3 files, and 2 are the most"):
        read_documents(str(tmp_path / "empty"))


def pdf(text: str) -> bytes:
    """A PDF of one page with this text."""
    content = f"BT /F1 24 Tf 72 700 Td ({text}) Tj ET".encode() if text else b""
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(data)
    return data + b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        table,
        start,
    )


def test_the_text_of_a_pdf(tmp_path):
    pytest.importorskip("pypdf")
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdf("Sinks stay visible"))
    [document] = read_documents(str(path))
    assert (document.name, document.text.strip()) == ("paper.pdf", "Sinks stay visible")
    path.write_bytes(pdf(""))
    with pytest.raises(DocumentError, match="perhaps of scanned pages"):
        read_documents(str(path))
    path.write_bytes(b"%PDF-1.4\nnonsense")
    with pytest.raises(DocumentError, match=r"paper\.pdf is a PDF"):
        read_documents(str(path))


def test_a_pdf_that_is_torn_anywhere_is_one_line(tmp_path):
    pytest.importorskip("pypdf")
    path, whole = tmp_path / "paper.pdf", pdf("Sinks stay visible")
    for end in range(9, len(whole), 23):
        path.write_bytes(whole[:end])
        done = chat("x.gguf", "-f", path, "-p", "x", home=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        if end > 200:
            break
    for end in range(9, len(whole)):
        path.write_bytes(whole[:end])
        with contextlib.suppress(DocumentError):
            read_documents(str(path))


def test_a_pdf_without_pypdf(tmp_path, monkeypatch):
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdf("Sinks stay visible"))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DocumentError, match=r"pip install 'swaa-local\[pdf\]', or with uv: .*\) or pdftotext"):
        read_documents(str(path))
    program = tmp_path / "pdftotext"
    program.write_text('#!/bin/sh\n[ "$1 $2" = "- -" ] && printf "%s" "from pdftotext"\n')
    program.chmod(0o755)
    assert read_documents(str(path))[0].text == "from pdftotext"
    program.write_text("#!/bin/sh\necho 'Syntax Error: torn' >&2; exit 1\n")
    with pytest.raises(DocumentError, match="pdftotext cannot read: Syntax Error: torn"):
        read_documents(str(path))
