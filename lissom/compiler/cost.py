"""Floating-point operations of a program at the sizes it was captured with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from lissom.compiler import fake
from lissom.compiler import node as nodes
from lissom.compiler.program import Program

aten = torch.ops.aten
Shape = tuple[int, ...]


def flops(program: Program) -> int:
    """Multiply-adds of all matrix products, convolutions and attentions, each counted as two operations.

    Element-wise work is not counted, as in `torch.utils.flop_counter`, which this agrees with.
    """
    return sum(node_flops(node) for node in program.nodes(*_FORMULAS))


def node_flops(node: fx.Node) -> int:
    """The same for one node; 0 for operators without a formula."""
    formula = _FORMULAS.get(node.target)
    if formula is None:
        return 0
    shapes = [_shape(item) for item in node.args if nodes.is_tensor(item)]
    return 2 * formula(shapes, _shape(node))


def _shape(node: object) -> Shape:
    value = nodes.value(node)  # pyright: ignore[reportArgumentType]
    return tuple(fake.hint(size) for size in value.shape)  # pyright: ignore[reportAttributeAccessIssue]


def _linear(shapes: list[Shape], out: Shape) -> int:
    return math.prod(out) * shapes[0][-1]


def _biased_product(shapes: list[Shape], out: Shape) -> int:
    return math.prod(out) * shapes[1][-1]


def _attention(shapes: list[Shape], out: Shape) -> int:
    q, k = shapes[0], shapes[1]
    return math.prod(q[:-1]) * k[-2] * (q[-1] + out[-1])


def _convolution(shapes: list[Shape], out: Shape) -> int:
    return math.prod(out) * math.prod(shapes[1][1:])


_FORMULAS: dict[object, Callable[[list[Shape], Shape], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _linear,
    aten.mm.default: _linear,
    aten.bmm.default: _linear,
    aten.addmm.default: _biased_product,
    aten.baddbmm.default: _biased_product,
    aten.scaled_dot_product_attention.default: _attention,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
}
