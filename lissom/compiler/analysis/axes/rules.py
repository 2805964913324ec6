"""One rule per operator: the axes of its result from those of its arguments. The table is at the end."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes import views
from lissom.compiler.analysis.axes.axis import Axis, cut, divide, mark, pin, product, unify
from lissom.compiler.analysis.axes.base import Dims, Known, Rule, Value, broadcast, fresh, of, tensors, unknown
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import channel_dim, dim_of, shape_of
from lissom.compiler.ir.operators import is_pointwise, reduced_dims, rule_table
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.recurrence_letters import HEADS, LETTERS, SHARED, operands_of
from lissom.compiler.ir.types import TensorType
from lissom.ops import grouped_product, linear_attention, rotary

aten = torch.ops.aten


def apply(node: fx.Node, known: Known) -> Value:
    """The axes of a call's result; without a rule, all axes of its arguments are pinned."""
    rule = RULES.get(node.target)
    if rule is None:
        rule = _pointwise if is_pointwise(node) or node.target in ops.LIKE else unknown
    found = rule(node, known)
    _check(node, found)
    return found


def read_sizes(node: fx.Node, known: Known) -> None:
    """Pin the axes of tensors whose values are read (`item`); a size read at run time follows its axis by itself."""
    if node.target is aten.sym_size.int:
        return
    for used in node.all_input_nodes:
        for axis in known.get(used, ()):
            if isinstance(axis, Axis):
                pin(axis, f"read by {target_text(node.target)}")


def _check(node: fx.Node, found: Value) -> None:
    """Assert that a rule gave an axis of the right size for each dimension."""
    typed = nodes.node_type(node)
    if not isinstance(typed, TensorType):
        return
    sizes = [axis.size for axis in found if isinstance(axis, Axis)]
    static = [(have, want) for have, want in zip(sizes, typed.shape, strict=True) if isinstance(want, int)]
    assert all(not isinstance(have, int) or have == want for have, want in static), f"axes of {node.format_node()}: {sizes}"


def _pointwise(node: fx.Node, known: Known) -> Value:
    found = broadcast(tensors(node, known), len(shape_of(node)), target_text(node.target))
    results = nodes.node_type(node)
    return (found,) * len(results) if isinstance(results, tuple) else found


def _linear(node: fx.Node, known: Known) -> Value:
    x, weight = of(node.args[0], known), of(node.args[1], known)
    unify(x[-1], weight[1], "contracted by linear")
    if (bias := nodes.argument(node, "bias")) is not None:
        unify(of(bias, known)[0], weight[0], "a bias of linear")
    return (*x[:-1], weight[0])


def _matmul(node: fx.Node, known: Known) -> Value:
    return contract(of(node.args[0], known), of(node.args[1], known))


def contract(left: Dims, right: Dims) -> Dims:
    """The axes of a matrix product."""
    if len(right) == 1:
        unify(left[-1], right[0], "contracted by matmul")
        return left[:-1]
    unify(left[-1], right[-2], "contracted by matmul")
    if len(left) == 1:
        return (*right[:-2], right[-1])
    batch = broadcast([left[:-2], right[:-2]], max(len(left), len(right)) - 2, "matmul")
    return (*batch, left[-2], right[-1])


def _added_product(node: fx.Node, known: Known) -> Value:
    found = contract(of(node.args[1], known), of(node.args[2], known))
    return broadcast([of(node.args[0], known), found], len(found), target_text(node.target))


def _embedding(node: fx.Node, known: Known) -> Value:
    weight, ids = of(node.args[0], known), of(node.args[1], known)
    pin(weight[0], "rows of an embedding are looked up by index")
    return (*ids, weight[1])


def _reduce(node: fx.Node, known: Known) -> Value:
    """Mean, maximum and similar: an operator reads all of the reduced axes at once."""
    dims = of(node.args[0], known)
    for index in reduced_dims(node, len(dims)):
        mark(dims[index], whole=True)
    found = cast(Dims, views.moved(node, known))
    results = nodes.node_type(node)
    return (found,) * len(results) if isinstance(results, tuple) else found


def _scan(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    for axis in dims[dim_of(node, len(dims)) :][:1]:
        mark(axis, whole=True)
    return dims


def _normalise(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    count = len(cast("list[int]", node.args[1]))
    for item in node.args[2:4]:
        if nodes.is_tensor(item):
            for axis, other in zip(dims[-count:], of(item, known), strict=True):
                unify(axis, other, "a weight of a norm")
    for axis in dims[-count:]:
        mark(axis, normed=True)
    return dims


def _batch_norm(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    if len(dims) < 2:
        return unknown(node, known)
    for item in node.args[1:5]:
        if nodes.is_tensor(item):
            unify(dims[1], of(item, known)[0], "a weight of a norm")
    for axis in (dims[0], *dims[2:]) if nodes.argument(node, "training") else ():
        mark(axis, whole=True)
    return dims


def _group_norm(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    for used in node.all_input_nodes:
        for axis in of(used, known)[:2]:
            pin(axis, "normalised in groups")
    for axis in dims[2:]:
        mark(axis, whole=True)
    return dims


def _attention(node: fx.Node, known: Known) -> Value:
    q, k, v = (of(item, known) for item in node.args[:3])
    keys = k[len(k) - 2]
    unify(q[-1], k[-1], "contracted by attention")
    unify(keys, v[len(v) - 2], "attended over")
    mark(keys, whole=True)
    lead = broadcast([k[:-2], v[:-2]], len(k) - 2, "attention")
    if len(q) > 2 and len(lead) > 0 and q[-3].size != lead[-1].size:
        groups = divide(q[-3], lead[-1].size)
        if groups is None:
            pin(q[-3], "shared between key/value groups")
        else:
            unify(groups[0], lead[-1], "key/value groups")
        lead = (*broadcast([q[:-3], lead[:-1]], len(q) - 3, "attention"), q[-3])
    else:
        lead = broadcast([q[:-2], lead], len(q) - 2, "attention")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    sinks = node.kwargs.get("sinks")
    if sinks is not None:
        broadcast([lead, of(sinks, known)[:-2]], len(lead), "attention sinks")
    if mask is not None:
        broadcast([(*lead, q[len(q) - 2], keys), of(mask, known)], len(q), "an attention mask")
    return (*lead, q[len(q) - 2], v[-1])


def _recurrence(node: fx.Node, known: Known) -> Value:
    """Dimensions of one name are one axis. Tokens, and what a token sums over, stay as they are."""
    axes: dict[str, Axis] = {}
    shared: list[Axis] = []
    for item, names in operands_of(node):
        for axis, name in zip(of(item, known), names, strict=False):
            if name == SHARED:
                shared.append(axis)
            elif name not in axes:
                axes[name] = axis
            else:
                unify(axes[name], axis, "of a recurrence")
    for axis in shared:
        if axis.size != axes[HEADS].size:
            pin(axis, "shared between the heads of a recurrence")
            if axis.size != 1:
                pin(axes[HEADS], "sharing what a recurrence reads")
        else:
            unify(axes[HEADS], axis, "of a recurrence")
    for name in ("tokens", "states"):
        pin(axes[name], "read by a recurrence")
    return tuple(tuple(axes[name] for name in names) for names in LETTERS[node.target][1])


def _rotary(node: fx.Node, known: Known) -> Value:
    x, *tables = (of(item, known) for item in node.args[:3])
    width = x[-1].size
    pieces = None
    if isinstance(width, int):
        pieces = divide(x[-1], width // 2) if node.kwargs.get("interleaved") else cut(x[-1], width // 2)
    if pieces is None:
        pin(x[-1], "rotated in pairs")
    elif node.kwargs.get("interleaved"):
        pin(pieces[1], "rotated in pairs")
    else:
        unify(pieces[0], pieces[1], "rotated in pairs")
    for table in tables:
        broadcast([x[:-1], table[:-1]], len(x) - 1, "rotary embedding")
        if table[-1].size == width:
            unify(x[-1], table[-1], "rotated in pairs")
        elif pieces is not None:
            unify(pieces[0], table[-1], "rotated in pairs")
    return x


def _grouped_product(node: fx.Node, known: Known) -> Value:
    """Rows times the matrix of their expert. Experts are looked up by index, so their axis and that of the rows are pinned."""
    x, weight = of(node.args[0], known), of(node.args[1], known)
    unify(x[1], weight[1], "contracted by a grouped product")
    for axis in (x[0], weight[0], *of(node.args[2], known)):
        pin(axis, f"{target_text(node.target)} looks experts up by index")
    return (x[0], weight[2])


def _rounded(node: fx.Node, known: Known) -> Value:
    """Quantizers are element-wise, but give two values for each byte of packed 4-bit values along the last dimension."""
    q, *grid = (of(item, known) for item in node.args if nodes.is_tensor(item))
    sizes = nodes.tensor_type(node).shape
    last = q[-1] if q[-1].size == sizes[-1] else product([q[-1], Axis(2)])
    result = (*q[:-1], last)
    for dims in grid:
        for axis, whole in zip(dims, result, strict=bool(dims)):
            if axis.size == 1:
                continue
            blocks = (whole, None) if axis.size == whole.size else divide(whole, axis.size)
            if blocks is not None:
                unify(blocks[0], axis, "blocks of equal scale")
    for axis in (*result, *(item for dims in grid for item in dims)):
        pin(axis, f"no rule for {target_text(node.target)}")
    return result


def _convolution(node: fx.Node, known: Known) -> Value:
    x, weight = of(node.args[0], known), of(node.args[1], known)
    groups, channels = nodes.argument(node, "groups"), x[channel_dim(node)]
    if (bias := nodes.argument(node, "bias")) is not None:
        unify(of(bias, known)[0], weight[0], "a bias of a convolution")
    if groups == 1:
        unify(channels, weight[1], "contracted by a convolution")
    elif groups == channels.size == weight[0].size:
        unify(channels, weight[0], "the channels of a depthwise convolution")
    else:
        pin(channels, "convolved in groups")
        pin(weight[0], "convolved in groups")
        pin(weight[1], "convolved in groups")
    count = len(weight) - 2
    for axis in (*x[-count:], *weight[2:]):
        pin(axis, "convolved over")
    spatial = nodes.tensor_type(node).shape[-count:]
    return (*x[: -count - 1], weight[0], *(Axis(size, pinned="convolved over") for size in spatial))


def _einsum(node: fx.Node, known: Known) -> Value:
    inputs, _, output = cast(str, node.args[0]).replace(" ", "").partition("->")
    operands = [of(item, known) for item in cast("list[fx.Node]", node.args[1])]
    if "." in inputs or not output or any(len(set(term)) != len(term) for term in inputs.split(",")):
        return unknown(node, known)
    letters: dict[str, Axis] = {}
    for term, dims in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(term, dims, strict=True):
            unify(letters.setdefault(letter, axis), axis, f"'{letter}' of einsum")
    return tuple(letters[letter] for letter in output)


RULES: dict[object, Rule] = rule_table(
    (views.getitem, [operator.getitem]),
    (lambda node, known: of(node.args[0], known), [*ops.IDENTITIES, *ops.CONVERSIONS, aten.bernoulli.default]),
    (_linear, [aten.linear.default]),
    (_matmul, ops.MATMULS),
    (_added_product, ops.MATMULS_WITH_BIAS),
    (_embedding, [aten.embedding.default]),
    (views.moved, [aten.permute.default, *ops.TRANSPOSES, aten.unsqueeze.default, *ops.SQUEEZES]),
    (_pointwise, [aten.expand_as.default]),
    (views.moved, [*ops.EXPANDS, *ops.SUMS]),
    (views.reshape, ops.RESHAPES),
    (views.reshape_as, ops.RESHAPES_AS),
    (views.repeat, [aten.repeat.default]),
    (views.repeat_interleave, [aten.repeat_interleave.self_int]),
    (views.cat, ops.CONCATENATIONS),
    (views.stack, [aten.stack.default]),
    (views.split, ops.SPLITS),
    (views.unbind, [aten.unbind.int]),
    (views.select, [aten.select.int]),
    (views.slice_of, [aten.slice.Tensor]),
    (_reduce, [*ops.REDUCTIONS, *ops.REDUCTIONS_WITH_INDICES]),
    (_scan, [*ops.SOFTMAX, *ops.LOG_SOFTMAX, *ops.CUMULATIVE]),
    (views.reorder, [aten.flip.default, aten.roll.default, aten.tril.default, aten.triu.default, aten.rot90.default]),
    (_normalise, ops.LAYER_NORMS),
    (_batch_norm, [aten.batch_norm.default]),
    (_group_norm, [aten.group_norm.default]),
    (_attention, [*ops.ATTENTIONS, linear_attention]),
    (_rotary, [rotary]),
    (_recurrence, LETTERS),
    (_grouped_product, [grouped_product]),
    (_rounded, ops.QUANTIZERS),
    (_convolution, ops.CONVOLUTIONS),
    (views.index_select, [aten.index_select.default]),
    (views.index_copy, [aten.index_copy.default, aten.index_copy_.default]),
    (views.copy, [aten.copy_.default]),
    (views.gather, [aten.gather.default, aten.take_along_dim.default]),
    (views.index, [aten.index.Tensor]),
    (_einsum, [aten.einsum.default]),
    (lambda node, known: fresh(nodes.node_type(node)), ops.NEW_TENSORS),
    (
        lambda node, known: fresh(nodes.node_type(node), "its values count positions"),
        [*ops.RANGES, aten.linspace.default, aten.eye.default],
    ),
)
"""The rules by operator."""
