"""Compute equal things once: calls of the same operator on the same arguments become one, and so do equal sizes.

Two sizes are equal when they are the same expression of the program's dimensions, whichever tensor each is read from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.kinds import Rewrite
from lissom.compiler.types import ScalarType


@dataclass(frozen=True)
class MergeCommonSubexpressions(Rewrite):
    """Merges calls that are equal: same operator, same arguments, no side effects, nothing random."""

    def run(self, edit: Editor) -> None:
        first: dict[object, fx.Node] = {}
        for node in edit.nodes():
            if not nodes.is_pure(node):
                continue
            earlier = first.setdefault(_key(node), node)
            if earlier is not node:
                edit.replace(node, earlier)


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
