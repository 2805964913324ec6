"""AWQ: scale salient channels before weights are quantized, by the factors that minimize the output error.

The quantization error of a weight counts more where it multiplies a large activation. With a factor s_j for each channel j,

    W·x ≈ Q(W diag(s)) · (diag(s)⁻¹ x),   s_j = mean|X_j|^β / √(max · min of these)

and β the one of 20 values from 0 to 0.95 for which the error Σ ‖Q(W diag(s)) diag(s)⁻¹ X - W·X‖² of all layers that read the
channels is least; β = 0 leaves them as they are. Q: quantization by `quantize` with the same options. Lin et al. 2023, AWQ:
Activation-aware Weight Quantization for LLM Compression and Acceleration, equations 4 and 5.
https://arxiv.org/abs/2306.00978

diag(s)⁻¹ is folded into the producer of the channels, a norm or the preceding linear layer, as in `smooth-quant`. The program
computes the same function: the pass comes before `quantize`, and `gptq` may follow that. The clipping that the paper searches
for is `quantize{weight_observer=mse}`.

The error is computed from the sum of x·xᵀ over the tokens of the calibration data, without padding. The experts of a mixture
share the factors of the norm that they read, and X is the tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.calibration.layer_sweep import moments_of, sweep
from lissom.compiler.calibration.observers import WeightObserver, weight_scale
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Rewrite
from lissom.compiler.transforms.channel_scaling import ScalingSite, chosen_sites
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops import formats
from lissom.ops.formats import weight_format

STEPS = 20
_LEAST = 1e-4
Round = Callable[[torch.Tensor], torch.Tensor]
"""Quantizes and dequantizes a matrix, [features out, features in]."""


@dataclass(frozen=True)
class Awq(Rewrite):
    """Scales channels so that weight quantization costs the least error.

    Attributes:
        scheme: the scheme that `quantize` will use, `int4-weight` or `int8-weight`.
        granularity: per-tensor, per-channel or per-group scales; `auto` is the scheme's default.
        group: number of neighbouring weights per scale with granularity=group.
        symmetric: quantizes weights without a zero point; as in `quantize` by default.
        weight_observer: chooses the clipping range of weights, `min-max` or `mse`; `auto` is `mse` for int4.
        norms: scales the output channels of norms.
        linears: scales the output channels of linear layers.
        skip: module paths of norms and layers whose channels are not scaled, with `*` and `?`: `"encoder.layer.0,*.11"`.
        only: module paths of norms and layers whose channels are scaled, in the same form.
    """

    scheme: Literal["int4-weight", "int8-weight"] = "int4-weight"
    granularity: Literal["auto", "tensor", "channel", "group"] = "auto"
    group: int = 32
    symmetric: bool | None = None
    weight_observer: WeightObserver = "auto"
    norms: bool = True
    linears: bool = True
    skip: str = ""
    only: str = ""
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if self.group < 1:
            raise UnsupportedError(f"awq takes group= of 1 or more neighbours, not {self.group}")

    def run(self, edit: Editor) -> None:
        if not edit.data:
            raise RequirementError("awq needs calibration data: pass data=, or use equalize, which needs none")
        sites = chosen_sites(edit, norms=self.norms, linears=self.linears, skip=self.skip, only=self.only)
        read = _observed(edit, sites)
        for finished, site in enumerate(sites):
            edit.report("search", finished, len(sites))
            edit.current = site.producer
            factors = self._search(edit, site, read)
            if factors is not None:
                site.scale(edit, factors)

    def _search(
        self, edit: Editor, site: ScalingSite, read: Mapping[fx.Node, tuple[torch.Tensor, Moments]]
    ) -> torch.Tensor | None:
        """The factors of a site's channels; None where none beat factors of 1."""
        sizes = torch.stack([site.by_channel(reader, read[input_of(reader.layer)][0]) for reader in site.readers]).amax(0)

        def error(factors: torch.Tensor) -> float:
            total = 0.0
            for reader in site.readers:
                weight, gram = reader.matrix.read(edit.program).float(), read[input_of(reader.layer)][1].gram
                total += rounding_error(weight, site.columns(reader, factors), gram, self._quantized)
            return total

        return best_factors(sizes, error)

    def _quantized(self, weight: torch.Tensor) -> torch.Tensor:
        form = weight_format(self.scheme.removesuffix("-weight"), self.symmetric)
        *stack, rows, columns = weight.shape
        kind = self.granularity
        if kind == "auto":
            kind = "group" if self.scheme == "int4-weight" else "channel"
        groups = columns // self.group if kind == "group" and columns % self.group == 0 else 1
        shape = (*stack, 1 if kind == "tensor" else rows, groups)
        scale, zero_point = weight_scale(weight, shape, form, self.weight_observer)
        return formats.dequantize(formats.quantize(weight, scale, zero_point, form), scale, zero_point, torch.float32)


def _observed(edit: Editor, sites: list[ScalingSite]) -> dict[fx.Node, tuple[torch.Tensor, Moments]]:
    """mean|x_j| of each feature of the values that the sites' layers read, and their second moments."""
    layers = [reader.layer for site in sites for reader in site.readers]
    observed: dict[fx.Node, tuple[torch.Tensor, Moments]] = {}
    for finished, (layer, read) in enumerate(sweep(edit.program, edit.data, layers)):
        edit.report("observe", finished, len(layers))
        if input_of(layer) not in observed:
            moments = moments_of(read)
            sizes = torch.stack([rows.float().abs().sum(0) for rows in read]).sum(0) / max(moments.count, 1)
            observed[input_of(layer)] = sizes, moments
    return observed


def best_factors(sizes: torch.Tensor, error: Callable[[torch.Tensor], float]) -> torch.Tensor | None:
    """The factors sizes^β, normalized, with the least error; None where β = 0 is best.

    Args:
        sizes: mean|X_j|, [channels].
    """
    least, best = error(torch.ones_like(sizes)), None
    for step in range(1, STEPS):
        factors = sizes.clamp_min(_LEAST).pow(step / STEPS)
        factors = factors / (factors.max() * factors.min()).sqrt()
        loss = error(factors)
        if loss < least:
            least, best = loss, factors
    return best


def rounding_error(weight: torch.Tensor, factors: torch.Tensor, gram: torch.Tensor, rounded: Round) -> float:
    """Σ ‖(Q(W diag(s)) diag(s)⁻¹ - W) x‖² over the tokens.

    Args:
        weight: [..., features out, features in].
        gram: Σ x·xᵀ.
    """
    error = rounded(weight * factors) / factors - weight
    return float(((error @ gram) * error).sum())
