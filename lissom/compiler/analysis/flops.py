"""Floating-point operations of one operator call, from the sizes of its inputs and outputs.

A multiply-add is two operations. As in `torch.utils.flop_counter`, matrix products, convolutions and attention count;
element-wise operators, norms, softmax and products with a vector do not. The grouped products of mixtures of experts, which
`flop_counter` does not know, count too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import cast

import sympy
import torch
from torch import fx

from lissom import ops
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators
from lissom.compiler.ir.types import Size
from lissom.ops.pattern import Pattern

aten = torch.ops.aten

Shape = Sequence[Size]
ShapeOf = Callable[[fx.Node], Shape]
Formula = Callable[[fx.Node, ShapeOf], Size]


def operations(node: fx.Node, shape_of: ShapeOf) -> Size:
    """The operations of a call; 0 for operators without a formula. `shape_of` gives the sizes of a node's tensor."""
    formula = FORMULAS.get(node.target)
    return 0 if formula is None else 2 * formula(node, shape_of)


def is_counted(node: fx.Node) -> bool:
    """True when the call's operations count."""
    return node.target in FORMULAS


def product(sizes: Shape) -> Size:
    """The product of sizes, which may be numbers or expressions."""
    return math.prod(sizes)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _operand(node: fx.Node, index: int, shape_of: ShapeOf) -> Shape:
    """The sizes of the operator's tensor parameter at `index`, given by position or by name."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    return shape_of(cast(fx.Node, nodes.argument(node, schema.arguments[index].name)))


def _product(node: fx.Node, shape_of: ShapeOf) -> Size:
    left, right = _operand(node, 0, shape_of), _operand(node, 1, shape_of)
    return product(shape_of(node)) * left[-1] if len(right) > 1 else 0


def _summed_over(index: int) -> Formula:
    """The formula of a product whose sums run over the last dimension of the operand at `index`."""
    return lambda node, shape_of: product(shape_of(node)) * _operand(node, index, shape_of)[-1]


def _grouped_product(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Rows [tokens, in_features], each with the matrix of its group of [groups, in_features, out_features]."""
    return product(_operand(node, 0, shape_of)) * _operand(node, 1, shape_of)[-1]


def _attention(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Scores q·kᵀ, then scores·v. Key/value heads that several query heads share are multiplied once for each of these."""
    q, k, v = (_operand(node, index, shape_of) for index in range(3))
    batch = q[:-2] if node.kwargs.get("enable_gqa") else [b if a == 1 else a for a, b in zip(q[:-2], k[:-2], strict=True)]
    scores = product([*batch, q[-2], q[-1]]) * k[-2]
    return scores + product([*shape_of(node)[:-1], k[-2]]) * v[-1]


def _merged_attention(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Scores q·kᵀ, then scores·v, for packed queries, keys and values of one size."""
    *_, tokens, features = shape_of(node)
    return 2 * product(shape_of(node)[:-2]) * tokens * tokens * features


def _unpadded_attention(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Scores q·kᵀ, then scores·v, where each returned row sees the tokens of a padded text."""
    _, heads, rows, value_dim = shape_of(node)
    return heads * rows * _operand(node, 3, shape_of)[-1] * (_operand(node, 0, shape_of)[-1] + value_dim)


def _block_sparse_attention(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Scores q·kᵀ, then scores·v, for the visible blocks of the pattern. All blocks of a layout that is no weight count."""
    q, k, v = (_operand(node, index, shape_of) for index in range(3))
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
    found = getattr(node.graph.owning_module.get_submodule(path), leaf)
    return None if found.is_meta else found


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


def _linear_attention(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Key features times values, and query features times these sums; causal attention adds a triangle in each chunk.

    The denominator counts as one more feature of v.
    """
    q, k, v = (_operand(node, index, shape_of) for index in range(3))
    total = product(k) * (v[-1] + 1) + product(q) * (v[-1] + 1)
    if not nodes.argument(node, "causal"):
        return total
    return total + product(q[:-1]) * cast(int, nodes.argument(node, "chunk")) * (q[-1] + v[-1] + 1)


def _delta_rule(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Each token multiplies the state by its decay, its key, the correction and its query."""
    key, value = (_operand(node, index, shape_of) for index in (1, 2))
    return 4 * product(value) * key[-1]


def _selective_scan(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Each token multiplies the state by its decay, b by x, and the state by c."""
    x, b = (_operand(node, index, shape_of) for index in (0, 3))
    return 3 * product(x) * b[-1]


def _recurrent_layers(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Each token is multiplied by each matrix of each layer and direction: those of its input and of the state."""
    matrices = [shape_of(item) for item in cast(Sequence[fx.Node], node.args[2])]
    return product(_operand(node, 0, shape_of)[:-1]) * sum(product(shape) for shape in matrices if len(shape) == 2)


def _convolution(node: fx.Node, shape_of: ShapeOf) -> Size:
    return product(shape_of(node)) * product(_operand(node, 1, shape_of)[1:])


def _transposed_convolution(node: fx.Node, shape_of: ShapeOf) -> Size:
    return product(_operand(node, 0, shape_of)) * product(_operand(node, 1, shape_of)[1:])


def _any_convolution(node: fx.Node, shape_of: ShapeOf) -> Size:
    return (_transposed_convolution if nodes.argument(node, "transposed") else _convolution)(node, shape_of)


def _einsum(node: fx.Node, shape_of: ShapeOf) -> Size:
    """Contracts pairs in PyTorch's order; a pair without a common label to sum over is an element-wise product."""
    inputs, arrow, output = cast(str, node.args[0]).replace(" ", "").partition("->")
    shapes = [shape_of(item) for item in cast(Sequence[fx.Node], node.args[1])]
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
    **dict.fromkeys((aten.linear.default, *operators.MATMULS, aten._int_mm.default, aten._scaled_mm.default), _product),
    **dict.fromkeys((aten._grouped_mm.default, ops.grouped_product), _grouped_product),
    **dict.fromkeys((aten._weight_int4pack_mm.default, aten._weight_int8pack_mm.default), _summed_over(0)),
    **dict.fromkeys(operators.MATMULS_WITH_BIAS, _summed_over(1)),
    aten.einsum.default: _einsum,
    **dict.fromkeys(operators.CONVOLUTIONS, _convolution),
    **dict.fromkeys(operators.TRANSPOSED_CONVOLUTIONS, _transposed_convolution),
    aten.convolution.default: _any_convolution,
    **dict.fromkeys((*operators.ATTENTIONS, ops.fused_attention), _attention),
    ops.block_sparse_attention: _block_sparse_attention,
    ops.merged_attention: _merged_attention,
    ops.unpadded_attention: _unpadded_attention,
    ops.linear_attention: _linear_attention,
    ops.gated_delta_rule: _delta_rule,
    ops.selective_scan: _selective_scan,
    **dict.fromkeys(operators.RECURRENT_LAYERS, _recurrent_layers),
    **dict.fromkeys((ops.packed_linear, ops.packed_linear_norm, *operators.QUANTIZED_LINEARS), _summed_over(0)),
    # Its weight holds half of the values, [out_features, in_features / 2].
    ops.sparse_linear: _summed_over(1),
}
"""The formula for the multiplications of a call, by operator."""
