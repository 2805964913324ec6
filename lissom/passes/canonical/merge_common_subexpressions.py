"""Compute equal values once: merge calls of the same operator on the same arguments, equal sizes and equal numbers.

Two sizes are equal when they are the same expression of the program's dimensions, whichever tensor each is read from. Constants
of rank 0, which capture creates for every literal tensor in the model's code, are equal when they have the same type and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import fx, nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_handed_out
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import ScalarType
from lissom.compiler.pipeline.pass_kinds import Rewrite


@dataclass(frozen=True)
class MergeCommonSubexpressions(Rewrite):
    """Merges equal calls: same operator and arguments, no side effects, nothing random."""

    def run(self, edit: Editor) -> None:
        first: dict[object, fx.Node] = {}
        reads = [node for node in edit.program.graph.nodes if node.op == "get_attr"]
        for node in chain(reads, edit.nodes()):
            key = _key(edit.program, node)
            if key is None or (earlier := first.setdefault(key, node)) is node:
                continue
            # Two outputs have memory of their own each.
            if nodes.is_tensor(node) and all(is_handed_out(edit.program, value) for value in (node, earlier)):
                continue
            edit.replace(node, earlier)


def _key(program: Program, node: fx.Node) -> object:
    """A key that equal values share; None for a node that is not merged."""
    if node.op == "get_attr":
        weight = program.constant(node)
        # A parameter may be trained.
        if weight is None or weight.dim() > 0 or isinstance(weight, nn.Parameter):
            return None
        return (weight.dtype, weight.device, repr(weight.item()))
    if not nodes.is_pure(node):
        return None
    value_type = nodes.node_type(node)
    if isinstance(value_type, ScalarType):
        return (value_type.kind, value_type.value)
    return (node.target, _frozen(node.args), _frozen(node.kwargs))


def _frozen(argument: object) -> object:
    """The arguments as a hashable value; 1, 1.0 and True stay apart, and so do 0.0 and -0.0."""
    match argument:
        case fx.Node():
            return argument
        case list() | tuple():
            return tuple(map(_frozen, argument))
        case dict():
            return tuple(sorted((key, _frozen(part)) for key, part in argument.items()))
        case slice():
            return ("slice", _frozen((argument.start, argument.stop, argument.step)))
        case float():
            return (float, repr(argument))
        case _:
            return (type(argument), argument)
