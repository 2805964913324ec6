"""`lissom::change_basis`: the features of every token in another basis, x B.

It is a matrix product, and no linear layer for analyses and passes: `quantize` leaves it in floating point, and the layer that
produces x stays the producer of the result. `rotate` puts it into programs.
"""

from __future__ import annotations

from typing import Any

import torch

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define


def change_basis_reference(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The reference implementation."""
    return torch.matmul(x, basis)


def _fake(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], basis.shape[1])


def _remember(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, basis = ctx.saved_tensors
    return gradient @ basis.mT, x.flatten(0, -2).mT @ gradient.flatten(0, -2)


change_basis = define(
    "change_basis(Tensor x, Tensor basis) -> Tensor",
    change_basis_reference,
    _fake,
    dimensions=Dimensions("... k, k n -> ... n : ... n k", factors=("x", "basis")),
    backward=_backward,
    setup_context=_remember,
)
"""The operator. x: [..., features]; basis: [features, features of the result]. Returns [..., features of the result].
Differentiable; any device."""
