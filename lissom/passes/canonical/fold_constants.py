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
from lissom.compiler.ir.match import is_handed_out, is_view
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
            inputs = _weights_behind(node, constant)
            if (len(inputs) == 1 and _only_views(node)) or is_handed_out(edit.program, node):
                continue
            allowed = max(_SMALL_BYTES, sum(map(_bytes, inputs)))
            if _bytes(node) > allowed:
                edit.skip(node, "the constant would be larger than the weights it is computed from")
                continue
            result = evaluate_nodes(edit.program.graph_module, node)
            trainable = result.is_floating_point() and any(_is_trainable(edit, used) for used in inputs)
            with edit.before(node):
                folded = edit.weight(_name(node), nn.Parameter(result, requires_grad=False) if trainable else result)
            edit.replace(node, folded)


def _constant_nodes(edit: Editor) -> set[fx.Node]:
    """The nodes that no input, state or random number reaches."""
    constant: set[fx.Node] = set()
    for node in edit.program:
        if node.op == "get_attr":
            fixed = str(node.target) not in edit.program.state
        else:
            fixed = nodes.is_pure(node) and nodes.is_tensor(node) and constant.issuperset(node.all_input_nodes)
        if fixed:
            constant.add(node)
    return constant


def _weights_behind(node: fx.Node, constant: set[fx.Node]) -> list[fx.Node]:
    pending, seen = [node], {node}
    while pending:
        for used in pending.pop().all_input_nodes:
            if used in constant and used not in seen:
                seen.add(used)
                pending.append(used)
    return [found for found in seen if found.op == "get_attr"]


def _only_views(node: fx.Node) -> bool:
    while node.op != "get_attr":
        source = node.all_input_nodes[0]
        converts = nodes.tensor_type(node).dtype != nodes.tensor_type(source).dtype
        if converts or not is_view(node) or node.target is aten.contiguous.default:
            return False
        node = source
    return True


def _name(node: fx.Node) -> str:
    """The constant's name: `folded.<node>`, unless modules have a method of that name, such as `to`."""
    return f"folded.{node.name}_1" if hasattr(nn.Module, node.name) else f"folded.{node.name}"


def _is_trainable(edit: Editor, read: fx.Node) -> bool:
    return isinstance(edit.program.weight(str(read.target)), nn.Parameter)


def _bytes(node: fx.Node) -> int:
    value = nodes.value(node)
    return value.numel() * value.element_size()  # pyright: ignore[reportAttributeAccessIssue]
