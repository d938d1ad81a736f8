"""The directory of states: what is found, what is kept, and what files that are no whole states do (nothing)."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
import zlib
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from swaa_local.prefix_cache.store import PrefixCache

KEY, OTHER_KEY = "a" * 32, "b" * 32


class Cache(PrefixCache):
    """One whose notes are a list."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.notes: list[str] = []
        super().__init__(directory, note=self.notes.append, **options)

    def put(self, tokens: np.ndarray, n_bytes: int = 5000, key: str = KEY, **options: Any) -> bool:
        return self.save(key, tokens, cells_of(tokens, n_bytes), model="m.gguf", schedule="full", **options)


def tokens_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, n).astype(np.int32)


def cells_of(tokens: np.ndarray, n_bytes: int) -> np.ndarray:
    return np.random.default_rng(int(tokens.sum())).integers(0, 256, n_bytes).astype(np.uint8)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "states")


def files(cache: PrefixCache) -> list[Path]:
    return sorted(cache.directory.iterdir())


def test_the_state_that_shares_most_is_found_and_comes_back_whole(cache):
    prompt = tokens_of(2000)
    short, long, other = prompt[:600], np.concatenate([prompt[:900], tokens_of(100, seed=1)]), tokens_of(1000, seed=2)
    for tokens in (short, long, other):
        assert cache.put(tokens)
    assert [(match.n_tokens, match.n_common) for match in cache.find(KEY, prompt)] == [(1000, 900), (600, 600)]
    header, tokens, cells = cache.load(cache.find(KEY, prompt)[0].path)
    assert np.array_equal(tokens, long)
    assert np.array_equal(cells, cells_of(long, 5000))
    assert (header.key, header.model, header.schedule, header.n_tokens) == (KEY, "m.gguf", "full", 1000)
    assert cache.notes == []


def test_another_key_finds_nothing_not_even_one_with_the_same_beginning(cache):
    prompt = tokens_of(600)
    cache.put(prompt)
    assert cache.find(OTHER_KEY, prompt) == []
    assert cache.find(KEY[:16] + OTHER_KEY[:16], prompt) == []


def test_only_the_owner_may_read(cache, tmp_path):
    before = os.umask(0)
    try:
        cache.put(tokens_of(600))
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(cache)] == [0o600]


def test_the_least_recently_used_goes_first(tmp_path):
    cache = Cache(tmp_path / "states", max_bytes=40_000)
    prompts = [tokens_of(300, seed) for seed in range(4)]
    for age, prompt in zip((300, 200, 100), prompts, strict=False):
        cache.put(prompt, 10_000)
        [path] = [match.path for match in cache.find(KEY, prompt)]
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    cache.load(cache.find(KEY, prompts[0])[0].path)  # used now
    cache.put(prompts[3], 10_000)
    assert [bool(cache.find(KEY, prompt)) for prompt in prompts] == [True, False, True, True]


def test_what_is_larger_than_the_cache_is_not_kept_and_removes_nothing(tmp_path):
    cache = Cache(tmp_path / "states", max_bytes=20_000)
    cache.put(tokens_of(300), 10_000)
    assert not cache.put(tokens_of(300, 1), 30_000)
    assert len(files(cache)) == 1
    assert "--cache-size allows more" in cache.notes[0]


def test_a_longer_state_takes_the_place_of_its_beginning_where_that_is_said(cache):
    prompt = tokens_of(1000)
    cache.put(prompt[:500])
    cache.put(prompt[:500], conversation="talk")
    cache.put(prompt[:700])
    cache.put(tokens_of(400, 5))
    assert len(files(cache)) == 4
    cache.put(prompt, replaces_shorter=True)
    assert [match.n_tokens for match in cache.find(KEY, prompt)] == [1000]
    assert len(files(cache)) == 3


def test_conversations_are_found_by_name_alone(cache):
    tokens = tokens_of(600)
    cache.put(tokens, conversation="/somewhere/talk.json")
    assert cache.find(KEY, tokens) == []
    assert np.array_equal(cache.load_conversation(KEY, "/somewhere/talk.json")[1], tokens)
    assert cache.load_conversation(KEY, "/somewhere/other.json") is None
    assert cache.load_conversation(OTHER_KEY, "/somewhere/talk.json") is None


def test_the_list_and_the_broom(cache):
    cache.put(tokens_of(300), 10_000)
    cache.put(tokens_of(400, 1), conversation="talk")
    assert sorted((s.header.n_tokens, s.is_conversation) for s in cache.states()) == [(300, False), (400, True)]
    n_bytes = sum(path.stat().st_size for path in files(cache))
    (cache.directory / "foreign.txt").write_text("not ours")
    assert cache.clear() == (2, n_bytes)
    assert [path.name for path in files(cache)] == ["foreign.txt"]
    assert cache.clear() == (0, 0)
    assert Cache(cache.directory / "nowhere").clear() == (0, 0)


# Files that are no whole states


@pytest.fixture
def stored(cache) -> Path:
    cache.put(tokens_of(600))
    return files(cache)[0]


@pytest.mark.parametrize("n_bytes", [0, 5, 19, 60, 500, 2000, 3000, 7500, -1])
def test_a_file_that_is_cut_is_a_miss_with_one_line(cache, stored, n_bytes):
    stored.write_bytes(stored.read_bytes()[:n_bytes])
    assert cache.find(KEY, tokens_of(600)) == []
    assert len(cache.notes) == 1
    assert not stored.exists()
    assert cache.put(tokens_of(600))
    assert len(cache.find(KEY, tokens_of(600))) == 1


@pytest.mark.parametrize("place", [0, 8, 12, 17, 40, 200, 500, 1500, 3000, 7000, -1])
def test_a_damaged_byte_is_a_miss_with_one_line(cache, stored, place):
    data = bytearray(stored.read_bytes())
    data[place] ^= 0x41
    stored.write_bytes(data)
    matches = cache.find(KEY, tokens_of(600))
    assert [cache.load(match.path) for match in matches] in ([], [None])
    assert len(cache.notes) == 1
    assert "is not used" in cache.notes[0]


def test_a_state_of_another_version_is_a_miss_with_one_line(cache, stored):
    data = bytearray(stored.read_bytes())
    data[8] = 77
    stored.write_bytes(data)
    assert cache.find(KEY, tokens_of(600)) == []
    assert "version 77" in cache.notes[0]


@pytest.mark.parametrize(
    "header",
    ["[]", "3", "{}", '{"n_tokens": -1}', '{"n_tokens": "600"}', '{"n_tokens": 1000000000000000}', '{"key": 1}'],
)
def test_a_header_that_says_nonsense_is_a_miss_with_one_line(cache, stored, header):
    """Its checksum is right, as of a program with a mistake."""
    data = stored.read_bytes()
    length = int.from_bytes(data[12:16], "little")
    said, change = json.loads(data[20 : 20 + length]), json.loads(header)
    if change and isinstance(change, dict):
        change = said | change
    text = json.dumps(change).encode()
    new = data[:12] + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    stored.write_bytes(new + data[20 + length :])
    assert cache.find(KEY, tokens_of(600)) == []
    assert len(cache.notes) == 1
    assert "is not used" in cache.notes[0]


def test_a_state_that_cannot_be_opened_now_is_a_miss_and_not_lost(cache, stored, monkeypatch):
    def too_many(path: Path) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        for reader in ("read_header", "read_state"):
            patch.setattr(f"swaa_local.prefix_cache.store.{reader}", too_many)
        assert cache.find(KEY, tokens_of(600)) == []
        assert cache.load(stored) is None
    assert len(cache.notes) == 2
    assert "Too many open files" in cache.notes[0]
    assert len(cache.find(KEY, tokens_of(600))) == 1


def test_the_broom_does_not_mind_who_else_sweeps(cache, stored, monkeypatch):
    cache.put(tokens_of(700, seed=1))
    listed = list(cache._files("*"))
    listed[0].unlink()
    monkeypatch.setattr(cache, "_files", lambda _pattern: iter(listed))
    assert cache.clear()[0] == 1
    assert files(cache) == []


def test_a_state_that_another_process_removed_is_a_miss(cache, stored):
    [match] = cache.find(KEY, tokens_of(600))
    stored.unlink()
    assert cache.load(match.path) is None
    assert cache.notes == []


def test_a_directory_that_cannot_be_written_is_noted_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "states")
    assert cache.find(KEY, tokens_of(600)) == []
    assert not cache.put(tokens_of(600))
    assert not cache.put(tokens_of(700))
    assert len(cache.notes) == 1
    assert "is not kept" in cache.notes[0]


def test_a_disk_that_is_nearly_full_is_left_alone(cache, monkeypatch):
    monkeypatch.setattr("swaa_local.prefix_cache.store._LEAST_FREE_BYTES", 1 << 60)
    assert not cache.put(tokens_of(600))
    assert "left" in cache.notes[0]
    assert files(cache) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_every_moment_of_a_save(tmp_path):
    """Before each line of it, one after the other: there is the state of before, or the whole new one."""
    directory = tmp_path / "states"
    before, new = tokens_of(600), tokens_of(900)
    Cache(directory).put(before, 100_000)
    moment = n_new = 0
    while _save_and_die(directory, new, moment):
        cache = Cache(directory)
        found = {match.n_tokens: cache.load(match.path) for match in cache.find(KEY, new)}
        assert set(found) in ({600}, {900}, {600, 900}), moment
        for state in found.values():
            assert np.array_equal(state[2], cells_of(state[1], 100_000))
        assert cache.notes == []
        n_new += 900 in found
        for path in directory.glob("*.prefix"):
            if path in [m.path for m in cache.find(KEY, new) if m.n_tokens == 900]:
                path.unlink()
        cache.put(before, 100_000)
        moment += 1
    assert moment > 30
    assert 0 < n_new < moment
    # What the dead left went with the next save, but for folders that were empty yet.
    assert all(path.suffix == ".prefix" or not list(path.iterdir()) for path in directory.iterdir())


def _save_and_die(directory: Path, tokens: np.ndarray, moment: int) -> bool:
    """Save in a process that is killed before the line of that number; False if the save ended before."""
    pid = os.fork()
    if pid == 0:
        left = moment

        def count(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal left
            if event == "line" and "swaa_local" in frame.f_code.co_filename:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return count

        cache, cells = Cache(directory), cells_of(tokens, 100_000)
        sys.settrace(count)
        cache.save(KEY, tokens, cells, replaces_shorter=True)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
