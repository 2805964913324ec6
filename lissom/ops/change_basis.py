"""`lissom::change_basis`: the features of every token in another basis, x B, with one basis for all heads or one per key head.

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
    if basis.dim() == 2:
        return torch.matmul(x, basis)
    batch, heads, tokens, features = x.shape
    # The query heads that share a key head are rows of one product.
    grouped = x.reshape(batch, basis.shape[0], heads // basis.shape[0] * tokens, features)
    return torch.matmul(grouped, basis).reshape(batch, heads, tokens, basis.shape[-1])


def _fake(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], basis.shape[-1])


def _remember(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Differentiates the reference, which is cheaper to compute again than to save."""
    inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
    with torch.enable_grad():
        output = change_basis_reference(*inputs)
    return torch.autograd.grad(output, inputs, gradient)


change_basis = define(
    "change_basis(Tensor x, Tensor basis) -> Tensor",
    change_basis_reference,
    _fake,
    dimensions=Dimensions(
        "... k, k n -> ... n : ... n k | b (g r) t k, g k n -> b (g r) t n : b (g r) t n k", factors=("x", "basis")
    ),
    backward=_backward,
    setup_context=_remember,
)
"""The operator. x: [..., features]; basis: [features, new features]. Or x: [batch, heads, tokens, features] and basis:
[key_heads, features, new features], with heads a multiple of key_heads. Returns [..., new features]. Differentiable; any
device."""
