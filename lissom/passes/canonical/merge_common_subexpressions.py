"""Compute equal values once: merge calls of the same operator on the same arguments, equal sizes and equal numbers.

Two sizes are equal when they are the same expression of the program's dimensions, whichever tensor each is read from. Constants
of rank 0, which capture creates for every literal tensor in the model's code, are equal when they have the same type and value.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import ScalarType
from lissom.compiler.pipeline.pass_kinds import Rewrite


@dataclass(frozen=True)
class MergeCommonSubexpressions(Rewrite):
    """Merges equal calls: same operator and arguments, no side effects, nothing random."""

    def run(self, edit: Editor) -> None:
        first: dict[object, fx.Node] = {}
        for node in _constants(edit.program):
            earlier = first.setdefault(_value(edit.program, node), node)
            if earlier is not node:
                edit.replace(node, earlier)
        for node in edit.nodes():
            if not nodes.is_pure(node):
                continue
            earlier = first.setdefault(_key(node), node)
            if earlier is not node:
                edit.replace(node, earlier)


def _constants(program: Program) -> list[fx.Node]:
    """The reads of constants of rank 0: neither parameters, which may be trained, nor state."""
    reads = [node for node in program.graph.nodes if node.op == "get_attr" and str(node.target) not in program.state]
    weights = {node: program.weight(str(node.target)) for node in reads}
    return [node for node, found in weights.items() if found.dim() == 0 and not isinstance(found, nn.Parameter)]


def _value(program: Program, node: fx.Node) -> object:
    found = program.weight(str(node.target))
    return (found.dtype, found.device, repr(found.item()))


def _key(node: fx.Node) -> object:
    found = nodes.node_type(node)
    if isinstance(found, ScalarType):
        return (found.kind, found.value)
    return (node.target, _frozen(node.args), _frozen(node.kwargs))


def _frozen(item: object) -> object:
    """The arguments as a hashable value; 1, 1.0 and True stay apart, and so do 0.0 and -0.0."""
    match item:
        case fx.Node():
            return item
        case list() | tuple():
            return tuple(map(_frozen, item))
        case dict():
            return tuple(sorted((key, _frozen(part)) for key, part in item.items()))
        case slice():
            return ("slice", _frozen((item.start, item.stop, item.step)))
        case float():
            return (float, repr(item))
        case _:
            return (type(item), item)
