"""What tests with real ranks share: processes of one group that each call a function, and what they say."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]

BEGIN = """
import os, signal, sys, time
from pathlib import Path
import torch
import lissom
from lissom.errors import LissomError
from tests.support.ranks import small_llama, small_ids
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


# Ranks that run a script are forked from a process that has imported what each of them would take seconds to import, and has
# done nothing else; it starts with the first of them, and ends with the tests.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lissom.api", "lissom.artifacts.artifact", "transformers.models.llama.modeling_llama"])


def _run(code: str, folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Run a script as `python -c` does: in the main module, with an environment and output files of its own."""
    import torch

    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # A shell that starts something in the background has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["-c", folder]
    exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)


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
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes: list[subprocess.Popen[str] | ForkServerProcess] = []
    files = [(folder / f"out-{rank}", folder / f"err-{rank}") for rank in range(world_size)]
    for rank, (out, err) in enumerate(files):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment = os.environ | shared | own
        with out.open("w") as stdout, err.open("w") as stderr:
            if command:
                called = [sys.executable, *command]
                processes.append(subprocess.Popen(called, env=environment, cwd=ROOT, stdout=stdout, stderr=stderr, text=True))
            else:
                code = BEGIN + textwrap.dedent(script)
                forked = _FORKS.Process(target=_run, args=(code, str(folder), environment, str(out), str(err)))
                forked.start()
                processes.append(forked)
    deadline = time.monotonic() + seconds
    waited = [process for rank, process in enumerate(processes) if rank not in leave]
    while time.monotonic() < deadline and any(_status(process) is None for process in waited):
        time.sleep(0.05)
    statuses = [_status(process) for process in processes]
    for process in processes:
        if _status(process) is None:
            process.kill()
        process.wait() if isinstance(process, subprocess.Popen) else process.join()
    return [Ended(status, out.read_text(), err.read_text()) for status, (out, err) in zip(statuses, files, strict=True)]


def _status(process: subprocess.Popen[str] | ForkServerProcess) -> int | None:
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def printed(found: Sequence[Ended]) -> list[list[str]]:
    """The lines each rank printed; all ended well."""
    assert [item.status for item in found] == [0] * len(found), [item.err for item in found]
    return [item.out.splitlines() for item in found]


def small_llama():
    """A Llama of two layers with random weights, in evaluation mode."""
    from tests.support.sharding import MODELS

    return MODELS["llama"]().model.eval()


def small_ids(tokens: int = 5):
    import torch

    return torch.randint(0, 61, (2, tokens), generator=torch.Generator().manual_seed(tokens))
