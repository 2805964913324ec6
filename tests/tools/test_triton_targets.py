"""Every Triton kernel compiles for each generation within its registers and shared memory, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install lissom[triton]")


@pytest.mark.parametrize("capability", all_but_slow([80, 90, 100, 120], 80, 100))
def test_kernels_keep_the_limits_of_a_target(capability: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.triton_targets", "--capability", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    *rows, told = done.stdout.splitlines()
    assert told == "no fault" and len(rows) == 11


def test_spills_and_too_much_shared_memory_are_faults() -> None:
    from tools.triton_targets import Compiled

    fits = Compiled("kernel", 120, registers=255, stack=0, shared=99 * 1024)
    assert fits.fault is None
    assert replace(fits, stack=8).fault == "kernel on sm_120 spills: 8 bytes of stack"
    assert replace(fits, shared=101377).fault == "kernel on sm_120 needs 101377 bytes of shared memory of 101376"
