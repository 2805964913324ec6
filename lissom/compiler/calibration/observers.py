"""Observers: from values to the clipping range of a quantized format.

For activations, from a histogram of 2,048 bins over all calibration data:

- `min-max`: the least and the largest value.
- `percentile`: the central fraction of all values, 0.9999 by default. McKinstry et al. 2018, Discovering Low-Precision
  Networks, §3.
- `mse`: both ends scaled by the factor α that minimizes Σ (x - fake_quantize(x))². Choukroun et al. 2019, Low-bit
  Quantization of Neural Networks for Efficient Inference, eq. 3.
- `entropy`: the α that minimizes D(P ‖ Q); P: the histogram, with clipped values added to the outermost bins, Q: P spread
  evenly over the bins that share a level. Migacz 2017, 8-bit Inference with TensorRT, slides 24 to 28.

For weights, per block: `min-max`, or `mse` for every block separately; `auto` is `mse` for 4-bit formats, where the search
matters because they have few levels, else `min-max`. With `mse` an int4 block whose largest value is positive has a negative
scale, so that this value gets the level -8, which has no counterpart above zero; GGUF's Q4_0 does the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import fx

from lissom.compiler.calibration.statistics import Progress, observe
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.ops import formats
from lissom.ops.formats import Format
from lissom.ops.native import load_kernels
from lissom.ops.quantization import best_scales, best_scales_reference

Observer = Literal["min-max", "percentile", "mse", "entropy"]
WeightObserver = Literal["auto", "min-max", "mse"]
BINS = 2048
_FACTORS = torch.linspace(1.0, 0.2, 81)
_WEIGHT_FACTORS = torch.linspace(1.0, 0.5, 26)
_AT_ONCE = 1 << 19
"""The number of weight elements whose ranges are searched at once without the kernel."""
_WIDEST = 1 << 15
"""The most elements of a block for the kernel, which holds several blocks in the cache."""


def observed_ranges(
    program: Program,
    data: Sequence[Sample],
    chosen: Collection[fx.Node],
    observer: Observer,
    form: Format,
    fraction: float = 0.9999,
    progress: Progress | None = None,
) -> dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]:
    """The range of each chosen node's values on the data's real tokens, each end of shape [].

    Args:
        fraction: for `percentile`.
    """
    ends: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}

    def widen(node: fx.Node, rows: torch.Tensor) -> None:
        if not rows.numel():
            return
        low, high = rows.float().aminmax()
        before = ends.get(node, (low, high))
        ends[node] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    observe(program, data, chosen, widen, progress)
    if observer == "min-max":
        return ends
    counts = {node: torch.zeros(BINS, dtype=torch.float64) for node in ends}

    def count(node: fx.Node, rows: torch.Tensor) -> None:
        if not rows.numel():
            return
        low, high = (float(end) for end in ends[node])
        counts[node] += torch.histc(rows.float(), BINS, low, high).double().cpu() if high > low else 0

    observe(program, data, chosen, count, progress)
    return {node: choose_range(counts[node], *ends[node], observer, form, fraction) for node in ends}


def choose_range(
    counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, observer: Observer, form: Format, fraction: float = 0.9999
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range for values with this histogram.

    Args:
        counts: [bins], evenly from low to high.
    """
    if observer == "min-max" or not float(counts.sum()) or not float(high - low) > 0:
        return low, high
    edges = torch.linspace(0, 1, len(counts) + 1) * (high - low).cpu() + low.cpu()
    centers = (edges[1:] + edges[:-1]) / 2
    if observer == "percentile":
        part = counts.cumsum(0) / counts.sum()
        first = int((part <= (1 - fraction) / 2).sum())
        last = int((part < (1 + fraction) / 2).sum())
        return edges[first].to(low), edges[last + 1].to(high)
    losses: list[float] = []
    for factor in _FACTORS:
        least, greatest = factor * low.cpu(), factor * high.cpu()
        held = _rounded(centers, *formats.scale_for(least, greatest, form), form)
        if observer == "mse":
            losses.append(float((counts * (held - centers).double().square()).sum()))
        else:
            losses.append(_divergence(counts, held, (centers >= least) & (centers <= greatest)))
    best = _FACTORS[int(torch.tensor(losses).argmin())]
    return best * low, best * high


def weight_scale(
    weight: torch.Tensor, shape: tuple[int, ...], form: Format, observer: WeightObserver
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of a weight, one per block.

    Args:
        shape: of the scale.
    """
    if observer == "auto":
        observer = "mse" if form.bits == 4 else "min-max"
    if observer == "min-max":
        return formats.scale_for(*formats.block_range(weight, shape), form)
    blocks, factors = formats.as_blocks(weight.detach(), shape), _WEIGHT_FACTORS.to(weight.device)
    load_kernels()
    if form.is_integer and blocks.shape[1] <= _WIDEST:
        scale, zero_point = best_scales(blocks, factors, format=form.name)
    else:
        # Piece by piece, so that the intermediate tensors stay in the CPU cache.
        pieces = blocks.split(max(1, _AT_ONCE // blocks.shape[1]))
        grids = [best_scales_reference(piece, factors, format=form.name) for piece in pieces]
        scale, zero_point = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return scale.view(shape), None if form.symmetric else zero_point.view(shape)


def _rounded(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, form: Format) -> torch.Tensor:
    return formats.dequantize(formats.quantize(values, scale, zero_point, form), scale, zero_point, torch.float32)


def _divergence(counts: torch.Tensor, held: torch.Tensor, inside: torch.Tensor) -> float:
    """D(P ‖ Q).

    Args:
        held: the quantized centers of the bins.
        inside: which centers are in the clipping range.
    """
    if not inside.any():
        # Values far from zero and close together are all outside a narrower range.
        return float("inf")
    wanted = torch.where(inside, counts, 0.0)
    first, last = inside.nonzero()[0], inside.nonzero()[-1]
    wanted[first] += counts[: int(first)].sum()
    wanted[last] += counts[int(last) + 1 :].sum()
    # Spread each level's mass over its non-empty bins.
    levels, level_of = held.unique(return_inverse=True)
    there = inside & (counts > 0)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level_of, torch.where(inside, counts, 0.0))
    bins = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level_of, there.double())
    spread = torch.where(there, (mass / bins.clamp_min(1))[level_of], 0.0)
    p, q = wanted / wanted.sum(), spread / spread.sum().clamp_min(1e-30)
    held_bins = p > 0
    return float((p[held_bins] * (p[held_bins] / q[held_bins].clamp_min(1e-12)).log()).sum())
