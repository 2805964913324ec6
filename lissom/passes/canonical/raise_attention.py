"""Raise attention written out in parts to `scaled_dot_product_attention`.

    attention(q, k, v) = softmax(q kᵀ · scale + bias) v            Vaswani et al. 2017, eq. 1

Found from the softmax outwards. Upwards: casts, a scale on the scores, on q or on k, any number of added biases (padding and
causal masks, T5's and DeBERTa's position biases), `masked_fill` with a fill so low that it is the same as adding it, `baddbmm`,
and reshapes that fold batch and heads into one dimension. Downwards: casts, such a reshape, and the product with v. What cannot
be said as one attention is left alone, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.kinds import Rewrite
from lissom.compiler.match import CASTS, number, scalar_and_node, strip_casts

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar)
# Adding a fill as large as this to a score gives the fill itself in float32, so adding is the same as filling.
_LOWEST = -1e30


class _NoMatchError(Exception):
    """Why a softmax is not the middle of an attention we can say as one operator."""


@dataclass(frozen=True)
class _Bias:
    """A term of the scores: `value` added, or `fill` put where `value` is true; `factor` scales either afterwards.

    rank: of the scores at that point; 3 while batch and heads are one dimension.
    """

    value: fx.Node
    rank: int
    factor: float = 1.0
    fill: float | None = None


@dataclass(frozen=True)
class _Scores:
    """Scores taken apart: q · transposed keys · scale + biases, the biases in the order they come.

    heads: the number of heads, where a reshape between three and four dimensions tells it.
    """

    q: fx.Node
    keys: fx.Node
    scale: float
    biases: tuple[_Bias, ...] = ()
    heads: object = None

    def scaled(self, factor: float) -> _Scores:
        biases = tuple(replace(bias, factor=bias.factor * factor) for bias in self.biases)
        return replace(self, scale=self.scale * factor, biases=biases)

    def biased(self, bias: _Bias) -> _Scores:
        return replace(self, biases=(*self.biases, bias))


@dataclass(frozen=True)
class RaiseAttention(Rewrite):
    """Replaces matmul, scale, mask, softmax, matmul by one attention."""

    def run(self, edit: Editor) -> None:
        for softmax in edit.nodes(*_SOFTMAX):
            try:
                product = _product_with_values(edit, softmax)
                if product is not None:
                    _raise(edit, softmax, product, _take_apart(edit, softmax.args[0]))
            except _NoMatchError as reason:
                edit.skip(softmax, str(reason))


def _product_with_values(edit: Editor, softmax: fx.Node) -> fx.Node | None:
    """The product of the attention weights with v; None when the softmax belongs to something else.

    Raises: _NoMatchError when the weights are used for anything beside.
    """
    weights = _without_nan(edit, softmax)
    while len(weights.users) == 1:
        user = next(iter(weights.users))
        if not (nodes.is_call(user, *CASTS) or _folds_heads(user)):
            break
        weights = user
    product = next((user for user in weights.users if nodes.is_call(user, *_PRODUCTS) and user.args[0] is weights), None)
    if product is None:
        return None
    if softmax.args[1] not in (-1, nodes.tensor_type(softmax).rank - 1):
        raise _NoMatchError("the softmax is not over the last dimension")
    if len(weights.users) > 1:
        raise _NoMatchError("the attention weights are used beside the product with v")
    return product


def _without_nan(edit: Editor, softmax: fx.Node) -> fx.Node:
    """The weights with NaN put to 0, as attention has them for a row that is masked throughout; else the softmax itself."""
    for user in softmax.users:
        if not nodes.is_call(user, aten.where.self, aten.where.ScalarSelf) or user.args[2] is not softmax:
            continue
        is_nan = user.args[0]
        if not nodes.is_call(is_nan, aten.isnan.default) or is_nan.args[0] is not softmax or len(is_nan.users) > 1:
            continue
        if number(edit.program, user.args[1]) == 0 and set(softmax.users) == {user, is_nan}:
            return user
    return softmax


def _folds_heads(node: fx.Node) -> bool:
    """True for a reshape between [batch, heads, a, b] and [batch·heads, a, b]."""
    if not nodes.is_call(node, aten.reshape.default) or not nodes.is_tensor(node.args[0]):
        return False
    old, new = nodes.tensor_type(node.args[0]), nodes.tensor_type(node)  # pyright: ignore[reportArgumentType]
    return {old.rank, new.rank} == {3, 4} and old.shape[-2:] == new.shape[-2:]


def _heads_of(reshape: fx.Node) -> object:
    """The number of heads on the side of the reshape that has four dimensions."""
    return max(map(nodes.tensor_type, (reshape, reshape.args[0])), key=lambda found: found.rank).shape[1]


def _take_apart(edit: Editor, node: object) -> _Scores:
    """The scores as a scaled product of q and k with biases.

    Raises: _NoMatchError naming the operator in the way.
    """
    if not isinstance(node, fx.Node):
        raise _NoMatchError("the scores are a constant")
    node = strip_casts(node)
    if nodes.is_call(node, *_PRODUCTS):
        return _product_of(edit, node.args[0], node.args[1])
    if _folds_heads(node):
        return replace(_take_apart(edit, node.args[0]), heads=_heads_of(node))
    if nodes.is_call(node, aten.baddbmm.default):
        bias, q, keys = node.args
        alpha, beta = (float(nodes.argument(node, name)) for name in ("alpha", "beta"))  # pyright: ignore
        scores = _product_of(edit, q, keys).scaled(alpha)
        return scores if beta == 0 else scores.biased(_Bias(bias, 3, beta))  # pyright: ignore[reportArgumentType]
    if nodes.is_call(node, aten.add.Tensor):
        return _take_sum_apart(edit, node)
    if nodes.is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _take_apart(edit, node.args[0]).biased(_fill(edit, node))
    scaled = _scaled_by(edit, node)
    if scaled is not None:
        return _take_apart(edit, scaled[1]).scaled(scaled[0])
    raise _NoMatchError(f"the scores come through {node.target}" if node.op == "call_function" else "the scores are an input")


def _take_sum_apart(edit: Editor, node: fx.Node) -> _Scores:
    if node.kwargs:
        raise _NoMatchError("the scores are added with a factor")
    left, right = node.args
    for term, bias in ((left, right), (right, left)):
        if not nodes.is_tensor(bias):
            continue
        try:
            return _take_apart(edit, term).biased(_Bias(bias, nodes.tensor_type(node).rank))
        except _NoMatchError:
            continue
    raise _NoMatchError("neither term of the scores is a scaled product")


def _fill(edit: Editor, node: fx.Node) -> _Bias:
    fill = number(edit.program, node.args[2])
    if fill is None:
        raise _NoMatchError("the fill of the masked scores is computed")
    return _Bias(node.args[1], nodes.tensor_type(node).rank, fill=fill)  # pyright: ignore[reportArgumentType]


def _product_of(edit: Editor, q: object, keys: object) -> _Scores:
    """The product of q and transposed keys, with numbers that scale either taken out."""
    scale = 1.0
    factors: list[fx.Node] = []
    for factor in (q, keys):
        while (found := _scaled_by(edit, factor)) is not None:
            scale, factor = scale * found[0], found[1]
        if not nodes.is_tensor(factor):
            raise _NoMatchError("a factor of the scores is not a tensor")
        factors.append(factor)  # pyright: ignore[reportArgumentType]
    return _Scores(factors[0], factors[1], scale)


def _scaled_by(edit: Editor, node: object) -> tuple[float, fx.Node] | None:
    """The number a value is multiplied with, and the value."""
    if nodes.is_call(node, *_DIVIDE) and not node.kwargs:  # pyright: ignore[reportAttributeAccessIssue]
        divisor = number(edit.program, node.args[1])  # pyright: ignore[reportAttributeAccessIssue]
        return (1 / divisor, node.args[0]) if divisor else None  # pyright: ignore
    return scalar_and_node(edit.program, node, _MULTIPLY)


def _raise(edit: Editor, softmax: fx.Node, product: fx.Node, scores: _Scores) -> None:
    v = product.args[1]
    if not nodes.is_tensor(v):
        raise _NoMatchError("v is not a tensor")
    factors: list[fx.Node] = [scores.q, scores.keys, v]  # pyright: ignore[reportAssignmentType]
    ranks = {nodes.tensor_type(item).rank for item in factors}
    if ranks not in ({3}, {4}):
        raise _NoMatchError(f"q, k and v have ranks {sorted(ranks)}; attention takes 4, or 3")
    heads = nodes.tensor_type(softmax).shape[1] if nodes.tensor_type(softmax).rank == 4 else scores.heads
    dtype = nodes.tensor_type(product).dtype
    with edit.before(product, like=[softmax, product]):
        q, k, values = (
            _unfold(edit, _cast(edit, item, dtype), heads) for item in (scores.q, _keys(edit, scores.keys), factors[2])
        )
        bias = _sum(edit, scores.biases, dtype, heads)
        raised = edit.call(aten.scaled_dot_product_attention.default, q, k, values, bias, scale=scores.scale)
        folded = raised
        if ranks == {3}:
            sizes = [-1, edit.size(scores.q, 1), nodes.tensor_type(product).shape[2]]
            folded = edit.call(aten.reshape.default, raised, sizes)
    if folded is not raised:
        _skip_reshapes(edit, product, raised)
    edit.replace(product, folded)


def _skip_reshapes(edit: Editor, product: fx.Node, raised: fx.Node) -> None:
    """Let what unfolds the product again read the attention itself."""
    for user in list(product.users):
        if _folds_heads(user) and nodes.node_type(user) == nodes.node_type(raised):
            user.replace_all_uses_with(raised)


def _keys(edit: Editor, transposed: fx.Node) -> fx.Node:
    """The keys before their last two dimensions were exchanged."""
    last = nodes.tensor_type(transposed).rank - 1
    if nodes.is_call(transposed, aten.transpose.int):
        dims = {dim % (last + 1) for dim in transposed.args[1:]}  # pyright: ignore[reportOperatorIssue]
        if dims == {last, last - 1}:
            return transposed.args[0]  # pyright: ignore[reportReturnType]
    return edit.call(aten.transpose.int, transposed, -2, -1)


def _unfold(edit: Editor, node: fx.Node, heads: object) -> fx.Node:
    """[batch·heads, a, b] as [batch, heads, a, b]; with no heads known, as [1, batch·heads, a, b]."""
    if nodes.tensor_type(node).rank == 4:
        return node
    if heads is None:
        return edit.call(aten.unsqueeze.default, node, 0)
    if _folds_heads(node) and nodes.tensor_type(node.args[0]).shape[1] == heads:
        return node.args[0]  # pyright: ignore[reportReturnType]
    if not isinstance(heads, int):
        raise _NoMatchError("the number of heads varies")
    return edit.call(aten.reshape.default, node, [-1, heads, edit.size(node, 1), edit.size(node, 2)])


def _cast(edit: Editor, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    node = strip_casts(node) if nodes.tensor_type(strip_casts(node)).dtype == dtype else node
    return node if nodes.tensor_type(node).dtype == dtype else edit.call(aten.to.dtype, node, dtype)


def _sum(edit: Editor, biases: tuple[_Bias, ...], dtype: torch.dtype, heads: object) -> fx.Node | None:
    """The biases as one tensor in the dtype of the attention; None when there are none."""
    total: fx.Node | None = None
    for bias in biases:
        value = _shaped(edit, bias, heads)
        if bias.fill is None:
            term = _cast_bias(edit, value, dtype)
            term = term if bias.factor == 1.0 else edit.call(aten.mul.Tensor, term, bias.factor)
            total = term if total is None else edit.call(aten.add.Tensor, total, term)
            continue
        total = edit.call(aten.zeros_like.default, value, dtype=dtype) if total is None else total
        total = edit.call(aten.masked_fill.Scalar, total, value, _lowest(bias, dtype))
    return total


def _shaped(edit: Editor, bias: _Bias, heads: object) -> fx.Node:
    """The bias with the dimensions attention takes: [a, b], or [batch, heads, a, b]."""
    value, found = bias.value, nodes.tensor_type(bias.value)
    if found.rank > 4:
        raise _NoMatchError("a bias has more dimensions than the scores")
    if found.rank == 3:
        varies = bias.rank == 3 and heads is not None and found.shape[0] != 1
        return _unfold(edit, value, heads) if varies else edit.call(aten.unsqueeze.default, value, 0)
    for _ in range(found.rank, 2):
        value = edit.call(aten.unsqueeze.default, value, 0)
    return value


def _cast_bias(edit: Editor, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The bias in the dtype of the attention; the lowest finite numbers stay finite, so that a row of them stays uniform."""
    found, lowest = nodes.tensor_type(strip_casts(value)).dtype, torch.finfo(dtype).min
    if found.is_floating_point and torch.finfo(found).min < lowest:
        value = edit.call(aten.clamp_min.default, value, lowest)
    return _cast(edit, value, dtype)


def _lowest(bias: _Bias, dtype: torch.dtype) -> float:
    """What the filled scores are, within the range of the dtype."""
    fill = float(bias.fill or 0.0) * bias.factor
    fill = fill if fill == -float("inf") else max(fill, torch.finfo(dtype).min)
    if not fill <= _LOWEST:
        raise _NoMatchError(f"a fill of {fill:g} is not low enough to be the same as adding it")
    return fill
