"""Mutated ONNX files, a slice of what tools/fuzz_onnx.py does: each becomes a program, or is refused in a LissomError."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx2fx", reason="onnx2fx is not installed: pip install 'lissom[from-onnx]'")


@pytest.mark.multiprocess
@pytest.mark.parametrize("seed", [0, 3])
def test_a_mutated_file_is_refused_or_becomes_a_program(seed):
    command = [sys.executable, "-m", "tools.fuzz_onnx", "--count", "150", "--seed", str(seed)]
    found = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "150 cases, 0 faults" in found.stdout
