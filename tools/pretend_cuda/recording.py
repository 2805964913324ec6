"""CUDA graphs on a pretended device: operators are listed as they run, and run again into the same tensors."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils import _pytree as pytree

_CURRENT = threading.local()
_REFUSED = False


class Recording:
    """The operators of a graph, with the CPU tensors they read and wrote."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._new: list[torch.Tensor] = []

    def add(self, func: Any, args: Any, kwargs: Any, result: object) -> None:
        """List an operator that ran."""
        made, given = _tensors(result), {_place(tensor) for tensor in _tensors((args, kwargs))}
        self._calls.append((func, args, kwargs, made))
        self._new += [tensor for tensor in made if _place(tensor) not in given]

    def spoil(self) -> None:
        """Overwrite what the operators made: a graph that is recorded has not run yet."""
        for tensor in self._new:
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
                tensor.fill_(float("nan"))

    def replay(self) -> None:
        """Run the operators again, each into the tensors that it made."""
        with torch.inference_mode():
            for func, args, kwargs, made in self._calls:
                for tensor, value in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                    if _place(tensor) != _place(value):
                        tensor.copy_(value)


def recording() -> Recording | None:
    """What this thread records now."""
    return getattr(_CURRENT, "value", None)


def record(value: Recording | None) -> None:
    """Start a recording in this thread, or end it."""
    _CURRENT.value = value


def waiting_is_refused() -> bool:
    """True where `torch.cuda.set_sync_debug_mode("error")` was called."""
    return _REFUSED


def set_sync_debug_mode(mode: int | str) -> None:
    """As torch.cuda's; a warning is none here."""
    global _REFUSED
    _REFUSED = mode in ("error", 2)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
