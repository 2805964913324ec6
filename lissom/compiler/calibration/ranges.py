"""Ranges of weights, and of activations on calibration data.

They show values that overflow in a low-precision format, and values that become subnormal in it. Every element counts, also at
padding: a single infinity there becomes NaN when attention multiplies it with zero. Only a few numbers per node are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.calibration.statistics import Progress
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample


@dataclass(frozen=True)
class Range:
    """The range of the finite values of a tensor, or of a node on all samples.

    Attributes:
        low: min(0, least).
        high: max(0, greatest).
        norm: the greatest ‖x‖₂ along the last dimension.
        small: the fraction of the non-zero values below the smallest normal number of a format.
    """

    low: float
    high: float
    norm: float
    small: float

    @property
    def largest(self) -> float:
        return max(-self.low, self.high)


def range_of(tensor: torch.Tensor, dtype: torch.dtype) -> Range:
    """The range of one tensor.

    Args:
        dtype: the format for `small`.
    """
    return _range(_sums(tensor.detach(), dtype))


def measured_ranges(
    program: Program, data: Sequence[Sample], chosen: Collection[fx.Node], dtype: torch.dtype, progress: Progress | None = None
) -> dict[fx.Node, Range]:
    """The range of each chosen node's values over all samples; of all its tensors together when it has several."""
    sums: dict[fx.Node, torch.Tensor] = {}

    def add(node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point():
                return
            node_sums = _sums(value, dtype)
            sums[node] = _merge(sums[node], node_sums) if node in sums else node_sums
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(node, part)

    def look(node: fx.Node, value: object) -> None:
        if node in chosen:
            add(node, value)

    with torch.no_grad(), kept_state(program):
        for finished, sample in enumerate(data):
            for node, tensor in zip(program.placeholders, sample, strict=True):
                look(node, tensor)
            program.run(sample, look)
            if progress is not None:
                progress(finished + 1, len(data))
    return {node: _range(node_sums) for node, node_sums in sums.items()}


def _sums(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Least, greatest, greatest norm, count of non-zero values, and count of small ones among them: [5], float64."""
    if value.numel() == 0:
        return torch.zeros(5, dtype=torch.float64, device=value.device)
    finite = torch.where(value.isfinite(), value, 0)
    low, high = finite.aminmax()
    sizes = finite.abs()
    norm = torch.linalg.vector_norm(finite, dim=-1, dtype=torch.float64).max() if value.dim() else sizes
    used = (sizes > 0).sum()
    small = used - (sizes >= torch.finfo(dtype).tiny).sum()
    return torch.stack([number.double() for number in (low.clamp_max(0), high.clamp_min(0), norm, used, small)])


def _merge(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    ends = torch.stack([torch.minimum(left[0], right[0]), *torch.maximum(left[1:3], right[1:3])])
    return torch.cat([ends, left[3:] + right[3:]])


def _range(sums: torch.Tensor) -> Range:
    low, high, norm, used, small = sums.tolist()
    return Range(low, high, norm, small / max(used, 1))
