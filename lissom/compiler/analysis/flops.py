"""Floating-point operations of one operator call, from the sizes of its inputs and outputs.

A multiply-add is two operations. As in `torch.utils.flop_counter`, matrix products, convolutions and attention count;
element-wise operators, norms, softmax and products with a vector do not. The grouped products of mixtures of experts, which
`flop_counter` does not know, count too. What an operator multiplies follows from its declaration (`ir/dimensions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import cast

import sympy
import torch
from torch import fx

from lissom import ops
from lissom.compiler.ir import dimensions, operators
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.types import Size, product
from lissom.ops.pattern import Pattern

aten = torch.ops.aten

Shape = Sequence[Size]
ShapeOf = Callable[[fx.Node], Shape]
Formula = Callable[[fx.Node, ShapeOf], Size]


def operations(node: fx.Node, shape_of: ShapeOf) -> Size:
    """The operations of a call; 0 for operators without a formula. `shape_of` gives the sizes of a node's tensor."""
    formula = FORMULAS.get(node.target)
    return 2 * ((dimensions.multiplications(node, shape_of) or 0) if formula is None else formula(node, shape_of))


def is_counted(node: fx.Node) -> bool:
    """True when the call's operations count."""
    return node.target in FORMULAS or dimensions.counts(node.target)


def _block_sparse_attention(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Scores q·kᵀ, then scores·v, for the visible blocks of the pattern. All blocks of a layout that is no weight count."""
    q, k, v = (shape_of(nodes.operand(node, index)) for index in range(3))
    block, layout = cast(int, nodes.argument(node, "block")), nodes.argument(node, "layout")
    pattern = Pattern.decode(cast(Sequence[int], nodes.argument(node, "pattern")), block)
    if isinstance(layout, fx.Node):
        table = _weight(layout)
        pairs = _pairs_function(pattern, torch.ones(1, 1, 1, dtype=torch.bool) if table is None else table)
    else:
        pairs = _pairs_without_layout(pattern)
    return product(q[:2]) * cast(Size, pairs(q[2], k[2])) * (q[3] + v[3])


def _weight(node: fx.Node) -> torch.Tensor | None:
    """The weight a node reads; None when it reads none, or one without values."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    path, _, leaf = str(node.target).rpartition(".")
    weight = getattr(node.graph.owning_module.get_submodule(path), leaf)
    return None if weight.is_meta else weight


def _pairs_function(pattern: Pattern, layout: torch.Tensor | None) -> type[sympy.Function]:
    """pairs(queries, keys): the pairs of a query and a key in visible blocks, averaged over the layout's heads."""

    def evaluate(_: type[sympy.Function], queries: sympy.Expr, keys: sympy.Expr) -> sympy.Integer | None:
        if not (queries.is_Integer and keys.is_Integer):
            return None
        rows, columns = int(str(queries)), int(str(keys))
        some, _whole = pattern.blocks(rows, columns, pattern.block, layout)
        heights, widths = (
            (length - torch.arange(count) * pattern.block).clamp(max=pattern.block)
            for length, count in zip((rows, columns), some.shape[1:], strict=True)
        )
        area = (some * heights[:, None] * widths).sum()
        return sympy.Integer(round(int(area) / len(some)))

    return type("pairs", (sympy.Function,), {"eval": classmethod(evaluate)})


_pairs_without_layout = cache(partial(_pairs_function, layout=None))
"""One function per pattern, so that sympy can add the pairs of two layers."""


def _recurrent_layers(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Each token is multiplied by each matrix of each layer and direction: those of its input and of the state."""
    matrices = [shape_of(weight) for weight in cast(Sequence[fx.Node], node.args[2])]
    return product(shape_of(nodes.operand(node))[:-1]) * sum(product(shape) for shape in matrices if len(shape) == 2)


def _convolution(node: fx.Node, shape_of: ShapeOf) -> Size:
    return product(shape_of(node)) * product(shape_of(nodes.operand(node, 1))[1:])


def _transposed_convolution(node: fx.Node, shape_of: ShapeOf) -> Size:
    return product(shape_of(nodes.operand(node))) * product(shape_of(nodes.operand(node, 1))[1:])


def _any_convolution(node: fx.Node, shape_of: ShapeOf) -> Size:
    return (_transposed_convolution if nodes.argument(node, "transposed") else _convolution)(node, shape_of)


def _einsum(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Contracts pairs in PyTorch's order; a pair without a common label to sum over is an element-wise product."""
    inputs, arrow, output = cast(str, node.args[0]).replace(" ", "").partition("->")
    shapes = [shape_of(tensor) for tensor in cast(Sequence[fx.Node], node.args[1])]
    terms = inputs.split(",")
    labels = [_labels(term, len(shape)) for term, shape in zip(terms, shapes, strict=True)]
    kept = {*output} if arrow else {letter for letter in inputs if inputs.count(letter) == 1}
    if "..." in output or not arrow:
        kept |= {label for term in labels for label in term if label.isdigit()}
    operands = [dict(zip(term, shape, strict=True)) for term, shape in zip(labels, shapes, strict=True)]
    path = list(cast("Sequence[int] | None", nodes.argument(node, "path")) or ())
    total: Size = 0
    while len(operands) > 1:
        first, second = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
        b, a = operands.pop(second), operands.pop(first)
        needed = kept | {label for other in operands for label, size in other.items() if size != 1}
        pair = {label: b.get(label, 1) if a.get(label, 1) == 1 else a[label] for label in {**a, **b}}
        summed = {label for label in pair if label not in needed}
        contracted = {label for label in summed if a.get(label, 1) != 1 and b.get(label, 1) != 1}
        if contracted:
            total += product([size for label, size in pair.items() if label not in summed or label in contracted])
        operands.append({label: size for label, size in pair.items() if label not in summed})
    return total


def _labels(term: str, rank: int) -> list[str]:
    """One label per dimension: a letter, or for a dimension of `...` its number, counted from the last of them."""
    before, dots, after = term.partition("...")
    missing = rank - len(before) - len(after) if dots else 0
    return [*before, *map(str, range(missing, 0, -1)), *after]


FORMULAS: dict[object, Formula] = {
    aten.einsum.default: _einsum,
    **dict.fromkeys(operators.CONVOLUTIONS, _convolution),
    **dict.fromkeys(operators.TRANSPOSED_CONVOLUTIONS, _transposed_convolution),
    aten.convolution.default: _any_convolution,
    ops.block_sparse_attention: _block_sparse_attention,
    **dict.fromkeys(operators.RECURRENT_LAYERS, _recurrent_layers),
}
"""The formula for the multiplications of a call, for operators whose dimensions do not tell."""
