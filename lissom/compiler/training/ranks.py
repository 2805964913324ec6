"""The ranks that train one program together, each on its rows of every batch: sums over them, and how one ends all.

A loss is a sum over rows or real tokens, divided by their number. Under `data_parallel` each rank computes the sum of its own
rows and divides by the number of all ranks, so that the losses of the ranks add up to the loss of the whole batch, and their
gradients to its gradient. Li et al. 2020, PyTorch Distributed, §3, averages gradients instead, which is the same for equal
numbers of rows only. https://arxiv.org/abs/2006.15704
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lissom.errors import RankError

Count = TypeVar("Count", int, torch.Tensor)

_BUCKET_BYTES = 25 << 20
"""Gradients are summed in buckets of this size, as `DistributedDataParallel` does."""


class Ranks:
    """The ranks of one run; a single one without a process group, for which every sum is the value itself.

    Attributes:
        rank: this rank.
        world_size: the number of ranks.
        fraction: of the rows of the current batch that this rank has; 0 where the batch has fewer rows than there are ranks,
            and this rank runs on a row that does not count.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
        self.fraction = 1.0
        self._group, self._device = group, device or torch.device("cpu")

    @contextmanager
    def answering(self) -> Generator[None]:
        """Convert torch's errors about ranks that do not respond. Raises RankError."""
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                "a rank that trains with this one ended or did not answer; see what the other ranks say, and start all of "
                "them again"
            ) from error

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same on each; the values are overwritten."""
        if self.world_size > 1:
            with self.answering():
                dist.all_reduce(values, group=self._group)
        return values

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over the ranks."""
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self._device)).tolist()

    def add_gradients(self, items: Sequence[nn.Parameter], present: Sequence[bool]) -> None:
        """Give every rank the sum of all ranks' gradients.

        Args:
            present: which parameters have a gradient on any rank.
        """
        if self.world_size == 1:
            return
        bucket, size = list[torch.Tensor](), 0
        for parameter in [parameter for parameter, has in zip(items, present, strict=True) if has]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (size + parameter.grad.nbytes > _BUCKET_BYTES or parameter.grad.dtype != bucket[0].dtype):
                self._sum_bucket(bucket)
                bucket, size = [], 0
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, tensors: Sequence[torch.Tensor]) -> None:
        whole = self.sum(torch.cat([gradient.reshape(-1) for gradient in tensors]))
        for gradient, part in zip(tensors, whole.split([gradient.numel() for gradient in tensors]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The tensor of rank `source`, in place; its device may be another than that of the group."""
        if self.world_size > 1:
            moved = tensor.to(self._device)
            with self.answering():
                dist.broadcast(moved, source, group=self._group)
            tensor.copy_(moved)
        return tensor

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of rank `source`."""
        length = int(self.broadcast(torch.tensor([len(data)]), source))
        buffer = torch.frombuffer(bytearray(data.ljust(length, b"\0")[:length] or b"\0"), dtype=torch.uint8)
        return self.broadcast(buffer, source).numpy().tobytes()[:length]

    def settle(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one, on all ranks; None when none has."""
        failed = self.sums([float(problem is not None and rank == self.rank) for rank in range(self.world_size)])
        if not any(failed):
            return None
        return self.broadcast_bytes((problem or "").encode(), next(rank for rank, has in enumerate(failed) if has)).decode()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuse ranks that train something else.

        Args:
            facts: texts by name.

        Raises:
            RankError: on all ranks, when a fact of one differs from that of rank 0.
        """
        mine = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") for text in facts.values()]
        first = self.broadcast(torch.tensor(mine)).tolist()
        differ = self.sums([float(own != other) for own, other in zip(mine, first, strict=True)])
        for name, count in zip(facts, differ, strict=True):
            if count:
                raise RankError(
                    f"{count:.0f} of {self.world_size} ranks do not have the same {name} as rank 0; call Lissom alike on all "
                    f"ranks, with the same seed and number of threads"
                )

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, [rows, features], without gradients."""
        rows = rows.detach()
        if self.world_size == 1:
            return rows
        counts = [0.0] * self.world_size
        counts[self.rank] = float(len(rows)) if self.fraction else 0.0
        lengths = [int(count) for count in self.sums(counts)]
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: lengths[self.rank]] = rows[: lengths[self.rank]]
        parts = [torch.empty_like(padded) for _ in lengths]
        with self.answering():
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def gather_shards(self, shard: torch.Tensor) -> torch.Tensor:
        """The equal shards of all ranks one after the other: [elements] becomes [world_size · elements]."""
        whole = shard.new_empty(self.world_size * shard.numel())
        with self.answering():
            dist.all_gather(list(whole.split(shard.numel())), shard.detach().contiguous(), group=self._group)
        return whole

    def scatter_sum(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the sum over the ranks: the inverse of `gather_shards`."""
        shard = whole.new_empty(whole.numel() // self.world_size)
        with self.answering():
            dist.reduce_scatter(shard, list(whole.contiguous().split(shard.numel())), group=self._group)
        return shard


_CURRENT: ContextVar[Ranks | None] = ContextVar("ranks", default=None)
_ONE_PROCESS: ContextVar[bool] = ContextVar("one_process", default=False)
_KNOWN: list[tuple[object, Any]] = []
"""The group of the default process group, made once: ranks would not leave it at the same time."""


@contextmanager
def one_process() -> Generator[None]:
    """Train in this process alone, while the other ranks of the process group do something else."""
    token = _ONE_PROCESS.set(True)
    try:
        yield
    finally:
        _ONE_PROCESS.reset(token)


@contextmanager
def data_parallel(device: torch.device) -> Generator[Ranks]:
    """The ranks of a run on weights of a device: all of the default process group, or this process alone.

    An error on this rank closes the connections, so that the others do not wait for it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or _ONE_PROCESS.get():
        yield Ranks()
        return
    world = dist.group.WORLD
    if not any(known is world for known, _ in _KNOWN):
        with Ranks().answering():
            _KNOWN[:] = [(world, dist.new_group(backend="nccl" if device.type == "cuda" else "gloo"))]
    token = _CURRENT.set(ranks := Ranks(_KNOWN[0][1], device))
    try:
        yield ranks
    except BaseException:
        del ranks
        _KNOWN.pop()[1].abort()
        raise
    finally:
        _CURRENT.reset(token)


def total(count: Count) -> Count:
    """The sum over the ranks of a number of this rank's rows, tokens or their values."""
    ranks = _CURRENT.get()
    if ranks is None:
        return count
    counted = float(ranks.fraction > 0)
    if isinstance(count, torch.Tensor):
        return ranks.sum(count.detach() * counted)
    return round(ranks.sums([counted * count])[0])


def mean(values: torch.Tensor) -> torch.Tensor:
    """This rank's part of the mean over the elements of all ranks, []; the parts add up to the mean."""
    return values.sum() / total(values.numel())


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, without gradients: [rows, features]."""
    ranks = _CURRENT.get()
    return rows.detach() if ranks is None else ranks.gather(rows)


def part_of_mean(mean_of_rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of a mean over the rows of the whole batch, given the mean over its own rows."""
    ranks = _CURRENT.get()
    return mean_of_rows if ranks is None else mean_of_rows * ranks.fraction
