"""Collectives between ranks: over a process group, or through shared memory of the processes of one machine.

An all-reduce over gloo takes about a millisecond on one machine, whatever its size, since each rank sleeps until it is woken
up. Through shared memory ranks poll a barrier and add up what the others wrote, in some microseconds.
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
from threading import Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist

SLOT_BYTES = 1 << 20
"""Bytes that a rank writes at a time; larger values are sent in parts, which stay in the processor's caches."""
_LINE = 64
"""Bytes of a cache line; the step counter of each rank is on a line of its own."""
_LOOK_SECONDS = 0.05
"""Seconds after which a waiting rank checks again that the others are alive."""
_END_SECONDS = 1.0
"""Seconds to wait for the end of a process group."""


class Channel(Protocol):
    """Collectives on contiguous tensors, called by all ranks in the same order. They raise RuntimeError when a rank is gone."""

    def reduce(self, x: torch.Tensor, operation: str) -> None:
        """All-reduce in place.

        Args:
            operation: `sum` or `max`.
        """
        ...

    def gather(self, output: torch.Tensor, x: torch.Tensor) -> None:
        """All-gather: write the parts of all ranks, concatenated along the first dimension, into `output`."""
        ...

    def scatter(self, output: torch.Tensor, x: torch.Tensor, operation: str) -> None:
        """Reduce-scatter: write this rank's part, along the first dimension, of the sum or maximum of `x` into `output`."""
        ...

    def end(self) -> None:
        """Make ranks that wait for this one stop waiting. The channel is not used again."""
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

    def gather(self, output: torch.Tensor, x: torch.Tensor) -> None:
        self._group._allgather_base(output, x).wait()

    def scatter(self, output: torch.Tensor, x: torch.Tensor, operation: str) -> None:
        self._group._reduce_scatter_base(output, x, self._scatter[operation]).wait()

    def end(self) -> None:
        held, self._group = [self._group], None
        end_group(held)


def end_group(held: list[Any]) -> None:
    """Destroy a process group on this rank.

    Gloo closes its connections, which the other ranks notice, with the last reference. That waits for collectives with a rank
    that hangs, so a thread does it.

    Args:
        held: the only reference to it, which is taken out.
    """
    thread = Thread(target=_destroy, args=(held,), daemon=True)
    thread.start()
    thread.join(_END_SECONDS)


def _destroy(held: list[Any]) -> None:
    group = held.pop()
    group.abort()
    if group.name() == "gloo":
        dist.destroy_process_group(group)


class SharedMemory:
    """Shared memory of the processes of one machine: each rank writes its values, and adds up those of all, in rank order.

    Every rank has two slots, which it fills alternately: a rank at the barrier of a step has read what the others wrote two
    steps before.

    Args:
        processes: process ids by rank.

    Attributes:
        rank: this rank.
        world_size: the number of ranks.
        timeout_seconds: how long a rank may not respond.
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
            # It becomes readable when the process ends, even as a zombie.
            handles.append(os.pidfd_open(other))
            self._alive.register(handles[-1], select.POLLIN)

    def reduce(self, x: torch.Tensor, operation: str) -> None:
        flat = x.view(-1)
        for part in flat.split(SLOT_BYTES // x.element_size()):
            combine(self._exchange(part), operation, part)

    def gather(self, output: torch.Tensor, x: torch.Tensor) -> None:
        step = SLOT_BYTES // x.element_size()
        rows = output.view(self.world_size, x.numel())
        for part, into in zip(x.view(-1).split(step), rows.split(step, 1), strict=True):
            into.copy_(self._exchange(part))

    def scatter(self, output: torch.Tensor, x: torch.Tensor, operation: str) -> None:
        step = SLOT_BYTES // x.element_size() // self.world_size
        rows = x.view(self.world_size, output.numel())
        for part, into in zip(rows.split(step, 1), output.view(-1).split(step), strict=True):
            combine(self._exchange(part).view(self.world_size, *part.shape)[:, self.rank], operation, into)

    def end(self) -> None:
        self._ended.fill_(1)

    def _exchange(self, part: torch.Tensor) -> torch.Tensor:
        """The values of all ranks, [ranks, values], valid until the step after the next. Raises RuntimeError."""
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
    """Identifies processes that can see each other: by the boot id of the machine and the process id namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


@contextmanager
def create(world_size: int) -> Generator[Path]:
    """New shared memory, and the path by which other processes of this user open it within the block.

    It has no name in a file system, so the system frees it when the last process that maps it ends.

    Raises:
        OSError: when there is no space.
    """
    descriptor = os.memfd_create("lissom")
    try:
        os.posix_fallocate(descriptor, 0, _head_bytes(world_size) + 2 * world_size * SLOT_BYTES)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def attach(path: Path) -> mmap.mmap:
    """Open the memory at a path that `create` returned. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _close(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)


def _head_bytes(world_size: int) -> int:
    """The bytes before the slots, in whole pages."""
    return -(-(world_size + 1) * _LINE // mmap.PAGESIZE) * mmap.PAGESIZE
