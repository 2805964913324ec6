"""Runs the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m tools.sanitize`.

It needs g++ with its sanitizers. The kernels are built with both and cached separately. Then the calls of
`tests/ops/generated_calls.py`, the tests of `tests/ops` and those of chains run with the sanitizers preloaded, and stop at the
first finding. `--isa` takes another instruction set than the best one here, such as `avx2`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/ops", "tests/backends/eager/test_chains.py")
SANITIZERS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def environment(isa: str | None, sanitized: bool) -> dict[str, str]:
    """The environment variables that make Lissom build and load these kernels."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"LISSOM_NATIVE_ISA": isa} if isa else {})
    if not sanitized:
        return variables
    compiler = os.environ.get("CXX", "g++").split()
    paths = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # PyTorch keeps what it allocates until the process ends, and refuses sizes that do not fit in memory itself.
    return {
        **variables,
        "LISSOM_CXXFLAGS": SANITIZERS,
        "LD_PRELOAD": " ".join(paths),
        "CXX": " ".join(["env", "-u", "LD_PRELOAD", *compiler]),  # a sanitized compiler takes ten times as long
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def main() -> int:
    """Run the generated calls, then the tests; returns the first exit status that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=5000, help="generated calls")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated calls")
    parser.add_argument("--isa", help="the instruction set; the best one here by default")
    parser.add_argument("--plain", action="store_true", help="build without the sanitizers")
    given = parser.parse_args()
    where = environment(given.isa, not given.plain)
    calls = ["tests.ops.generated_calls", "--calls", str(given.calls), "--seed", str(given.seed)]
    for arguments in (calls, [*calls, "--amx"], ["pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *TESTS]):
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=where, check=False)
        if done.returncode:
            return done.returncode if done.returncode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
