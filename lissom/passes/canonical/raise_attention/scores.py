"""Decomposition of attention scores into q, keys, scale, biases, soft-capping and sinks, in any of their usual forms.

Recognized, from the argument of a softmax backwards: casts, a scale on the scores, on q or on k, any number of added or
subtracted biases (padding and causal masks, T5's and DeBERTa's position biases), `masked_fill` and `where` with a fill so low
that adding it gives the same, `baddbmm`, reshapes that flatten batch and heads into one dimension, soft-capping (Gemma 2), a
column of sinks (GPT-OSS), and the subtraction of the row's maximum, which does not change a softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import AddedProduct, Binary, MaskedFill, Matmul, Softmax, Where
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula
from lissom.compiler.ir.match import number, strip_casts
from lissom.compiler.ir.operators import BATCHED_MATMULS, RESHAPES
from lissom.compiler.ir.view_calls import Cat

aten = torch.ops.aten

PRODUCTS = BATCHED_MATMULS
_SCALED = Formula("x * c | x / d", lambda found: found.values.get("d") != 0, c=float, d=float)
_SHIFTED = Formula("x - (amax(x, [-1], True) | max(x, -1, True)[0])")
_LARGER = (aten.max.other, aten.maximum.default, aten.clamp.default, aten.clamp_min.default)


class NoMatchError(Exception):
    """Why a softmax is no part of an attention that one operator can express."""


@dataclass(frozen=True)
class Bias:
    """A term of the scores: `value` added, or `fill` set where `value` is true; `factor` scales either afterwards.

    Attributes:
        scores: the scores at that point. Their rank is 3 while batch and heads are one dimension, and 5 while windows (Swin)
            are a dimension beside the batch.
        inverted: the fill is set where `value` is false.
        floor: nothing is added; the sum so far is clamped to the lowest finite number.
    """

    value: fx.Node
    scores: fx.Node
    factor: float = 1.0
    fill: float | None = None
    inverted: bool = False
    floor: bool = False

    @property
    def rank(self) -> int:
        return nodes.tensor_type(self.scores).rank


@dataclass(frozen=True)
class Scores:
    """Scores as softcap · tanh(q · transposed keys · scale / softcap) + biases, the biases in program order.

    Attributes:
        factors: tensors that scale q, one number per head (Swin V2's temperature).
        heads: the number of heads, where a reshape between three and four dimensions shows it.
        softcap: 0 for none.
        sinks: the logits beside the scores of each row, [batch, heads, queries, 1].
        shifted: the row's maximum is subtracted.
    """

    q: fx.Node
    keys: fx.Node
    scale: float
    biases: tuple[Bias, ...] = ()
    heads: object = None
    softcap: float = 0.0
    sinks: fx.Node | None = None
    shifted: bool = False
    factors: tuple[fx.Node, ...] = ()

    def scaled(self, factor: float) -> Scores:
        biases = tuple(replace(bias, factor=bias.factor * factor) for bias in self.biases)
        return replace(self, scale=self.scale * factor, biases=biases, softcap=self.softcap * factor)

    def biased(self, bias: Bias) -> Scores:
        return replace(self, biases=(*self.biases, bias))

    def capped(self) -> Scores:
        """tanh of the scores; a factor that follows is the cap."""
        if self.biases or self.softcap or self.shifted:
            raise NoMatchError("the scores are soft-capped after a bias, a shift or another cap")
        return replace(self, softcap=1.0)


def scores_of(edit: Editor, softmax: fx.Node) -> Scores:
    """The decomposed argument of a softmax.

    Raises:
        NoMatchError: naming the operator that is not recognized.
    """
    argument = _unshifted(Softmax(softmax).x)
    if not nodes.is_call(argument, aten.cat.default):
        return take_apart(edit, argument)
    joint = Cat(argument)
    joins_two = len(joint.parts) == 2 and nodes.tensor_type(argument).rank == 4 and joint.dim in (-1, 3)
    if not joins_two or nodes.tensor_type(joint.parts[1]).shape[-1] != 1:
        raise NoMatchError("the scores are joined with something that is not one column of sinks")
    scores, sinks = joint.parts
    return replace(take_apart(edit, scores), sinks=strip_casts(sinks))


def _unshifted(node: fx.Node) -> fx.Node:
    """The value before casts, and before the maximum of each row was subtracted from it."""
    node = strip_casts(node)
    shifted = _SHIFTED.match(node)
    return node if shifted is None else _unshifted(shifted["x"])


def folds_heads(node: fx.Node, kept: int = 2) -> bool:
    """True for a reshape between [batch, heads, a, b] and [batch·heads, a, b].

    With 3 of them, for a reshape between [batch, windows, heads, a, b] and [batch·windows, heads, a, b].

    Args:
        kept: the number of last dimensions.
    """
    if not nodes.is_call(node, *RESHAPES):
        return False
    old, new = nodes.tensor_type(nodes.operand(node)), nodes.tensor_type(node)
    return {old.rank, new.rank} == {kept + 1, kept + 2} and old.shape[-kept:] == new.shape[-kept:]


def take_apart(edit: Editor, node: object) -> Scores:
    """The scores as a scaled product of q and k, soft-capped or not, with biases.

    Raises:
        NoMatchError: naming the operator that is not recognized.
    """
    if not isinstance(node, fx.Node):
        raise NoMatchError("the scores are a constant")
    before = _unshifted(node)
    if before is not strip_casts(node):
        return replace(take_apart(edit, before), shifted=True)
    node = before
    if nodes.is_call(node, *PRODUCTS):
        return _product_of(edit, Matmul(node).x, Matmul(node).y)
    if folds_heads(node, 3):
        return take_apart(edit, nodes.operand(node))
    if folds_heads(node):
        split = max(map(nodes.tensor_type, (node, nodes.operand(node))), key=lambda tensor_type: tensor_type.rank)
        return replace(take_apart(edit, nodes.operand(node)), heads=split.shape[1])
    if nodes.is_call(node, aten.baddbmm.default):
        product = AddedProduct(node)
        scores = _product_of(edit, product.x, product.y).scaled(float(product.alpha))
        return scores if product.beta == 0 else scores.biased(Bias(product.bias, node, float(product.beta)))
    if nodes.is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _take_sum_apart(edit, node)
    if (fill := MaskedFill.of(node)) is not None:
        return take_apart(edit, fill.x).biased(_fill(edit, node, fill.mask, fill.value))
    if (choice := Where.of(node)) is not None:
        if number(edit.program, choice.other) is not None:
            return take_apart(edit, choice.chosen).biased(
                replace(_fill(edit, node, choice.condition, choice.other), inverted=True)
            )
        return take_apart(edit, choice.other).biased(_fill(edit, node, choice.condition, choice.chosen))
    if nodes.is_call(node, *_LARGER) and _is_floor(edit, node):
        return take_apart(edit, nodes.operand(node)).biased(Bias(node, node, floor=True))
    if nodes.is_call(node, aten.tanh.default):
        return take_apart(edit, nodes.operand(node)).capped()
    scaled = _scaled_by(edit, node)
    if scaled is not None:
        return take_apart(edit, scaled[1]).scaled(scaled[0])
    if nodes.is_call(node, aten.mul.Tensor):
        return _take_temperature_apart(edit, node)
    raise NoMatchError(f"the scores come through {node.target}" if node.op == "call_function" else "the scores are an input")


def _take_sum_apart(edit: Editor, node: fx.Node) -> Scores:
    if node.kwargs:
        raise NoMatchError("the scores are added with a factor")
    left, right = Binary(node).left, Binary(node).right
    subtracted = nodes.is_call(node, aten.sub.Tensor)
    for term, bias in ((left, right),) if subtracted else ((left, right), (right, left)):
        if not nodes.is_tensor(bias):
            continue
        try:
            return take_apart(edit, term).biased(Bias(bias, node, -1.0 if subtracted else 1.0))
        except NoMatchError:
            continue
    raise NoMatchError("neither term of the scores is a scaled product")


def _take_temperature_apart(edit: Editor, node: fx.Node) -> Scores:
    """Scores times a tensor with one number per head."""
    for scores, factor in (node.args, reversed(node.args)):
        if nodes.is_tensor(factor) and nodes.tensor_type(factor).shape[-2:] == (1, 1) and nodes.tensor_type(node).rank == 4:
            inner = take_apart(edit, scores)
            if inner.biases or inner.softcap:
                break
            return replace(inner, factors=(*inner.factors, factor))
    raise NoMatchError(f"the scores come through {node.target}")


def _is_floor(edit: Editor, node: fx.Node) -> bool:
    """True for a maximum with the lowest finite number of the dtype (XGLM, OPT)."""
    lowest = torch.finfo(nodes.tensor_type(node).dtype).min
    return len(node.args) == 2 and number(edit.program, nodes.argument(node, "other", "min")) == lowest


def _fill(edit: Editor, node: fx.Node, mask: fx.Node, value: object) -> Bias:
    fill = number(edit.program, value)
    if fill is None:
        raise NoMatchError("the fill of the masked scores is computed")
    return Bias(mask, node, fill=fill)


def _product_of(edit: Editor, q: fx.Node, keys: fx.Node) -> Scores:
    """The product of q and transposed keys, with constant factors of either moved into the scale."""
    scale = 1.0
    factors: list[fx.Node] = []
    for factor in (q, keys):
        while (scaled := _scaled_by(edit, factor)) is not None:
            scale, factor = scale * scaled[0], scaled[1]
        factors.append(factor)
    return Scores(factors[0], factors[1], scale)


def _scaled_by(edit: Editor, node: fx.Node) -> tuple[float, fx.Node] | None:
    """The constant factor of a value, and the unscaled value."""
    found = _SCALED.match(node, edit.program)
    if found is None:
        return None
    return (found.number("c"), found["x"]) if "c" in found.values else (1 / found.number("d"), found["x"])
