"""Tests of lissom.io.hashes: every range's hash, as hashlib has it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from lissom.io import hashes
from lissom.io.hashes import hash_ranges, submitted

CONTENT = bytes(range(251)) * 40


@pytest.mark.parametrize("processors", [1, 2, 5])
@pytest.mark.parametrize("ends", [[0], [1], [10040], [5000, 10040], [1, 2, 3, 7000, 7000, 10040]], ids=str)
def test_hash_of_every_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[int], processors: int):
    monkeypatch.setattr(hashes, "_PIECE_BYTES", 999)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    (tmp_path / "file").write_bytes(CONTENT)
    ranges = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    with (tmp_path / "file").open("rb") as file:
        found = hash_ranges(file.fileno(), ranges)
        assert file.tell() == 0
    assert found == [sha256(CONTENT[places.start : places.stop]).hexdigest() for places in ranges]


def test_file_that_ends_early_has_another_hash(tmp_path: Path):
    (tmp_path / "file").write_bytes(CONTENT[:100])
    with (tmp_path / "file").open("rb") as file:
        assert hash_ranges(file.fileno(), [range(50, 200)]) == [sha256(CONTENT[50:100]).hexdigest()]


def test_file_that_cannot_be_read_is_an_error(tmp_path: Path):
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            hash_ranges(handle, [range(4), range(4, 8)])
    finally:
        os.close(handle)


def test_pool_that_takes_no_more_calls_runs_them_now():
    with ThreadPoolExecutor(1) as pool:
        pass
    assert submitted(pool, lambda: 7).result() == 7
    assert isinstance(submitted(pool, lambda: 1 // 0).exception(), ZeroDivisionError)
