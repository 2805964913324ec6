"""Runs the tests marked `gpu` of one file, and prints how many passed and what failed as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree


def run_tests(file: str) -> dict[str, object]:
    """Counts, and name and first line of the error of each failure.

    Raises:
        RuntimeError: where pytest ends without a report, which a crash of the process does.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # One worker: a test that crashes it is reported, and the next has a process of its own, and of the GPU's memory.
        options = ["-m", "gpu", "-q", "-n1", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, file]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.exists():
            last = (ran.stdout + ran.stderr).strip().splitlines()[-1:]
            raise RuntimeError(f"pytest ended with {ran.returncode} and no report of {file}: {' '.join(last)}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failures, skipped = list[dict[str, str]](), list[str]()
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            message = (problem.get("message") or "no message").splitlines()[0]
            failures.append({"test": case.get("name", ""), "error": message[:300]})
        skipped += [skip.get("message", "") for skip in case.findall("skipped")]
    passed = len(cases) - len(failures) - len(skipped)
    return {"passed": passed, "failures": failures, "skipped": len(skipped), "why_skipped": sorted(set(skipped))}


if __name__ == "__main__":
    print(json.dumps(run_tests(sys.argv[1])))
