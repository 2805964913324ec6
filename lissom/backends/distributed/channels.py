"""How values get from rank to rank: over a process group, or through memory that the processes of one machine share.

Over gloo a sum behind a layer takes about a millisecond on one machine, whatever its size, since each rank waits to be woken
up. Through shared memory ranks look whether the others are there, and add up what these wrote: some microseconds.
"""

from __future__ import annotations

import mmap
import os
import select
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

SLOT_BYTES = 1 << 20
"""What a rank writes at once; longer values go in parts, which stay in the processor's caches."""
_LINE = 64
"""Bytes of a line of the cache: what ranks tell each other is on lines of their own."""
_LOOK_SECONDS = 0.05
"""How often a rank that waits looks whether the others are still alive."""


class Channel(Protocol):
    """Collectives on contiguous tensors, called by all ranks in the same order. Raise RuntimeError when one is gone."""

    def reduce(self, x: torch.Tensor, operation: str) -> None:
        """Replace the values by their sum or maximum over the ranks. operation: `sum` or `max`."""
        ...

    def gather(self, found: torch.Tensor, x: torch.Tensor) -> None:
        """Write what the ranks have, one behind another along the first dimension, into `found`."""
        ...

    def scatter(self, found: torch.Tensor, x: torch.Tensor, operation: str) -> None:
        """Write this rank's part, along the first dimension, of the sum or maximum of `x` over the ranks into `found`."""
        ...

    def end(self) -> None:
        """Let the ranks that wait for this one give up. It is not called again."""
        ...


class GroupChannel:
    """A process group, over gloo or NCCL."""

    def __init__(self, group: Any) -> None:
        self._group: Any = group
        operations: dict[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        self._reduce = {name: dist.AllreduceOptions() for name in operations}
        self._scatter = {name: dist.ReduceScatterOptions() for name in operations}
        for name, operation in operations.items():
            self._reduce[name].reduceOp = self._scatter[name].reduceOp = operation

    def reduce(self, x: torch.Tensor, operation: str) -> None:
        self._group.allreduce([x], self._reduce[operation]).wait()

    def gather(self, found: torch.Tensor, x: torch.Tensor) -> None:
        self._group._allgather_base(found, x).wait()

    def scatter(self, found: torch.Tensor, x: torch.Tensor, operation: str) -> None:
        self._group._reduce_scatter_base(found, x, self._scatter[operation]).wait()

    def end(self) -> None:
        group, self._group = self._group, None
        end_group(group)


def end_group(group: Any) -> None:
    """End a process group on this rank. The caller keeps no reference to it.

    Gloo closes its connections, which the other ranks notice, when the last reference is gone.
    """
    group.abort()
    if group.name() == "gloo":
        dist.destroy_process_group(group)


class SharedMemory:
    """Memory that the processes of one machine share: each writes what it has, and adds up what all wrote, in their order.

    Every rank has two slots, which it fills in turn: who meets the others at a step has read what they wrote two steps before.

    rank, world_size: this process's number, and how many there are. processes: their numbers in the system, by rank.
    timeout_seconds: how long one may not answer.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world_size: int, processes: Sequence[int], timeout_seconds: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_seconds = timeout_seconds
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        head = (world_size + 1) * _LINE
        told = whole[:head].view(torch.int64).view(world_size + 1, -1)
        self._told, self._ended = told[:world_size], told[world_size]
        self._slots = whole[_head_bytes(world_size) :].view(2, world_size, SLOT_BYTES)
        self._step = 0
        self._barrier: Callable[..., bool] = torch.ops.lissom.barrier.default
        self._alive = select.poll()
        handles: list[int] = []
        weakref.finalize(self, _close, handles)
        for other in (number for index, number in enumerate(processes) if index != rank):
            # It can be read once the process has ended, one that nobody has waited for too.
            handles.append(os.pidfd_open(other))
            self._alive.register(handles[-1], select.POLLIN)

    def reduce(self, x: torch.Tensor, operation: str) -> None:
        flat = x.view(-1)
        for part in flat.split(SLOT_BYTES // x.element_size()):
            combine(self._exchange(part), operation, part)

    def gather(self, found: torch.Tensor, x: torch.Tensor) -> None:
        step = SLOT_BYTES // x.element_size()
        rows = found.view(self.world_size, x.numel())
        for part, into in zip(x.view(-1).split(step), rows.split(step, 1), strict=True):
            into.copy_(self._exchange(part))

    def scatter(self, found: torch.Tensor, x: torch.Tensor, operation: str) -> None:
        step = SLOT_BYTES // x.element_size() // self.world_size
        rows = x.view(self.world_size, found.numel())
        for part, into in zip(rows.split(step, 1), found.view(-1).split(step), strict=True):
            combine(self._exchange(part).view(self.world_size, *part.shape)[:, self.rank], operation, into)

    def end(self) -> None:
        self._ended.fill_(1)

    def _exchange(self, part: torch.Tensor) -> torch.Tensor:
        """What every rank wrote, [ranks, values], until the step behind the next. Raises: RuntimeError when one is gone."""
        self._step += 1
        slots = self._slots[self._step % 2].view(part.dtype)[:, : part.numel()]
        slots[self.rank].view(part.shape).copy_(part)
        if not self._barrier(self._told, self.rank, self._step, _LOOK_SECONDS):
            self._wait()
        return slots

    def _wait(self) -> None:
        until = time.monotonic() + self.timeout_seconds
        while not self._barrier(self._told, self.rank, self._step, _LOOK_SECONDS):
            if self._ended[0] or self._alive.poll(0) or time.monotonic() > until:
                raise RuntimeError("a rank of this machine ended or does not answer")


def combine(slots: torch.Tensor, operation: str, into: torch.Tensor) -> None:
    """Write the sum or the maximum along the first dimension."""
    if operation == "sum" and len(slots) == 2:
        torch.add(slots[0], slots[1], out=into)  # twice as fast as a reduction
    elif operation == "sum":
        torch.sum(slots, 0, dtype=into.dtype, out=into)
    else:
        torch.amax(slots, 0, out=into)


def machine() -> str:
    """What tells processes that see each other from those that do not: the boot of the machine, and what numbers processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


@contextmanager
def create(world_size: int) -> Generator[Path]:
    """New shared memory for so many ranks, and the path by which other processes of this user open it within the block.

    It has no name in any folder, so the system frees it when the last process that maps it ends, however it ends.

    Raises: OSError when there is no room.
    """
    descriptor = os.memfd_create("lissom")
    try:
        os.posix_fallocate(descriptor, 0, _head_bytes(world_size) + 2 * world_size * SLOT_BYTES)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def attach(path: Path) -> mmap.mmap:
    """The memory at a path that `create` gave. Raises: OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _close(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)


def _head_bytes(world_size: int) -> int:
    """The bytes in front of the slots, whole pages."""
    return -(-(world_size + 1) * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE
