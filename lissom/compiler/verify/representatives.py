"""The nodes that are compared: of layers that are alike but for their weights, the first, one in the middle and the last."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")
"""The module path of a layer of a stack: up to the first number, `encoder.layer.3`."""
_ALL_OF = 3
"""Of so many layers of one form all are compared."""

Layer = str | None


@dataclass(frozen=True)
class Representatives:
    """The names of nodes of a program.

    Attributes:
        compared: of those that are compared with another program's.
        read: of other nodes, whose values these read.
    """

    compared: Collection[str]
    read: Collection[str]


def representatives(before: Program, after: Program) -> Representatives | None:
    """The nodes of `before` that are compared with those of `after`; None where all are.

    Layers are of one form if their calls in both programs are, with all arguments but nodes, and their types. What belongs to
    no layer is compared, and so are layers whose form is rare.
    """
    forms: dict[str, list[object]] = defaultdict(list)
    for program in (before, after):
        for node in program.nodes():
            layer = _layer(node)
            if layer is not None:
                constants = fx.map_arg((node.args, node.kwargs), lambda _: None)
                forms[layer].append((program is before, str(node.target), str(constants), str(nodes.node_type(node))))
    alike: dict[str, list[str]] = defaultdict(list)
    for layer, form in forms.items():
        alike[f"{re.sub(r'[0-9]+$', '', layer)} {hash(tuple(form))}"].append(layer)
    if all(len(layers) <= _ALL_OF for layers in alike.values()):
        return None
    chosen: set[Layer] = {None}
    for layers in alike.values():
        chosen |= {*layers} if len(layers) <= _ALL_OF else {layers[0], layers[len(layers) // 2], layers[-1]}
    compared = {node.name for node in before.nodes() if _layer(node) in chosen}
    read = {used.name for node in before.nodes() if node.name in compared for used in node.all_input_nodes}
    later = [node for node in after.nodes() if _layer(node) in chosen]
    read |= {name for node in later for used in node.all_input_nodes for name in (used.name, nodes.origin(used).replaces)}
    return Representatives(compared, read - compared)


def _layer(node: fx.Node) -> Layer:
    """The layer of a call, or for a write to the state that no module makes, of the call whose value it writes."""
    found = _LAYER.match(nodes.origin(node).module_path)
    if found is None and nodes.is_state_write(node):
        return _layer(node.all_input_nodes[-1])
    return found[0] if found else None
