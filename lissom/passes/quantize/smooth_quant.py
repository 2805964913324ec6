"""Migrate the difficulty of quantization from activations to weights, channel by channel.

Some input channels of a layer are far larger than others and determine a per-token or per-tensor scale. With a factor s_j for
each channel j,

    W·x = (W diag(s)) · (diag(s)⁻¹ x),   s_j = max|X_j|^α / max|W_j|^(1 - α)

x / s is folded into the producer of x, and the columns of W are multiplied by s. Xiao et al. 2022, SmoothQuant: Accurate and
Efficient Post-Training Quantization for Large Language Models, equations 3 and 4. https://arxiv.org/abs/2211.10438

X: [tokens, features in], the layer's inputs on calibration data, without padding; max|W_j| is taken over all layers that read
the channel. The program computes the same function, so the pass comes before `quantize`.

The producer of x is a norm, as in the paper, or, beyond it, the preceding linear layer: the value projection for the output
projection, `up` for `down` where ReLU or the product of a gated feed-forward is in between. All readers of x have to be linear
layers. So BERT's norms are left alone: their output is also the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.calibration.statistics import NO_TOKENS, observe
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Rewrite
from lissom.compiler.transforms.channel_scaling import chosen_sites
from lissom.errors import RequirementError, UnsupportedError


@dataclass(frozen=True)
class SmoothQuant(Rewrite):
    """Scales activations and weights so that both quantize about equally well.

    Attributes:
        alpha: migration strength, 0 to 1: how much of the activations' range moves into the weights.
        norms: scales the output channels of norms.
        linears: scales the output channels of linear layers.
        skip: module paths of norms and layers whose channels are not scaled, with `*` and `?`: `"encoder.layer.0,*.11"`.
        only: module paths of norms and layers whose channels are scaled, in the same form.
    """

    alpha: float = 0.5
    norms: bool = True
    linears: bool = True
    skip: str = ""
    only: str = ""
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UnsupportedError(f"smooth-quant takes alpha= from 0 to 1, not {self.alpha:g}")

    def run(self, edit: Editor) -> None:
        if not edit.data:
            raise RequirementError("smooth-quant needs calibration data: pass data=, or use equalize, which needs none")
        sites = chosen_sites(edit, norms=self.norms, linears=self.linears, skip=self.skip, only=self.only)
        largest = largest_values(edit, {input_of(reader.layer) for site in sites for reader in site.readers})
        for site in sites:
            if any(input_of(reader.layer) not in largest for reader in site.readers):
                edit.skip(site.producer, NO_TOKENS)
                continue
            read = [site.by_channel(reader, largest[input_of(reader.layer)]) for reader in site.readers]
            site.scale(edit, smoothing(torch.stack(read).amax(0), site.read_sizes(edit.program), self.alpha))


def largest_values(edit: Editor, chosen: set[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """max|x_j| of each feature of these nodes' values on the calibration data."""
    largest: dict[fx.Node, torch.Tensor] = {}

    def widen(node: fx.Node, rows: torch.Tensor) -> None:
        if len(rows):
            sizes = rows.float().abs().amax(0)
            largest[node] = torch.maximum(largest[node], sizes) if node in largest else sizes

    observe(edit.program, edit.data, chosen, widen, partial(edit.report, "observe"))
    return largest


def smoothing(read: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """The factor of each channel, [channels]; 1 where either is zero.

    Args:
        read: max|X_j|.
        weights: max|W_j|.
    """
    factors = read.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((read > 0) & (weights > 0), factors, torch.ones_like(factors))
