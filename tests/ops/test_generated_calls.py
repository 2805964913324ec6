"""A slice of the generated calls of the kernels; `python -m tools.sanitize` runs thousands under sanitizers."""

import subprocess
import sys

import pytest

from lissom.ops.native import load_kernels

MISSING = load_kernels()
CALLS = 400


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_calls_equal_the_reference_or_are_refused():
    command = [sys.executable, "-m", "tests.ops.generated_calls", "--calls", str(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # A process that is ended by a signal has named its last call there.
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout == f"{CALLS} calls, 0 faults\n"
