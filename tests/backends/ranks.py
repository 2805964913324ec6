"""What tests with real ranks share: processes of one group that each call a function, and what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

BEGIN = """
import os, signal, sys, time
from pathlib import Path
import torch
import lissom
from lissom.errors import LissomError
from tests.backends.ranks import small_llama, small_ids
rank = int(os.environ["RANK"])
folder = Path(sys.argv[1])
def join():
    torch.distributed.init_process_group("gloo")
def said(call):
    started = time.monotonic()
    try:
        call()
    except LissomError as error:
        print(type(error).__name__, error, flush=True)
    else:
        print("nothing", flush=True)
    return time.monotonic() - started
"""


@dataclass
class Ended:
    """What became of a rank: its status, None where it was still there, and what it printed."""

    status: int | None
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(
    script: str,
    folder: Path,
    world_size: int = 2,
    *,
    seconds: float = 120,
    leave: Sequence[int] = (),
    command: Sequence[str] = (),
) -> list[Ended]:
    """Run a script behind `BEGIN` in so many processes, or a command; `leave`: ranks that are not waited for, and killed."""
    port = free_port()
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    called = [*command] or ["-c", BEGIN + textwrap.dedent(script), str(folder)]
    processes: list[subprocess.Popen[str]] = []
    files = [(folder / f"out-{rank}", folder / f"err-{rank}") for rank in range(world_size)]
    for rank, (out, err) in enumerate(files):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with out.open("w") as stdout, err.open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *called], env=os.environ | shared | own, cwd=ROOT, stdout=stdout, stderr=stderr, text=True
                )
            )
    deadline = time.monotonic() + seconds
    waited = [process for rank, process in enumerate(processes) if rank not in leave]
    while time.monotonic() < deadline and any(process.poll() is None for process in waited):
        time.sleep(0.05)
    statuses = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return [Ended(status, out.read_text(), err.read_text()) for status, (out, err) in zip(statuses, files, strict=True)]


def printed(found: Sequence[Ended]) -> list[list[str]]:
    """The lines each rank printed; all ended well."""
    assert [item.status for item in found] == [0] * len(found), [item.err for item in found]
    return [item.out.splitlines() for item in found]


def small_llama():
    """A Llama of two layers with random weights, in evaluation mode."""
    from tests.passes.parallel.models import MODELS

    return MODELS["llama"]().model.eval()


def small_ids(tokens: int = 5):
    import torch

    return torch.randint(0, 61, (2, tokens), generator=torch.Generator().manual_seed(tokens))
