"""`lissom::grouped_product`: a grouped matrix product, as in a mixture of experts: rows sorted by group, one matrix per group.

result[i] = input[i] · weight[g]   for offs[g − 1] ≤ i < offs[g], and zeros for rows after the last group

Source: Gale et al. 2022 (MegaBlocks), §4. On CUDA devices of compute capability 9.0 and later bfloat16 is multiplied by
`torch.nn.functional.grouped_mm`, which reads `offs` on the device. The host reads it for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define

_CAPABILITY = (9, 0)
"""The first for which `grouped_mm` has a kernel: before, PyTorch multiplies group by group, and the host reads `offs`."""
_ALIGNED = 8
"""Sizes of a matrix in bfloat16 whose rows begin at multiples of 16 bytes are multiples of this."""


def grouped_product_reference(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """The reference implementation: one product per group that has rows."""
    _check(input, weight, offs)
    result = input.new_zeros(input.shape[0], weight.shape[2])
    for group, rows in groups_of(offs, input.shape[0]):
        torch.mm(input[rows], weight[group], out=result[rows])
    return result


def run_grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` where it has a kernel, with zeros for rows after the last group, which it leaves as they are."""
    if not _has_kernel(input, weight):
        return grouped_product_reference(input, weight, offs)
    _check(input, weight, offs)
    product = functional.grouped_mm(input, weight.contiguous(), offs=offs.to(torch.int32))
    return product.masked_fill_((torch.arange(len(input), device=input.device) >= offs[-1]).unsqueeze(1), 0)


def _has_kernel(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """True where `grouped_mm` multiplies without reading `offs` on the host."""
    if input.device.type != "cuda" or (input.dtype, weight.dtype) != (torch.bfloat16, torch.bfloat16):
        return False
    aligned = input.is_contiguous() and not any(size % _ALIGNED for size in weight.shape[1:])
    return aligned and 0 not in (*input.shape, *weight.shape) and torch.cuda.get_device_capability(input.device) >= _CAPABILITY


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
    run_grouped_product,
    _fake,
    dimensions=Dimensions("!rows k, !groups k n, !groups -> rows n : rows k n", factors=("input", "weight")),
    backward=_backward,
    setup_context=_remember,
)
"""The operator. input: [rows, k], sorted by group; weight: [groups, k, n]; offs: [groups], the end of each group's rows,
non-decreasing integers. Returns [rows, n]. Differentiable; any device, which it synchronizes to read `offs`, but for
`grouped_mm`: with that, ends that decrease or exceed the rows are not refused, and their results are undefined."""
