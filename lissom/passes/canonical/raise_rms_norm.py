"""Raise root-mean-square normalization written as separate operators to `rms_norm`.

    rms_norm(x) = x / √(mean(x²) + ε) · w            Zhang & Sennrich 2019, eq. 4

Found in any of the usual spellings: the square as `pow`, `square` or `x·x`; the root as `rsqrt`, `1/sqrt`, `pow(-0.5)` or a
division; the weight before or after a cast back from float32, as `w` or as Gemma's `1 + w`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Binary
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import only_user, other_argument, scalar_and_node, strip_casts
from lissom.compiler.ir.operators import ADD, CASTS
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_MULTIPLY = {aten.mul.Tensor}


@dataclass(frozen=True)
class RaiseRmsNorm(Rewrite):
    """Replaces RMS norms written as separate operators by `rms_norm`."""

    def run(self, edit: Editor) -> None:
        for mean in edit.nodes(aten.mean.dim):
            x = _squared(mean)
            over_last = x is not None and nodes.argument(mean, "dim") in ([-1], [nodes.tensor_type(x).rank - 1])
            if x is None or not over_last or not nodes.argument(mean, "keepdim"):
                continue
            division = _normalised(edit, mean, x)
            if division is None:
                edit.skip(mean, "a mean of squares that does not divide what was squared")
                continue
            normalised, epsilon = division
            if nodes.tensor_type(normalised) != nodes.tensor_type(x):
                edit.skip(mean, "what is divided has another dtype than what was squared")
                continue
            _raise(edit, x, normalised, epsilon)


def _squared(mean: fx.Node) -> fx.Node | None:
    """The x of mean(x²)."""
    square = nodes.operand(mean)
    squares = (
        _is_power(square, 2)
        or nodes.is_call(square, aten.square.default)
        or (nodes.is_call(square, *_MULTIPLY) and Binary(square).left is Binary(square).right)
    )
    return nodes.operand(square) if squares else None


def _normalised(edit: Editor, mean: fx.Node, x: fx.Node) -> tuple[fx.Node, float] | None:
    """The node that is x / √(mean + ε), and ε."""
    for added in mean.users:
        split = scalar_and_node(edit.program, added, ADD)
        if split is None:
            continue
        for root in added.users:
            normalised = _divided(root, x)
            if normalised is not None:
                return normalised, split[0]
    return None


def _divided(root: fx.Node, x: fx.Node) -> fx.Node | None:
    """x · root when root is an inverse square root, x / root when it is a square root."""
    inverse = nodes.is_call(root, aten.rsqrt.default) or _is_power(root, -0.5)
    if nodes.is_call(root, aten.sqrt.default) or _is_power(root, 0.5):
        for user in root.users:
            if nodes.is_call(user, aten.div.Tensor) and _is_same(Binary(user).left, x) and Binary(user).right is root:
                return user
            if nodes.is_call(user, aten.reciprocal.default):
                return _times(user, x)
        return None
    return _times(root, x) if inverse else None


def _is_power(node: fx.Node, exponent: float) -> bool:
    return nodes.is_call(node, aten.pow.Tensor_Scalar) and nodes.argument(node, "exponent") == exponent


def _times(factor: fx.Node, x: fx.Node) -> fx.Node | None:
    products = (user for user in factor.users if nodes.is_call(user, *_MULTIPLY))
    return next((user for user in products if _is_same(other_argument(user, factor), x)), None)


def _is_same(value: object, x: fx.Node) -> bool:
    """True when both are the same value, apart from casts between floating dtypes."""
    return nodes.is_tensor(value) and strip_casts(value) is strip_casts(x)


def _raise(edit: Editor, x: fx.Node, normalised: fx.Node, epsilon: float) -> None:
    """Replace the normalized value, and a cast and a weight after it where there are any, by `rms_norm`."""
    cast, original = only_user(normalised), strip_casts(x)
    end, start = normalised, x
    if nodes.is_call(cast, *CASTS) and nodes.tensor_type(cast) == nodes.tensor_type(original):
        end, start = cast, original
    root, weight = _weighted(end)
    if weight is not None and nodes.tensor_type(weight).dtype != nodes.tensor_type(end).dtype:
        root, start, weight = normalised, x, None
    with edit.before(root, like=[normalised]):
        raised = edit.call(aten.rms_norm.default, start, [edit.size(x, -1)], weight, epsilon)
    edit.replace(root, raised)


def _weighted(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The product of the node with a weight over its last dimension, and the weight; the node alone when there is none."""
    product = only_user(node)
    if not nodes.is_call(product, *_MULTIPLY):
        return node, None
    other = other_argument(product, node)
    if not nodes.is_tensor(other):
        return node, None
    if nodes.tensor_type(other).shape != nodes.tensor_type(node).shape[-1:]:
        return node, None
    return product, other
