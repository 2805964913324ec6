"""Evaluate operators that depend on no input at compile time: those that read only weights, buffers and numbers.

A constant is stored in the program under `folded.<node>`. Trainable weights that are folded stay trainable in their folded
form. Left alone: views of one weight (they cost nothing and keep it shared), constants larger than these weights, outputs that
the caller may modify, random numbers, state, quantized weights, which lowering stores as integers, and products whose matrix a
layer of the inputs multiplies by too (DeBERTa's projections of relative positions): a pass that changes the matrix must change
both. Lowering folds these, by `shared=true`.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx, nn

from lissom.compiler.analysis.structure.linear import weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.ir.match import computed_from, is_handed_out, is_view
from lissom.compiler.ir.operators import FAKE_QUANTIZES
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class FoldConstants(Rewrite):
    """Replaces operators whose arguments are all constant by their result.

    Attributes:
        shared: fold what products of constants lead to, even if other layers read their matrices, and nothing else; for
            lowering.
    """

    shared: bool = False

    def run(self, edit: Editor) -> None:
        constant = _constant_nodes(edit.program, set())
        if not self.shared and (shared := _shared_products(edit, constant)):
            constant = _constant_nodes(edit.program, shared)
        for node in edit.nodes():
            if node not in constant or all(user in constant for user in node.users):
                continue
            computed = computed_from([node])
            if self.shared and not any(weight_of(value) for value in computed):
                continue
            inputs = [value for value in computed if value.op == "get_attr"]
            if (len(inputs) == 1 and _only_views(node)) or is_handed_out(edit.program, node):
                continue
            allowed = max(_SMALL_BYTES, sum(map(_bytes, inputs)))
            if _bytes(node) > allowed:
                edit.skip(node, "the constant would be larger than the weights it is computed from")
                continue
            tensor = evaluate_nodes(edit.program.graph_module, node)
            learned = any(isinstance(edit.program.weight(str(used.target)), nn.Parameter) for used in inputs)
            if learned and tensor.is_floating_point():
                tensor = nn.Parameter(tensor, requires_grad=False)
            # Modules have methods such as `to`, whose names are taken.
            name = f"folded.{node.name}_1" if hasattr(nn.Module, node.name) else f"folded.{node.name}"
            with edit.before(node):
                folded = edit.weight(name, tensor)
            edit.replace(node, folded)


def _constant_nodes(program: Program, besides: Set[fx.Node]) -> set[fx.Node]:
    """The nodes that no input, state, random number, quantizer or node of `besides` reaches."""
    constant: set[fx.Node] = set()
    for node in program:
        fixed = node.op == "get_attr" and str(node.target) not in program.state
        computed = nodes.is_pure(node) and nodes.is_tensor(node) and constant.issuperset(node.all_input_nodes)
        if (fixed or computed) and node not in besides and node.target not in FAKE_QUANTIZES:
            constant.add(node)
    return constant


def _shared_products(edit: Editor, constant: Set[fx.Node]) -> set[fx.Node]:
    """The products of constants whose matrix a product with the inputs reads too."""
    matrices = {node: weight.target for node in edit.nodes() if (weight := weight_of(node)) and weight.op == "get_attr"}
    others = {matrix for node, matrix in matrices.items() if node not in constant}
    return {node for node, matrix in matrices.items() if node in constant and matrix in others}


def _only_views(node: fx.Node) -> bool:
    while node.op != "get_attr":
        source = node.all_input_nodes[0]
        converts = nodes.tensor_type(node).dtype != nodes.tensor_type(source).dtype
        if converts or not is_view(node) or node.target is aten.contiguous.default:
            return False
        node = source
    return True


def _bytes(node: fx.Node) -> int:
    value = nodes.tensor_value(node)
    return value.numel() * value.element_size()
