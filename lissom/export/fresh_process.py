"""Calls what was written in a process that knows nothing of the one that wrote it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from lissom.errors import UnsupportedError
from lissom.io.processes import python_environment


def run_fresh(library: str, what: str, command: Sequence[str], request: str = "", folder: Path | None = None) -> None:
    """Run a command without network.

    Args:
        library: that loads it there, for the error.
        what: was written, for the error.
        request: the process's standard input.
        folder: its current directory.

    Raises:
        UnsupportedError: with the last line of the process's errors, if it fails.
    """
    ended = subprocess.run(
        command,
        input=request,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=python_environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"),
        cwd=folder,
    )
    if ended.returncode:
        last = next((line.strip() for line in reversed(ended.stderr.splitlines()) if line.strip()), "no message")
        raise UnsupportedError(f"{library} does not run {what} in a fresh process, so it is not written: {last:.300}")
