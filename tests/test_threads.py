"""Tests of lissom.threads, in processes of their own: OpenMP reads the environment once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
CODE = """
import json, os, time
import lissom
import torch

def threads():
    return len(os.listdir("/proc/self/task"))

def after_a_product():
    torch.ones(500, 500) @ torch.ones(500, 500)
    torch.ones(1 << 20).exp()
    return threads()

counts = [threads(), after_a_product()]
if MODEL:
    # A model of one layer, whose compilation uses threads too.
    lissom.compile(torch.nn.Linear(512, 512), torch.ones(512, 512))
else:
    from lissom.threads import release_threads
    release_threads()
until = time.monotonic() + 20
while threads() > counts[0] and time.monotonic() < until:
    time.sleep(0.01)
print(json.dumps([*counts, threads(), after_a_product(), os.environ.get("GOMP_SPINCOUNT")]))
"""


def run(*, model: bool = False, **environment: str) -> list[object]:
    """The number of threads at first, after a product, after they were released, and after a product; and what is set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    given = {**kept, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", **environment}
    code = CODE.replace("MODEL", str(model))
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=given)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("model", [False, True])
def test_threads_end_and_are_started_again(model: bool) -> None:
    before, used, released, again, _ = run(model=model)
    assert isinstance(used, int) and isinstance(before, int)
    assert used > before == released
    assert again == used


def test_threads_wait_for_a_short_time() -> None:
    assert run()[-1] == "10000"


def test_the_environment_is_heeded() -> None:
    assert run(GOMP_SPINCOUNT="7")[-1] == "7"
    assert run(OMP_WAIT_POLICY="PASSIVE")[-1] is None
