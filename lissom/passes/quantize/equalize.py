"""Equalize the ranges of channels between consecutive linear layers, so that one per-tensor scale fits all of them.

Let the layers be W₂·f(W₁·x + b₁), where f is a view, ReLU, an attention as a function of its values, or a product with another
value, so that f(s·x) = s·f(x) for s > 0. Then the rows of W₁ and b₁ may be divided by s_j and the columns of W₂ multiplied by
it. With r₁_j the largest magnitude in the rows that compute channel j, and r₂_j that in the columns that read it,

    s_j = √(r₁_j · r₂_j) / r₂_j      so that both become √(r₁_j · r₂_j)

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, §4.1, equation 11.
https://arxiv.org/abs/1906.04721

Such layers are an attention's value and output projections, and `up` and `down` where ReLU or the product of a gated
feed-forward is in between. In chains of layers, all pairs are equalized repeatedly until the factors are close to 1. Outputs
stay equal: the pass comes before `quantize`, and helps per-tensor scales most. It needs no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Rewrite
from lissom.compiler.transforms.channel_scaling import ScalingSite, chosen_sites

_CLOSE = 1e-3
_ROUNDS = 20


@dataclass(frozen=True)
class Equalize(Rewrite):
    """Scales channels between two linear layers so that the weights of both have equal ranges.

    Attributes:
        skip: module paths of layers whose output channels are not scaled, with `*` and `?`: `"encoder.layer.0,*.11"`.
        only: module paths of layers whose output channels are scaled, in the same form.
    """

    skip: str = ""
    only: str = ""
    requires = (FLOATING_POINT_WEIGHTS,)

    def run(self, edit: Editor) -> None:
        sites = chosen_sites(edit, norms=False, linears=True, skip=self.skip, only=self.only)
        for _ in range(_ROUNDS):
            changes = [_equalize(edit, site) for site in sites]
            if max(changes, default=0.0) < _CLOSE:
                break


def _equalize(edit: Editor, site: ScalingSite) -> float:
    """Scale the channels of a site; returns the largest |log s_j|."""
    factors = balance(site.rows(edit.program), site.read_sizes(edit.program))
    change = float(factors.log().abs().max())
    if change >= _CLOSE:
        site.scale(edit, factors)
    return change


def balance(made: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """The divisor of each channel, [channels]; 1 where its rows or its columns are all zero."""
    return torch.where((made > 0) & (read > 0), (made / read).sqrt(), torch.ones_like(made))
