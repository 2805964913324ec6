"""`lissom::grouped_product`: a grouped matrix product, as in a mixture of experts: rows sorted by group, one matrix per group.

result[i] = input[i] · weight[g]   for offs[g − 1] ≤ i < offs[g], and zeros for rows after the last group

Source: Gale et al. 2022 (MegaBlocks), §4; PyTorch's `grouped_mm` is the same on CUDA, in bfloat16 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define


def grouped_product_reference(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """The reference implementation: one product per group that has rows."""
    _check(input, weight, offs)
    result = input.new_zeros(input.shape[0], weight.shape[2])
    for group, rows in groups_of(offs, input.shape[0]):
        torch.mm(input[rows], weight[group], out=result[rows])
    return result


def groups_of(offs: torch.Tensor, count: int, operator: str = "grouped_product") -> Iterator[tuple[int, slice]]:
    """The groups that have rows, with their slice of rows. Raises RuntimeError when `offs` decreases or exceeds `count`."""
    start = 0
    for group, end in enumerate(offs.tolist()):
        if not start <= end <= count:
            raise RuntimeError(f"lissom::{operator} has {count} rows, and group {group} is from row {start} to {end}")
        if end > start:
            yield group, slice(start, end)
        start = end


def _check(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> None:
    """Raise RuntimeError unless the shapes of the operands fit."""
    if input.dim() != 2 or weight.dim() != 3 or offs.dim() != 1 or input.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"lissom::grouped_product takes input [rows, k], weight [groups, k, n] and offs [groups], "
            f"not {list(input.shape)}, {list(weight.shape)} and {list(offs.shape)}"
        )


def _fake(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    _check(input, weight, offs)
    return input.new_empty(input.shape[0], weight.shape[2])


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    input, weight, offs = ctx.saved_tensors
    of_weight = torch.zeros_like(weight)
    for group, rows in groups_of(offs, input.shape[0]):
        of_weight[group] = input[rows].T @ gradient[rows]
    return grouped_product(gradient, weight.transpose(1, 2), offs), of_weight, None


grouped_product = define(
    "grouped_product(Tensor input, Tensor weight, Tensor offs) -> Tensor",
    grouped_product_reference,
    _fake,
    dimensions=Dimensions("!rows k, !groups k n, !groups -> rows n : rows k n", factors=("input", "weight")),
    backward=_backward,
    setup_context=_remember,
)
"""The operator. input: [rows, k], sorted by group; weight: [groups, k, n]; offs: [groups], the end of each group's rows,
non-decreasing integers. Returns [rows, n]. Differentiable; any device, which it synchronizes to read `offs`."""
