"""A search that is killed goes on where it was, and two may run at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lissom.tuning.store import FILE, Store

CODE = """
import sys
import torch, lissom
from tests.models import tiny_bert
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
def test_a_killed_search_keeps_what_it_found_and_goes_on(tmp_path):
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
