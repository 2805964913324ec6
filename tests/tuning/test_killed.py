"""A search that is killed goes on where it was, and two may run at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from random import Random

import numpy as np
import pytest

import lissom
from lissom.tuning.store import FILE, Store
from lissom.tuning.stored import stored_reports
from tests.support.models import tiny_bert
from tests.tuning.searches import batches

CODE = """
import sys
import torch, lissom
from tests.support.models import tiny_bert
from tests.tuning.searches import batches
case = tiny_bert()
options = {"max_drop": 0.2, "goal": "memory", "minutes": 0.4, "distill": False}
tuned = lissom.tune(case.model, case.inputs, data=batches(case), store=sys.argv[1], **options)
print(len(tuned.report.candidates), tuned.pipeline)
"""


def started(directory) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def records(directory, kind: str) -> set[str]:
    return {str(record["name"]) for record in Store(directory).all(kind)} if (directory / FILE).exists() else set()


@pytest.mark.multiprocess
def test_killed_search_keeps_what_it_found_and_goes_on(tmp_path):
    process = started(tmp_path)
    deadline = time.monotonic() + 300
    while len(records(tmp_path, "loss")) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {kind: records(tmp_path, kind) for kind in ("cost", "loss", "candidate")}
    assert len(before["loss"]) >= 3
    lines = len((tmp_path / FILE).read_bytes().split(b"\n"))
    output, _ = started(tmp_path).communicate(timeout=600)
    count, _, pipeline = output.strip().partition(" ")
    assert int(count) > len(before["candidate"]) and pipeline != "exact"
    after = (tmp_path / FILE).read_bytes().split(b"\n")[lines - 1 :]
    # What was measured before is not measured again.
    again = [
        name for name in before["loss"] if any(name.replace('"', '\\"').encode() in line for line in after if b'"loss"' in line)
    ]
    assert again == []


@pytest.mark.multiprocess
def test_two_searches_share_a_store(tmp_path):
    processes = [started(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert all(output.strip() for output in outputs)
    store = Store(tmp_path)
    assert store.skipped == 0
    assert store.all("candidate")


def saved_model(directory) -> list[str]:
    """The arguments of `lissom tune` for a tiny encoder and batches in files."""
    case = tiny_bert()
    case.model.save_pretrained(directory / "model")
    (directory / "data").mkdir()
    for index, batch in enumerate(batches(case)):
        np.savez(directory / "data" / f"{index}.npz", **{name: tensor.numpy() for name, tensor in batch.items()})
    return [str(directory / "model"), "--data", str(directory / "data")]


def lines(store) -> list[dict[str, object]]:
    """Every whole record of a store, with those of the same name."""
    path = store / FILE
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_twenty_kills_lose_only_measurements_at_work(tmp_path):
    store, random = tmp_path / "store", Random(0)
    command = [
        sys.executable, "-m", "lissom", "tune", *saved_model(tmp_path), "--goal", "memory", "--max-drop", "20%",
        "--minutes", "2", "--no-distill", "--store", str(store), "--save", str(tmp_path / "saved"),
    ]  # fmt: skip
    kills = 0
    while kills < 20:
        before = lines(store)
        wanted, deadline = len(before) + random.randrange(6), time.monotonic() + 120
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(lines(store)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2 * random.random())
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        kills += process.returncode != 0
        assert lines(store)[: len(before)] == before
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    measured = [record for record in lines(store) if record["kind"] != "run" and not record.get("failed")]
    names = [(record["kind"], record["key"], record["name"]) for record in measured]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    (report,) = stored_reports(store)
    candidates = [record["pipeline"] for record in measured if record["kind"] == "candidate"]
    assert candidates and len(measured) > 20
    assert set(candidates) == {item.pipeline for item in report.candidates[1:]}
    assert found.stdout.rstrip().replace("\n", "").endswith(report.chosen.pipeline)
    assert lissom.load(tmp_path / "saved").program.parameter_count > 0
