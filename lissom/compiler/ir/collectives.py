"""Collectives in a program, and their stand-ins in a single process.

The operators are `torch.distributed`'s functional ones. Without a process group, and always in a pipeline, one rank's program
runs with stand-ins: an all-reduce returns the rank's own part, an all-gather returns copies of it. The program can then be
checked and lowered in one process. Its numbers are meaningless, but an exact pass does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

target = torch.ops._c10d_functional

GROUP = "0"
"""The name torch gives the group of all processes."""
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, WAIT = (
    target.all_reduce.default,
    target.all_gather_into_tensor.default,
    target.reduce_scatter_tensor.default,
    target.wait_tensor.default,
)
COLLECTIVES: tuple[torch._ops.OpOverload, ...] = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)
"""The operators that communicate."""


def _stand_in(target: object, x: torch.Tensor, *options: Any) -> torch.Tensor:
    """The result of a collective for a rank that runs alone: of an all-reduce its own part, of an all-gather copies of it."""
    if target is ALL_GATHER:
        return torch.cat([x] * options[0])
    if target is REDUCE_SCATTER:
        return x.narrow(0, 0, x.shape[0] // options[1]).clone()
    return x if target is WAIT else x.clone()


STAND_INS: Mapping[object, Callable[..., object]] = {target: partial(_stand_in, target) for target in (*COLLECTIVES, WAIT)}
"""The functions called in place of collectives when there is no process group."""

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Generator[None]:
    """Run stand-ins even when there is a process group: a rank that compiles must not wait for the others."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def stand_in(target: object) -> Callable[..., object] | None:
    """The stand-in for a target; None when the target itself is called."""
    if target not in STAND_INS or (torch.distributed.is_initialized() and not _ALONE.get()):
        return None
    return STAND_INS[target]
