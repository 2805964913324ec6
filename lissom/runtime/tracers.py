"""Checks that a call has values: under PyTorch's tracers and transforms a tensor may have no memory for kernels to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch._compile import _disable_dynamo

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import InputError

Result = TypeVar("Result")

# Bound once: every call of a compiled model checks them.
_is_tracing = torch._C._is_tracing
_count_modes = torch._C._len_torch_dispatch_stack
_address: Callable[[torch.Tensor], int] = torch._C._data_address  # pyright: ignore[reportAttributeAccessIssue]
_KINDS = torch._C._TorchDispatchModeKey
_MODES = {_KINDS.PROXY: "make_fx or torch.export", _KINDS.FUNCTIONAL: "torch.export", _KINDS.FAKE: "FakeTensorMode"}


def tracer() -> str | None:
    """The tracer of PyTorch that the call runs under; None for user modes such as FlopCounterMode, and outside of all."""
    if _is_tracing():
        return "torch.jit.trace"
    if not _count_modes():
        return None
    return next((name for kind, name in _MODES.items() if torch._C._get_dispatch_mode(kind) is not None), None)


def has_memory(tensor: torch.Tensor) -> bool:
    """False for a tensor of a transform, a fake one, one of zeros that are not stored, and one whose storage was freed."""
    try:
        return _address(tensor) != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def refuse_tracer(name: str) -> None:
    """Refuse a call under a tracer.

    Args:
        name: of the program.

    Raises:
        InputError: if there is one.
    """
    active = tracer()
    if active is not None:
        raise InputError(
            f"{name} is compiled and cannot run under {active}, because its kernels cannot be traced; "
            f"use the model it was compiled from there"
        )


def with_memory(program: Program, tensors: Sample) -> Sample:
    """The flat inputs, with memory for zeros that PyTorch does not store.

    Raises:
        InputError: under a tracer, and for any other tensor without memory.
    """
    refuse_tracer(program.name)
    materialized = [torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor for tensor in tensors]
    for leaf, tensor in zip(program.signature.tensors, materialized, strict=True):
        if not has_memory(tensor):
            raise InputError(
                f"argument '{leaf.path}' is a tensor without memory, as under torch.vmap and torch.func.grad, or after its "
                f"storage was freed; pass a tensor with memory, or use the model that {program.name} was compiled from"
            )
    return materialized


@_disable_dynamo
def untraced(function: Callable[..., Result], args: Sequence[object], kwargs: Mapping[str, object]) -> Result:
    """Call a function from code that Dynamo traces: its graph breaks there, and the function runs as it is."""
    return function(*args, **kwargs)
