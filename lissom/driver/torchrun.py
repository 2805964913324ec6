"""The command line under torchrun, which starts it once per rank: process group, output, random seed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lissom.artifacts.directory import is_artifact
from lissom.artifacts.manifest import NAME, read_manifest
from lissom.backends.distributed.backend import Distributed
from lissom.errors import UnsupportedError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables torchrun sets."""


def under_torchrun() -> bool:
    """True in a process that torchrun started."""
    return all(name in os.environ for name in _VARIABLES)


def refuse_torchrun(what: str) -> None:
    """Refuse a command that runs in one process. Raises UnsupportedError under torchrun."""
    if under_torchrun():
        raise UnsupportedError(f"`lissom {what}` runs in one process; run it without torchrun")


@dataclass(frozen=True)
class RankProcess:
    """This process as one rank.

    Attributes:
        speaks: it prints and writes files.
        device: of its shard; None for the saved device.
    """

    speaks: bool = True
    device: str | None = None

    def seed(self, own: int) -> int:
        """Rank 0's seed, so that all ranks draw the same random numbers."""
        store = _STORES[-1] if _STORES else None
        if store is None:
            return own
        if self.speaks:
            store.set("lissom/seed", str(own))
        return int(store.get("lissom/seed"))


_STORES: list[Any] = []


@contextmanager
def one_of_ranks(artifact: Path | None, device: str | None) -> Generator[RankProcess]:
    """Join the process group that torchrun started, over gloo or NCCL on CUDA, until the block ends; without torchrun, none.

    Args:
        artifact: a directory with a program to run; None if the program is compiled here.
        device: the user's choice.

    Raises:
        UnsupportedError: if torchrun started a program for one process.
    """
    if not under_torchrun():
        yield RankProcess(device=device)
        return
    on_cuda = (device or "").startswith("cuda")
    if artifact is not None and is_artifact(artifact):
        manifest = read_manifest(artifact / NAME)
        if manifest.backend != Distributed.name:
            raise UnsupportedError(f"'{artifact}' was compiled for backend '{manifest.backend}'; run it without torchrun")
        on_cuda = on_cuda or (device is None and manifest.device.startswith("cuda"))
    if on_cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UnsupportedError(
                f"rank {os.environ['RANK']} is process {local} of this machine, which has {torch.cuda.device_count()} CUDA "
                f"devices; start as many processes as there are devices, or choose --device cpu"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("nccl" if on_cuda else "gloo")
    _STORES.append(dist.distributed_c10d._get_default_store())
    yield RankProcess(dist.get_rank() == 0, device)
    # Not after an error: destroying a group whose ranks are gone would hang or fail.
    dist.destroy_process_group()


@contextmanager
def ending_at_once() -> Generator[None]:
    """End a process that torchrun started when the block ends, after its output is flushed.

    Gloo's threads abort a process that they outlive: they need the interpreter's lock to free a tensor, and it is gone.
    """
    try:
        yield
    except SystemExit as ended:
        if not under_torchrun() or ended.code not in (None, 0, 1, 2):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        if ended.code == 1:
            _wait_for_failing_ranks()
        os._exit(int(ended.code or 0))


_SAID = "lissom/said"
"""The key of the store under which failing ranks count themselves."""
_PATIENCE = 10.0
"""Seconds that rank 0 waits for the others to fail, which may be that much behind on a busy machine. Those that do not fail are
waiting for it."""


def may_speak() -> bool:
    """True in the process that reports an error: the first to get here, of those torchrun started."""
    if not _STORES:
        return os.environ.get("RANK", "0") == "0" or not under_torchrun()
    try:
        return _STORES[-1].add(_SAID, 1) == 1
    except RuntimeError:
        return True


def _wait_for_failing_ranks() -> None:
    """On rank 0, where it serves the store, so that ranks that fail later learn that the error has been said."""
    if not _STORES or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or os.environ["RANK"] != "0":
        return
    until = time.monotonic() + _PATIENCE
    while _STORES[-1].add(_SAID, 0) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < until:
        time.sleep(0.01)
