"""Evaluate operators that depend on no input at compile time: those that read only weights, buffers and numbers.

A constant is stored in the program under `folded.<node>`. Trainable weights that are folded stay trainable in their folded
form. Left alone: views of one weight (they cost nothing and keep it shared), constants larger than these weights, outputs that
the caller may modify, random numbers, and state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.ir.match import computed_from, is_handed_out, is_view
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class FoldConstants(Rewrite):
    """Replaces operators whose arguments are all constant by their result."""

    def run(self, edit: Editor) -> None:
        constant = _constant_nodes(edit)
        for node in edit.nodes():
            if node not in constant or all(user in constant for user in node.users):
                continue
            inputs = [found for found in computed_from([node]) if found.op == "get_attr"]
            if (len(inputs) == 1 and _only_views(node)) or is_handed_out(edit.program, node):
                continue
            allowed = max(_SMALL_BYTES, sum(map(_bytes, inputs)))
            if _bytes(node) > allowed:
                edit.skip(node, "the constant would be larger than the weights it is computed from")
                continue
            result = evaluate_nodes(edit.program.graph_module, node)
            learned = any(isinstance(edit.program.weight(str(used.target)), nn.Parameter) for used in inputs)
            if learned and result.is_floating_point():
                result = nn.Parameter(result, requires_grad=False)
            # Modules have methods such as `to`, whose names are taken.
            name = f"folded.{node.name}_1" if hasattr(nn.Module, node.name) else f"folded.{node.name}"
            with edit.before(node):
                folded = edit.weight(name, result)
            edit.replace(node, folded)


def _constant_nodes(edit: Editor) -> set[fx.Node]:
    """The nodes that no input, state or random number reaches."""
    constant: set[fx.Node] = set()
    for node in edit.program:
        fixed = node.op == "get_attr" and str(node.target) not in edit.program.state
        if fixed or (nodes.is_pure(node) and nodes.is_tensor(node) and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    return constant


def _only_views(node: fx.Node) -> bool:
    while node.op != "get_attr":
        source = node.all_input_nodes[0]
        converts = nodes.tensor_type(node).dtype != nodes.tensor_type(source).dtype
        if converts or not is_view(node) or node.target is aten.contiguous.default:
            return False
        node = source
    return True


def _bytes(node: fx.Node) -> int:
    value = nodes.value(node)
    return value.numel() * value.element_size()  # pyright: ignore[reportAttributeAccessIssue]
