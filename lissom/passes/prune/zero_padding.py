"""Zero the outputs at padding positions, so that padding need not be computed.

    y[b, t] = 0 where mask[b, t] = 0

A model has outputs at every position, padding included, and no exact pass may change them. Most callers never read them: mean
pooling multiplies them with the mask, a loss ignores them. This pass states that padding outputs do not matter, which only the
caller can know; `pack-tokens` then skips padding. Later passes are measured against outputs with these zeros.

The mask is the input [batch, tokens] whose zeros hide keys from attention. It is found by evaluating the attention masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lissom.compiler.analysis.structure.padding import padding_masks
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.types import TensorType
from lissom.compiler.pipeline.pass_kinds import Approximation

aten = torch.ops.aten


@dataclass(frozen=True)
class ZeroPadding(Approximation):
    """Zeroes the outputs at padding positions."""

    redefines: ClassVar[bool] = True
    cheapens: ClassVar[bool] = False

    def run(self, edit: Editor) -> None:
        masks = edit.program.fact(padding_masks)
        padding: dict[fx.Node, fx.Node] = {}
        for output in edit.program.output.all_input_nodes:
            typed = nodes.node_type(output)
            shape = typed.shape[:2] if isinstance(typed, TensorType) and typed.dtype.is_floating_point else None
            fitting = [mask for mask in masks if nodes.tensor_type(mask).shape == shape]
            if len(fitting) > 1:
                edit.skip(output, "two inputs could be its padding mask")
            if len(fitting) != 1:
                continue
            (mask,) = fitting
            with edit.before(edit.program.output, like=[output]):
                if mask not in padding:
                    padding[mask] = edit.call(aten.eq.Scalar, mask, 0)
                hidden = padding[mask]
                for _ in range(nodes.tensor_type(output).rank - 2):
                    hidden = edit.call(aten.unsqueeze.default, hidden, -1)
                zeroed = edit.call(aten.masked_fill.Scalar, output, hidden, 0.0)
            edit.program.output.replace_input_with(output, zeroed)
            edit.rewritten += 1
