"""The layers that produce an attention's heads, and the layer that reads them, as rows and columns per head.

When only views lie between two of them, the attention depends only on their products, so heads can be changed together with the
layer that reads them: `head_products` makes them shorter, `head_factors` makes them equal.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.axes.columns import WeightUnits
from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import SHAPES
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import IndexCopy

aten = torch.ops.aten


@dataclass(frozen=True)
class HeadLayer:
    """The rows of a linear layer that produce heads, or the columns that read them.

    Attributes:
        weight: its indices by head.
        bias: the same, if there is one.
        layer: the linear layer.
    """

    layer: fx.Node
    weight: WeightUnits
    bias: WeightUnits | None

    def read(self, program: Program) -> torch.Tensor:
        """The rows, followed by their bias, in float64: [heads, features, inputs], or inputs + 1 with a bias."""
        rows = self.weight.read(program)
        extended = rows if self.bias is None else torch.cat([rows, self.bias.read(program)[..., None]], -1)
        return extended.double().cpu()

    def write(self, edit: Editor, rows: torch.Tensor) -> None:
        """Set the rows and the bias, in the form that `read` returns."""
        self.weight.write(edit, rows if self.bias is None else rows[..., :-1])
        if self.bias is not None:
            self.bias.write(edit, rows[..., -1])

    def moment(self, known: Mapping[fx.Node, Moments]) -> torch.Tensor:
        """The second moment of the layer's inputs, with a 1 for the bias; the identity when none is known."""
        inputs = nodes.fixed_size(self.weight.weight, 1 - self.weight.dim)
        if (moments := known.get(input_of(self.layer))) is None or len(moments.total) != inputs:
            return torch.eye(inputs + (self.bias is not None), dtype=torch.float64)
        count = max(moments.count, 1)
        gram, mean = moments.gram.double().cpu() / count, moments.total.double().cpu()[:, None] / count
        if self.bias is None:
            return gram
        return torch.cat([torch.cat([gram, mean], 1), torch.cat([mean.T, torch.ones(1, 1, dtype=torch.float64)], 1)])


def is_moved(value: object, start: fx.Node, *, kept: bool = False) -> bool:
    """True for a value that is `start`, or comes from it through views, casts and slices only.

    Args:
        kept: also for an item of several results, or a value that was written to state.
    """
    while value is not start:
        if nodes.is_call(value, *SHAPES) or (kept and nodes.is_call(value, operator.getitem)):
            value = value.all_input_nodes[0]
        elif kept and nodes.is_call(value, aten.index_copy.default):
            value = IndexCopy(value).source
        else:
            return False
    return True
