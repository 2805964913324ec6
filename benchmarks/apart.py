"""Runs a part of a benchmark in a process of its own, so that other parts do not affect its memory or settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


def run_apart(
    script: str, arguments: Sequence[str], given: object = None, environment: Mapping[str, str] | None = None
) -> object:
    """The last line a script prints, parsed as JSON.

    given: written to its standard input as JSON. environment: additional environment variables.

    Raises: RuntimeError with the last line of its error output if it fails.
    """
    command = [sys.executable, script, *arguments]
    settings = {**os.environ, **(environment or {})}
    ran = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False, env=settings)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(ran.stdout.splitlines()[-1])
