"""Raise attention written as separate operators to `scaled_dot_product_attention` or `lissom::attention`.

    attention(q, k, v) = softmax(q kᵀ · scale + bias) v            Vaswani et al. 2017, eq. 1

The match starts at the softmax. Before it are the scores (`passes/canonical/raise_attention/scores.py` lists their forms);
after it casts, a reshape that flattens batch and heads, zeros at hidden scores, the slice that drops the sinks, and the product
with v. Soft-capped scores and sinks become `lissom::attention`, everything else PyTorch's operator. A softmax that is no part
of such an attention is left alone, and the reason is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Matmul, Softmax
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula
from lissom.compiler.ir.match import strip_casts
from lissom.compiler.ir.operators import CASTS, SOFTMAX
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops import attention
from lissom.passes.canonical.raise_attention.scores import PRODUCTS, Bias, NoMatchError, Scores, folds_heads, scores_of

aten = torch.ops.aten

# A fill this low hides a score, and adding it to the score has the same effect as setting it. In a fully masked row the sum
# rounds to the fill itself while scores are below 32, half the spacing of float32 numbers there.
_LOWEST = -1e9


_TRANSPOSED = Formula("transpose(k, -2, -1) | transpose(k, -1, -2)")
_ZEROED = Formula("masked_fill(weights, mask, 0)")
_SLICED = Formula("slice(weights, -1, 0 | None, -1)")
_WITHOUT_NAN = Formula("is_nan = isnan(weights)\nwhere(is_nan, 0, weights)")


@dataclass(frozen=True)
class RaiseAttention(Rewrite):
    """Replaces attention written as separate operators (matmul, scale, mask, softmax, matmul) by one operator."""

    def run(self, edit: Editor) -> None:
        for softmax in edit.nodes(*SOFTMAX):
            try:
                values_product = _product_with_values(edit, softmax)
                if values_product is not None:
                    _raise(edit, softmax, values_product, scores_of(edit, softmax))
            except NoMatchError as reason:
                edit.skip(softmax, str(reason))


@dataclass(frozen=True)
class _Product:
    """The product of the attention weights with v.

    Attributes:
        zeroed: where weights are set to 0 before it.
        sliced: whether the last column of the weights is dropped.
    """

    product: Matmul
    zeroed: fx.Node | None
    sliced: bool


def _product_with_values(edit: Editor, softmax: fx.Node) -> _Product | None:
    """The product of the attention weights with v; None when the softmax belongs to something else.

    Raises:
        NoMatchError: when the weights have other readers.
    """
    weights = _without_nan(edit, softmax)
    zeroed: fx.Node | None = None
    sliced = False
    while len(weights.users) == 1:
        user = next(iter(weights.users))
        fill = _ZEROED.match(user, edit.program)
        if zeroed is None and fill is not None and fill["weights"] is weights:
            zeroed = fill["mask"]
        elif _SLICED.match(user) is not None and not sliced:
            sliced = True
        elif not (nodes.is_call(user, *CASTS) or folds_heads(user)):
            break
        weights = user
    products = (Matmul(user) for user in weights.users if nodes.is_call(user, *PRODUCTS))
    product = next((candidate for candidate in products if candidate.x is weights), None)
    if product is None:
        return None
    if Softmax(softmax).dim not in (-1, nodes.tensor_type(softmax).rank - 1):
        raise NoMatchError("the softmax is not over the last dimension")
    if len(weights.users) > 1:
        raise NoMatchError("the attention weights have readers other than the product with v")
    return _Product(product, zeroed, sliced)


def _without_nan(edit: Editor, softmax: fx.Node) -> fx.Node:
    """The weights with NaN set to 0, as attention has for a fully masked row; without that, the softmax itself."""
    for user in softmax.users:
        found = _WITHOUT_NAN.match(user, edit.program)
        if found is not None and softmax.users.keys() == {user, found["is_nan"]} and found.is_private:
            return user
    return softmax


def _raise(edit: Editor, softmax: fx.Node, values_product: _Product, scores: Scores) -> None:
    product, v = values_product.product.node, values_product.product.y
    if values_product.sliced != (scores.sinks is not None):
        raise NoMatchError("the last column is dropped from the weights, or sinks are kept in them")
    if values_product.zeroed is not None:
        scores = _hidden_for_good(scores, values_product.zeroed)
    ranks = {nodes.tensor_type(x).rank for x in (scores.q, scores.keys, v)}
    heads = nodes.tensor_type(softmax).shape[1] if nodes.tensor_type(softmax).rank == 4 else scores.heads
    if not ranks <= {3, 4} or (len(ranks) > 1 and heads is None):
        raise NoMatchError(f"q, k and v have ranks {sorted(ranks)}; attention takes 4, or 3")
    dtype = nodes.tensor_type(product).dtype
    with edit.before(product, like=[softmax, product]):
        q, k, values = (_unfold(edit, _cast(edit, x, dtype), heads) for x in (scores.q, _keys(edit, scores.keys), v))
        for factor in scores.factors:
            q = edit.call(aten.mul.Tensor, q, _cast(edit, factor, dtype))
        bias = _sum(edit, scores.biases, dtype, heads)
        if scores.softcap or scores.sinks is not None:
            sinks = None if scores.sinks is None else _cast(edit, scores.sinks, dtype)
            raised = edit.call(attention, q, k, values, bias, scale=scores.scale, softcap=scores.softcap, sinks=sinks)
        else:
            raised = edit.call(aten.scaled_dot_product_attention.default, q, k, values, bias, scale=scores.scale)
        folded = raised
        if nodes.tensor_type(product).rank == 3:
            sizes = [-1, edit.size(raised, 2), nodes.tensor_type(product).shape[2]]
            folded = edit.call(aten.reshape.default, raised, sizes)
    if folded is not raised:
        # Readers that restore the head dimension read the attention itself.
        for user in list(product.users):
            if folds_heads(user) and nodes.node_type(user) == nodes.node_type(raised):
                user.replace_all_uses_with(raised)
    edit.replace(product, folded)


def _hidden_for_good(scores: Scores, zeroed: fx.Node) -> Scores:
    """The scores with minus infinity where the weights are set to 0, so that the output of a fully masked row is 0 too.

    Raises:
        NoMatchError: when the scores are not masked there.
    """
    hides = [bias.value is zeroed and bias.fill is not None and not bias.inverted for bias in scores.biases]
    if not any(hides):
        raise NoMatchError("the weights are set to 0 where the scores are not masked")
    biases = (replace(bias, fill=-float("inf")) if hidden else bias for bias, hidden in zip(scores.biases, hides, strict=True))
    return replace(scores, biases=tuple(biases))


def _keys(edit: Editor, transposed: fx.Node) -> fx.Node:
    """The keys before their last two dimensions were transposed."""
    found = _TRANSPOSED.match(transposed)
    return edit.call(aten.transpose.int, transposed, -2, -1) if found is None else found["k"]


def _unfold(edit: Editor, node: fx.Node, heads: object) -> fx.Node:
    """[batch·heads, a, b] as [batch, heads, a, b]; as [1, batch·heads, a, b] where the number of heads is unknown."""
    if nodes.tensor_type(node).rank == 4:
        return node
    if heads is None:
        return edit.call(aten.unsqueeze.default, node, 0)
    if folds_heads(node) and nodes.tensor_type(nodes.operand(node)).shape[1] == heads:
        return nodes.operand(node)
    if not isinstance(heads, int):
        raise NoMatchError("the number of heads varies")
    return edit.call(aten.reshape.default, node, [-1, heads, edit.size(node, 1), edit.size(node, 2)])


def _cast(edit: Editor, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    node = strip_casts(node) if nodes.tensor_type(strip_casts(node)).dtype == dtype else node
    return node if nodes.tensor_type(node).dtype == dtype else edit.call(aten.to.dtype, node, dtype)


def _sum(edit: Editor, biases: tuple[Bias, ...], dtype: torch.dtype, heads: object) -> fx.Node | None:
    """The biases as one tensor in the dtype of the attention; None when there are none."""
    total: fx.Node | None = None
    for bias in biases:
        if bias.floor:
            total = total and edit.call(aten.clamp_min.default, total, torch.finfo(dtype).min)
            continue
        value = _shaped(edit, bias, heads)
        if bias.fill is None:
            bias_dtype, lowest = nodes.tensor_type(strip_casts(value)).dtype, torch.finfo(dtype).min
            if bias_dtype.is_floating_point and torch.finfo(bias_dtype).min < lowest:
                # The lowest finite numbers stay finite, so that softmax of a row of them is uniform.
                value = edit.call(aten.clamp_min.default, value, lowest)
            term = _cast(edit, value, dtype)
            term = term if bias.factor == 1.0 else edit.call(aten.mul.Tensor, term, bias.factor)
            total = term if total is None else edit.call(aten.add.Tensor, total, term)
            continue
        if bias.inverted:
            value = edit.call(aten.logical_not.default, value)
        total = edit.call(aten.zeros_like.default, value, dtype=dtype) if total is None else total
        total = edit.call(aten.masked_fill.Scalar, total, value, _lowest(bias, dtype))
    return total


def _shaped(edit: Editor, bias: Bias, heads: object) -> fx.Node:
    """The bias with the dimensions that attention takes: [a, b], or [batch, heads, a, b]."""
    value, value_type = bias.value, nodes.tensor_type(bias.value)
    if bias.rank == 5:
        return _windowed(edit, bias)
    if value_type.rank > 4:
        raise NoMatchError("a bias has more dimensions than the scores")
    if value_type.rank == 3:
        varies = bias.rank == 3 and heads is not None and value_type.shape[0] != 1
        return _unfold(edit, value, heads) if varies else edit.call(aten.unsqueeze.default, value, 0)
    return _ranked(edit, value, 2)


def _ranked(edit: Editor, value: fx.Node, rank: int) -> fx.Node:
    """A value with first dimensions of size 1 inserted up to that rank."""
    for _ in range(nodes.tensor_type(value).rank, rank):
        value = edit.call(aten.unsqueeze.default, value, 0)
    return value


def _windowed(edit: Editor, bias: Bias) -> fx.Node:
    """A bias of [batch, windows, heads, a, b] as one of [batch·windows, heads, a, b]."""
    value = _ranked(edit, bias.value, 5)
    heads, *places = nodes.tensor_type(value).shape[2:]
    if not all(isinstance(size, int) for size in (heads, *places)):
        raise NoMatchError("a bias of windows has a dynamic size")
    sizes = [edit.size(bias.scores, dim) for dim in (0, 1)]
    value = edit.call(aten.expand.default, value, [*sizes, -1, -1, -1])
    return edit.call(aten.reshape.default, value, [-1, heads, *places])


def _lowest(bias: Bias, dtype: torch.dtype) -> float:
    """The fill of masked scores, within the range of the dtype."""
    fill, lowest = float(bias.fill or 0.0) * bias.factor, torch.finfo(dtype).min
    if fill > max(_LOWEST, lowest):
        raise NoMatchError(f"a fill of {fill:g} is not low enough to be the same as adding it")
    return fill if fill == -float("inf") else max(fill, lowest)
