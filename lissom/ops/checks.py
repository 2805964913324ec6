"""Checks of operands, shared by references, fake kernels and C++ kernels.

They raise RuntimeError, as PyTorch's operators do. Symbolic sizes are refused only where they are known to differ, so a check
never adds a guard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_false


def require(holds: bool | torch.SymBool, message: str, *values: object) -> None:
    """Raise RuntimeError with the message, filled with the values, where the condition is known not to hold."""
    if holds is False or (holds is not True and statically_known_false(holds)):
        raise RuntimeError(message.format(*(list(value) if isinstance(value, torch.Size) else value for value in values)))


def check_sizes(tensor: torch.Tensor, sizes: Sequence[int], name: str) -> None:
    """Raise unless the tensor has these sizes."""
    message = f"{name} has the sizes {{}}, and must have {{}}"
    require(tensor.dim() == len(sizes), message, tensor.shape, list(sizes))
    for size, wanted in zip(tensor.shape, sizes, strict=True):
        require(size == wanted, message, tensor.shape, list(sizes))


def check_exact(tensor: torch.Tensor, sizes: Sequence[int], dtype: torch.dtype, name: str) -> None:
    """Raise unless the tensor is contiguous, of these sizes and this dtype."""
    check_sizes(tensor, sizes, name)
    require(tensor.dtype == dtype, name + " is of {}, and must be of {}", tensor.dtype, dtype)
    require(tensor.is_contiguous(), name + " has the strides {}, and must be contiguous", tensor.stride())


def check_floats(tensor: torch.Tensor | None, sizes: Sequence[int], name: str) -> None:
    """Raise unless the tensor, where there is one, is of a floating dtype and these sizes."""
    if tensor is not None:
        require(tensor.dtype.is_floating_point, name + " is of {}, and must be of a floating dtype", tensor.dtype)
        check_sizes(tensor, sizes, name)


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor, where there is one, in that dtype."""
    return None if tensor is None else tensor.to(dtype)


def check_broadcast(tensor: torch.Tensor, sizes: Sequence[int], name: str) -> None:
    """Raise unless the tensor broadcasts to these sizes."""
    message = name + " has the sizes {}, and must broadcast to {}"
    require(tensor.dim() <= len(sizes), message, tensor.shape, list(sizes))
    for size, whole in zip(reversed(tensor.shape), reversed(sizes), strict=False):
        if statically_known_false(size == 1):
            require(size == whole, message, tensor.shape, list(sizes))
