"""Split the merged projection of a gated feed-forward on a CPU into two, so that the gate is computed in their kernels.

    a, b = split(x [Wa; Wb]ᵀ);  act(a) · b   ->  act(x Waᵀ) · (x Wbᵀ)

ModernBERT, Phi-3, GLM-4 and others store both projections as one weight. Behind one product the activation and the product with
b read strided slices and write to memory: 5 % of the time of ModernBERT-base in int8, 8 texts of 128 tokens. Behind two,
`fuse-epilogues` computes both while the sums are in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from lissom.compiler.analysis.structure.quantized_linear import is_owned, layer_path, store_like
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula, Match
from lissom.compiler.ir.match import is_own_weight
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.native import missing_kernel
from lissom.ops.quantization import dequantize

aten = torch.ops.aten


_GATE = Formula(
    """
    layer = linear(x, weight, bias)
    pieces = SPLITS(layer, sizes, -1)
    gate = pieces[gate_index]
    up = pieces[up_index]
    EPILOGUES(gate, ...) * up
    """,
    lambda found: found.is_private and {found.number("gate_index"), found.number("up_index")} == {0, 1},
    **dict.fromkeys(("gate_index", "up_index"), int),
    **dict.fromkeys(("bias", "sizes"), object),
)


@dataclass(frozen=True)
class SplitGates(Rewrite):
    """Splits the merged gate and up projections of gated feed-forwards, whose products then fuse with the gate."""

    def run(self, edit: Editor) -> None:
        for found in edit.matches(_GATE):
            if edit.may_change(found["layer"], _obstacle(found["layer"])):
                _split(edit, found)


def _obstacle(linear: fx.Node) -> str | None:
    """The reason a projection cannot be split; None if it can."""
    layer = Linear(linear)
    if not is_owned(layer.weight) or not (layer.bias is None or is_own_weight(layer.bias)):
        return "its weight is computed, or read elsewhere too"
    x = nodes.tensor_type(layer.x)
    return missing_kernel(x.dtype, x.device)


def _split(edit: Editor, found: Match) -> None:
    linear, layer = found["layer"], Linear(found["layer"])
    path, start = layer_path(layer.weight), 0
    for name in ("gate", "up") if found.number("gate_index") == 0 else ("up", "gate"):
        rows = slice(start, start + nodes.fixed_size(found[name], -1))
        start = rows.stop
        with edit.before(linear, like=[linear]):
            weight = _rows(edit, layer.weight, rows, f"{path}.{name}.weight")
            bias = None if layer.bias is None else _rows(edit, layer.bias, rows, f"{path}.{name}.bias")
            edit.replace(found[name], edit.call(aten.linear.default, layer.x, weight, bias))


def _rows(edit: Editor, weight: fx.Node, rows: slice, name: str) -> fx.Node:
    """Some rows of a weight or of a bias, in a dequantized weight of its integers and their grid."""
    if nodes.is_call(weight, dequantize):
        q, *grid = map(edit.tensor, weight.all_input_nodes)
        parts = [q[rows], *(tensor if tensor.numel() == 1 else tensor[rows] for tensor in grid)]
        return store_like(edit, weight, name, (part.clone() for part in parts))
    return edit.weight(name, nn.Parameter(edit.tensor(weight)[rows].clone(), requires_grad=False))
