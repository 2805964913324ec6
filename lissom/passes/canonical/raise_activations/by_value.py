"""Recognize a function of one tensor by its values, however it is written.

An activation written as separate operators is an expression of one value. Evaluating the expression on a grid and comparing it
with a reference recognizes every way to write it, with constants rounded in any way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import call
from lissom.compiler.ir.operators import CASTS

aten = torch.ops.aten

ELEMENTWISE = {
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.neg.default),
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.reciprocal.default),
    *(aten.pow.Tensor_Scalar, aten.square.default, aten.exp.default, aten.log1p.default, aten.erf.default),
    *(aten.tanh.default, aten.sigmoid.default, aten.softplus.default, aten.relu.default),
    *(aten.clamp.default, aten.clamp_min.default, *CASTS),
}
# Spelled-out constants carry 8 to 10 digits (0.79788456, 0.044715), which moves values on the grid by up to 1e-7.
_TOLERANCE = 1e-6
_DEPTH = 12

Function = Callable[[torch.Tensor], torch.Tensor]


def grid() -> torch.Tensor:
    """The points at which functions are compared: zero, both tails, and large values, where a clamp would show."""
    near = torch.linspace(-9.0, 9.0, 181, dtype=torch.float64)
    far = torch.logspace(1.0, 6.0, 11, dtype=torch.float64)
    return torch.cat([-far, near, far])


def find_function(core: fx.Node, reference: Function) -> tuple[fx.Node, fx.Node] | None:
    """The root and the argument of the expression around `core` that computes `reference`, or None.

    Args:
        core: the characteristic node of the expression, such as its tanh. The largest matching expression wins.
    """
    points = grid()
    wanted = reference(points)
    above = _reached(core, _DEPTH, lambda node: node.all_input_nodes if node.target in ELEMENTWISE else [])
    below = _reached(core, 5, lambda node: [user for user in node.users if user.target in ELEMENTWISE])
    for root in reversed([core, *below]):
        for argument in above:
            if nodes.node_type(root) != nodes.node_type(argument):
                continue
            values = _evaluate(root, argument, points, {})
            if values is not None and torch.allclose(values, wanted, rtol=0.0, atol=_TOLERANCE):
                return root, argument
    return None


def _reached(core: fx.Node, steps: int, following: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """The values within some steps from the core, nearest first.

    Args:
        following: the nodes one step from a node.
    """
    values: list[fx.Node] = []
    frontier = [core]
    for _ in range(steps):
        reached = dict.fromkeys(node for start in frontier for node in following(start))
        frontier = [node for node in reached if nodes.is_tensor(node) and node not in values]
        values += frontier
    return values


def _evaluate(
    node: object, argument: fx.Node, points: torch.Tensor, known: dict[fx.Node, torch.Tensor | None]
) -> torch.Tensor | None:
    """The expression's values at these points; None when it reads anything but its argument."""
    if node is argument:
        return points
    if not nodes.is_tensor(node) or node.target not in ELEMENTWISE or not nodes.tensor_type(node).dtype.is_floating_point:
        return None
    if node not in known:
        known[node] = None
        inputs = {used: _evaluate(used, argument, points, known) for used in node.all_input_nodes}
        if all(value is not None for value in inputs.values()):
            value = inputs[node.all_input_nodes[0]] if node.target in CASTS else call(node, inputs.__getitem__)
            assert isinstance(value, torch.Tensor)
            known[node] = value
    return known[node]
