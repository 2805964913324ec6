"""A slice of the generated calls of the kernels; `python -m tools.sanitize` runs thousands under sanitizers."""

import os
import subprocess
import sys

import pytest

from lissom.ops.native import load_kernels

MISSING = load_kernels()
CALLS = 400


@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
def test_calls_equal_the_reference_or_are_refused():
    command = [sys.executable, "-m", "tests.ops.generated_calls", "--calls", str(CALLS)]
    # By AMX, PyTorch's products in bfloat16, which the references use, spread a NaN to the row beside it.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    # A process that is ended by a signal has named its last call there.
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout == f"{CALLS} calls, 0 faults\n"
