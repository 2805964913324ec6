"""Tests of lissom.tuning.store: what is written, and what is read back from files that anyone may have written."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from lissom.compiler.ir.fingerprint import fingerprint
from lissom.errors import ArtifactError
from lissom.tuning.candidates import read_candidate
from lissom.tuning.store import FILE, Store, number
from lissom.tuning.stored import stored_reports

FIGURES = {"milliseconds": 1.0, "low": 1.0, "high": 1.0, "bytes": 8, "drop": 0.0, "error": 0.0}


def test_a_record_is_read_back(tmp_path):
    Store(tmp_path).add("loss", "key", "name", loss=0.25)
    record = Store(tmp_path).get("loss", "key", "name")
    assert record is not None
    assert number(record, "loss") == 0.25
    assert Store(tmp_path).get("loss", "other", "name") is None


def test_torn_last_line_is_skipped_and_next_record_whole(tmp_path):
    store = Store(tmp_path)
    store.add("loss", "key", "first", loss=1.0)
    store.add("loss", "key", "second", loss=2.0)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-9])
    torn = Store(tmp_path)
    assert torn.skipped == 1
    assert [record["name"] for record in torn.all("loss")] == ["first"]
    torn.add("loss", "key", "third", loss=3.0)
    assert [record["name"] for record in Store(tmp_path).all("loss")] == ["first", "third"]


def test_the_latest_of_two_records_of_one_name_counts(tmp_path):
    one, other = Store(tmp_path), Store(tmp_path)
    one.add("loss", "key", "name", loss=1.0)
    other.add("loss", "key", "name", loss=2.0)
    assert number(Store(tmp_path).get("loss", "key", "name"), "loss") == 2.0


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b"[" * 100_000,
        b'{"version":2,"kind":"loss","key":"key","name":"name"}',
        b'{"version":1,"kind":"loss","key":"key"}',
        b'{"version":1,"kind":"loss","key":["key"],"name":"name"}',
        b'{"version":1,"kind":"loss","key":"key","name":"' + b"x" * (1 << 20) + b'"}',
        b"\xff\xfe",
    ],
    ids=range(8),
)
def test_lines_that_are_no_records_are_passed_over(tmp_path, line):
    (tmp_path / FILE).write_bytes(line + b"\n")
    store = Store(tmp_path)
    assert store.skipped == 1
    assert store.all("loss") == []


@pytest.mark.parametrize("value", ["1e400", "9" * 400, "NaN", '"1"', "true", "null", "-1", "[1]"])
def test_a_number_that_is_none_is_not_taken(tmp_path, value):
    (tmp_path / FILE).write_text(f'{{"version":1,"kind":"loss","key":"key","name":"name","loss":{value}}}\n')
    assert number(Store(tmp_path).get("loss", "key", "name"), "loss", 0.0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"pipeline": "no-such-pass"},
        {"pipeline": "quantize{scheme=__import__('os')}"},
        {"pipeline": "finetune{loss=print}"},
        {"pipeline": 3},
        {"drop": math.inf},
        {"milliseconds": -1},
        {"bytes": None},
    ],
    ids=str,
)
def test_a_candidate_with_a_wrong_field_is_not_taken(wrong):
    assert read_candidate({"pipeline": "quantize", "backend": "eager", **FIGURES}) is not None
    assert read_candidate({"pipeline": "quantize", "backend": "eager", **FIGURES, **wrong}) is None


def test_link_and_directory_in_place_of_file_are_refused(tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / FILE).symlink_to(target)
    with pytest.raises(ArtifactError, match="symbolic link"):
        Store(tmp_path / "store")
    (tmp_path / "other" / FILE).mkdir(parents=True)
    with pytest.raises(ArtifactError, match="not a regular file"):
        Store(tmp_path / "other")
    with pytest.raises(ArtifactError, match="cannot be made"):
        Store(target)


def test_a_fingerprint_depends_on_values_shapes_and_types():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64), torch.ones(4)]
    assert len({fingerprint(tensor) for tensor in tensors}) == 4
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint({"a": tensors[0], "b": 1}) == fingerprint({"b": 1, "a": torch.zeros(4)})


def test_a_store_is_shown_with_its_candidates(tmp_path):
    store = Store(tmp_path)
    facts = {"model": "Tiny", "backend": "eager", "memory": False, "max_drop": 0.1, "target": None, "metric": ""}
    store.add("run", "key", "latency", milliseconds=2.0, bytes=16, **facts)
    store.add("candidate", "key", "eager quantize", pipeline="quantize", backend="eager", **FIGURES)
    store.add("candidate", "key", "eager x", pipeline="x", backend="eager", **FIGURES)
    (report,) = stored_reports(tmp_path)
    assert [item.pipeline for item in report.candidates] == ["exact", "quantize"]
    assert report.chosen.pipeline == "quantize"
    assert "2.00 x faster" in str(report)
    with pytest.raises(ArtifactError, match=r"holds no records\.jsonl"):
        stored_reports(tmp_path / "none")


def test_a_line_is_json(tmp_path):
    Store(tmp_path).add("loss", "key", 'a "quoted"\nname', loss=1.0)
    lines = [line for line in (tmp_path / FILE).read_text().split("\n") if line]
    assert [json.loads(line)["name"] for line in lines] == ['a "quoted"\nname']


@pytest.mark.parametrize("read", [False, True])
def test_a_pipe_in_place_of_the_records_is_refused(tmp_path, read):
    """Opening a pipe that nobody reads would wait forever; one that somebody reads takes the records away."""
    store = Store(tmp_path)
    os.mkfifo(tmp_path / FILE)
    reader = os.open(tmp_path / FILE, os.O_RDONLY | os.O_NONBLOCK) if read else None
    with pytest.raises(ArtifactError, match=r"records\.jsonl' cannot be written: .*; choose another directory"):
        store.add("loss", "key", "name", loss=0.25)
    if reader is not None:
        os.close(reader)
