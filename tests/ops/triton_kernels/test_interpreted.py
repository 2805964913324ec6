"""Triton kernels beside their references, in Triton's interpreter on CPU tensors.

Triton decides at its import whether to interpret, so each file of `interpreted` is run by a pytest of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install lissom[triton]")
FOLDER = Path(__file__).parent / "interpreted"
FILES = ("quantize_rows", "int8_product", "int4_product")


def interpret(name: str, cases: int) -> None:
    # NumPy warns where the interpreter computes with infinities and NaN.
    options = ["-q", "-n", "0", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, f"{FOLDER / name}.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CASES": str(cases), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_kernel_equals_its_reference(name: str) -> None:
    interpret(name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_kernel_equals_its_reference_in_many_calls(name: str) -> None:
    interpret(name, 500)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [2, 6])
def test_programs_equal_their_simulation(cases: int) -> None:
    interpret("programs", cases)


@pytest.mark.slow
def test_minilm_equals_its_simulation() -> None:
    interpret("minilm", 1)
