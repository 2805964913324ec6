"""Server processes for load tests: started on a free port, waited for, measured, and ended."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

HOST = "127.0.0.1"


def free_port() -> int:
    """A port that no process listens on."""
    with closing(socket.socket()) as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


@contextmanager
def served(
    command: Sequence[str], port: int, log: IO[str] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[int]:
    """A process that listens on the port; gives its process id. log: file for its output.

    Raises: SystemExit if it ends before it listens.
    """
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while process.poll() is None:
            try:
                socket.create_connection((HOST, port)).close()
                break
            except OSError:
                time.sleep(0.1)
        if process.poll() is not None:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def resident_mb(process: int, name: str) -> float:
    """A field of /proc/PID/status in MB: VmRSS, or VmHWM for the peak."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1]) * 1024 / 1e6
